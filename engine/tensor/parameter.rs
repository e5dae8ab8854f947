//! `Parameter`: a weight that models train. Its value lies in the layout its products read, its gradient is an f32 sum
//! in the matching f32 layout. Optimizers and checkpoints see it through the methods here.
//! Layouts: `Rows` is row-major (norm weights, biases, untied embeddings); `Panels` is what the packed products read
//! (kernels/cpu/panels.rs). On a device all are `Rows`, or integers in rows (cuda/value.rs). A trained bf16 weight is split: the bf16 value that products read, and the remainder that
//! completes it to the f32 master weight (kernels/cpu/adamw.rs).

use super::ModelElement;
use super::cuda::update::Locked;
use super::cuda::value::{DeviceValue, GRADIENTS};
use super::embedding_part::EmbeddingPart;
use super::low_rank::LowRank;
use super::place::{Array, Place, downloaded};
use crate::error::{Error, Result};
use crate::kernels::buffer::Buffer;
use crate::kernels::cpu::gemm::{self, Weight};
use crate::kernels::cpu::int8::{self, Int8Weight, Int8WeightMut};
use crate::kernels::cpu::panels;
use crate::kernels::cpu::tile::PANEL_COLUMNS;
use crate::kernels::cuda::memory::{DeviceBuffer, Keeper, View, ViewMut};
use crate::kernels::element::Float;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, RwLock, RwLockReadGuard};

/// f32 values of a block while all of a weight is read or changed.
pub(super) const BLOCK_VALUES: usize = 1 << 20;

/// How the elements lie in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// `[rows, columns]` in row-major order.
    Rows,
    /// Panels of 32 rows with the columns running down.
    Panels,
    /// The same of integers of 8 bits, with a scale for each row: for inference alone.
    Int8,
}

impl Layout {
    /// Where `rows` of what is kept beside a weight `[n, k]` of this layout lie: a range of elements, the shape of what it holds and
    /// the rows' place there. Panels are not cut.
    pub fn span(self, (n, k): (usize, usize), rows: Range<usize>) -> (Range<usize>, (usize, usize), Range<usize>) {
        let (first, end) = match self {
            Self::Rows => (rows.start, rows.end),
            Self::Panels | Self::Int8 => (rows.start / PANEL_COLUMNS * PANEL_COLUMNS, rows.end.next_multiple_of(PANEL_COLUMNS)),
        };
        (first * k..end * k, (end.min(n) - first, k), rows.start - first..rows.end - first)
    }

    /// Copies `rows` of what is kept in f32 beside a weight `[n, k]` of this layout to `values`, row-major.
    pub fn unpack_f32(self, kept: &[f32], (n, k): (usize, usize), rows: Range<usize>, values: &mut [f32]) {
        match self {
            Self::Rows => values.copy_from_slice(&kept[rows.start * k..rows.end * k]),
            Self::Panels | Self::Int8 => panels::unpack(kept, n, k, rows, values),
        }
    }

    /// The way back of [`Layout::unpack_f32`]; other rows keep theirs.
    pub fn pack_f32(self, kept: &mut [f32], (n, k): (usize, usize), rows: Range<usize>, values: &[f32]) {
        match self {
            Self::Rows => kept[rows.start * k..rows.end * k].copy_from_slice(values),
            Self::Panels | Self::Int8 => panels::pack(kept, n, k, rows, values),
        }
    }
}

/// The value of a parameter.
pub struct Value<E: ModelElement> {
    /// What the forward and backward products read.
    pub weight: Buffer<E>,
    /// For bf16 only, while it trains: what completes each element to its f32 master, in the order of `weight`.
    pub remainder: Option<Vec<i16>>,
    /// In place of `weight`, which is empty then.
    pub int8: Option<Int8>,
    /// In place of `weight` and `remainder`, on a device.
    pub(super) cuda: Option<DeviceValue<E>>,
}

/// A value to write: a copy of its own, where others share it.
///
/// Errors: [`Error::Device`] if the device has no room for it.
pub(super) fn own<E: ModelElement>(value: &mut Arc<Value<E>>) -> Result<&mut Value<E>> {
    if Arc::get_mut(value).is_none() {
        *value = Arc::new(value.try_clone()?);
    }
    Ok(Arc::get_mut(value).expect("it was copied above if it was shared"))
}

/// What is wrong where derivatives would mix two models.
pub fn weights_changed(op: &'static str, arg: &str) -> Error {
    let got = "weights that an optimizer or a load has changed since; run backward, or read the loss, before the update";
    Error::argument(op, arg, "weights as they were in the forward pass", got)
}

/// The integers of a weight, in panels, what each row's are multiplied by, and their sum.
#[derive(Clone)]
pub struct Int8 {
    values: Buffer<i8>,
    scales: Buffer<f32>,
    sums: Buffer<i32>,
}

/// A trainable weight of `rows x columns`; a vector is one column.
pub struct Parameter<E: ModelElement> {
    pub(super) name: String,
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) layout: Layout,
    /// Also one of one column, if products read it.
    pub(super) is_matrix: bool,
    /// Copies of a frozen parameter share it until one of them is written.
    pub(super) value: RwLock<Arc<Value<E>>>,
    pub(super) place: Place,
    pub(super) adapters: RwLock<Adapters<E>>,
    pub(super) gradient: Mutex<Option<Array<f32>>>,
    /// On a device: where gradients come to lie once graphs know the place (cuda/training.rs).
    pub(super) keeper: Mutex<Option<Keeper<f32>>>,
    pub(super) trains: AtomicBool,
    /// Counts the updates, so that a backward pass notices that its forward pass saw other weights.
    pub(super) version: AtomicU64,
    /// Gradients added and dropped so far.
    pub(super) gradients: AtomicU64,
}

/// The low-rank parts of a weight.
#[derive(Clone)]
pub(super) struct Adapters<E: ModelElement> {
    pub(super) parts: Arc<[LowRank<E>]>,
    /// What lookups add, if it is an embedding.
    pub(super) embedding: Option<EmbeddingPart<E>>,
    /// While they are merged: the value without them.
    pub(super) former: Option<Arc<Value<E>>>,
}

impl<E: ModelElement> Default for Adapters<E> {
    fn default() -> Self {
        Self { parts: Arc::new([]), embedding: None, former: None }
    }
}

impl<E: ModelElement> Value<E> {
    /// A copy at the same place.
    ///
    /// Errors: [`Error::Device`] if the device has no room.
    pub fn try_clone(&self) -> Result<Self> {
        let cuda = self.cuda.as_ref().map(DeviceValue::try_clone).transpose()?;
        Ok(Self { weight: self.weight.clone(), remainder: self.remainder.clone(), int8: self.int8.clone(), cuda })
    }

    /// The weight on its device, as products read it. Panics on the host.
    pub(super) fn on_device(&self) -> View<'_, E> {
        self.cuda.as_ref().expect("a weight on the host was read as if on a device").weight.view()
    }
}

impl<E: ModelElement> Parameter<E> {
    /// As [`Parameter::zeros`], at `place`; on a device the layout is `Rows`, or that of integers.
    ///
    /// Errors: [`Error::Device`] if the device has no room.
    pub fn zeros_at(place: &Place, name: impl Into<String>, rows: usize, columns: usize, layout: Layout) -> Result<Self> {
        let Some(device) = place.device() else { return Ok(Self::zeros(name, rows, columns, layout)) };
        let (value, cuda) = match layout {
            Layout::Int8 => (Self::zeros(name, 0, columns, layout), DeviceValue::zeros_int8(device, rows, columns)?),
            _ => (Self::zeros(name, 0, columns, Layout::Rows), DeviceValue::zeros(device, rows * columns)?),
        };
        let cuda = Some(cuda);
        let on_device = Value { weight: Buffer::zeroed(0), remainder: None, int8: None, cuda };
        let is_matrix = layout == Layout::Panels || columns > 1;
        Ok(Self { rows, is_matrix, value: RwLock::new(Arc::new(on_device)), place: place.clone(), ..value })
    }

    /// Zeros that train. `name` is for messages.
    pub fn zeros(name: impl Into<String>, rows: usize, columns: usize, layout: Layout) -> Self {
        let len = match layout {
            Layout::Rows => rows * columns,
            Layout::Panels => panels::len::<E>(rows, columns),
            Layout::Int8 => 0,
        };
        let int8 = || Int8 { values: Buffer::zeroed(int8::len(rows, columns)), scales: Buffer::zeroed(rows), sums: Buffer::zeroed(rows) };
        let int8 = (layout == Layout::Int8).then(int8);
        Self {
            name: name.into(),
            rows,
            columns,
            layout,
            is_matrix: layout == Layout::Panels || columns > 1,
            value: RwLock::new(Arc::new(Value { weight: Buffer::zeroed(len), remainder: None, int8, cuda: None })),
            place: Place::Host,
            adapters: RwLock::default(),
            gradient: Mutex::new(None),
            keeper: Mutex::new(None),
            trains: AtomicBool::new(layout != Layout::Int8),
            version: AtomicU64::new(0),
            gradients: AtomicU64::new(0),
        }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Outputs of a matrix, or elements of a vector.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Inputs of a matrix; 1 for a vector.
    pub fn columns(&self) -> usize {
        self.columns
    }

    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// Where value and gradient lie.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// Elements, padding of the layout not counted.
    pub fn count(&self) -> usize {
        self.rows * self.columns
    }

    /// Elements of the gradient and of everything else kept in f32 beside it, padding counted.
    pub fn gradient_len(&self) -> usize {
        match self.layout {
            Layout::Rows => self.rows * self.columns,
            Layout::Panels | Layout::Int8 => panels::len_f32(self.rows, self.columns),
        }
    }

    /// Whether backward passes leave a gradient here.
    pub fn trains(&self) -> bool {
        self.trains.load(Relaxed)
    }

    /// Freezes or thaws it. A frozen one has no gradient; one of 8 bits is always frozen.
    pub fn set_trains(&self, trains: bool) {
        let trains = trains && self.layout != Layout::Int8;
        if self.trains.swap(trains, Relaxed) != trains {
            self.gradients.fetch_add(1, Relaxed);
        }
        if !trains {
            self.clear_gradient();
            *self.keeper.lock().expect("nothing panics while a place is kept") = None;
        }
    }

    /// Forgets what completes a bf16 weight to its f32 master: a weight that will not train needs none.
    ///
    /// Errors: [`Error::Device`] if others share the value, and the device has no room for one of its own.
    pub fn drop_master(&self) -> Result<()> {
        // What has none stays shared, and as it was.
        if self.has_remainder() {
            let mut value = self.value.write().expect("nothing panics while a parameter is written");
            let value = own(&mut value)?;
            value.remainder = None;
            value.cuda.iter_mut().for_each(|cuda| cuda.remainder = None);
            self.version.fetch_add(1, Relaxed);
        }
        Ok(())
    }

    pub fn read(&self) -> RwLockReadGuard<'_, Arc<Value<E>>> {
        self.value.read().expect("nothing panics while a parameter is written")
    }

    /// A value of this parameter as an operand of the packed products. Panics for `Rows`, which products do not read.
    pub fn product_weight<'a>(&self, value: &'a Value<E>) -> Weight<'a, E> {
        assert_eq!(self.layout, Layout::Panels, "{} is not packed", self.name);
        Weight { panels: &value.weight, outputs: self.rows, inputs: self.columns }
    }

    /// `y = x Wᵀ (+ bias) (+ residual)` with the weight as it is, low-rank parts left out; arguments as in [`gemm::forward`].
    /// Panics for `Rows`.
    pub fn multiply<O: Float>(&self, y: &mut [O], x: &[E], rows: Option<&[u32]>, bias: Option<&[E]>, residual: Option<&[O]>) {
        let value = self.read();
        match &value.int8 {
            None => gemm::forward(y, x, rows, self.product_weight(&value), bias, residual),
            Some(int8) => int8::forward(y, x, rows, self.int8_weight(int8), bias, residual),
        }
    }

    fn int8_weight<'a>(&self, int8: &'a Int8) -> Int8Weight<'a> {
        Int8Weight { values: &int8.values, scales: &int8.scales, sums: &int8.sums, outputs: self.rows, inputs: self.columns }
    }

    /// Number of updates so far.
    pub fn version(&self) -> u64 {
        self.version.load(Relaxed)
    }

    /// A number that changes with every change of value or gradient, and when it freezes or thaws.
    pub fn changes(&self) -> u64 {
        self.version().wrapping_add(self.gradients.load(Relaxed))
    }

    /// Errors: [`Error::Argument`] if it was updated since version `seen`: derivatives would mix two models.
    pub fn check_version(&self, seen: u64, op: &'static str) -> Result<()> {
        if self.version() == seen {
            return Ok(());
        }
        Err(weights_changed(op, &self.name))
    }

    /// Elements of the weight as it lies, padding counted: as many as it has remainders.
    pub fn weight_len(&self) -> usize {
        let value = self.read();
        value.cuda.as_ref().map_or(value.weight.len(), |cuda| cuda.weight.len())
    }

    /// Whether a bf16 weight has a finer master.
    pub fn has_remainder(&self) -> bool {
        let value = self.read();
        value.remainder.is_some() || value.cuda.as_ref().is_some_and(|cuda| cuda.remainder.is_some())
    }

    /// Copies `rows` of what completes a bf16 weight to its f32 master, row-major. Panics if there is none.
    ///
    /// Errors: those of the device.
    pub fn remainder_rows(&self, rows: Range<usize>, values: &mut [i16]) -> Result<()> {
        let value = self.read();
        match (&value.cuda, &value.remainder) {
            (Some(cuda), _) => return cuda.read_remainder(rows.start * self.columns, values),
            (None, Some(remainder)) => {
                self.unpack(E::remainder_as_elements(remainder), rows, E::remainder_as_elements_mut(values));
            }
            (None, None) => panic!("{} has no remainder", self.name),
        }
        Ok(())
    }

    /// Sets `rows` of the remainder; those of other rows are zero if there was none.
    ///
    /// Errors: [`Error::Device`] if the device has no room.
    pub fn write_remainder_rows(&self, rows: Range<usize>, values: &[i16]) -> Result<()> {
        let mut guard = self.value.write().expect("nothing panics while a parameter is written");
        let value = own(&mut guard)?;
        if let Some(cuda) = &mut value.cuda {
            cuda.remainder_mut()?.upload_at(rows.start * self.columns, values)?;
        } else {
            let remainder = value.remainder.get_or_insert_with(|| vec![0; value.weight.len()]);
            self.pack(E::remainder_as_elements_mut(remainder), rows, E::remainder_as_elements(values));
        }
        self.version.fetch_add(1, Relaxed);
        Ok(())
    }

    /// Forgets what training keeps beside the weight: the remainder and the gradient.
    ///
    /// Errors: those of [`Parameter::drop_master`].
    pub fn clear_training_state(&self) -> Result<()> {
        self.clear_gradient();
        self.drop_master()
    }

    /// Copies `rows` of the value to `values` `[rows, columns]`, row-major, as f32: master weights where they exist.
    pub fn read_rows(&self, rows: Range<usize>, values: &mut [f32]) -> Result<()> {
        let value = self.read();
        if let Some(int8) = &value.int8 {
            let rows = rows.zip(values.chunks_exact_mut(self.columns.max(1)));
            rows.for_each(|(row, out)| int8::read_row(self.int8_weight(int8), row, out));
            return Ok(());
        }
        if let Some(cuda) = &value.cuda {
            return cuda.read_masters(rows.start * self.columns, values);
        }
        let mut narrow = Buffer::<E>::scratch(values.len());
        self.unpack(&value.weight, rows.clone(), &mut narrow);
        match &value.remainder {
            None => values.iter_mut().zip(narrow.iter()).for_each(|(to, from)| *to = from.to_f32()),
            Some(remainder) => {
                let mut rest = Buffer::<E>::scratch(values.len());
                self.unpack(E::remainder_as_elements(remainder), rows, &mut rest);
                E::join_master(&narrow, &rest, values);
            }
        }
        Ok(())
    }

    /// Copies `rows` of the weight itself, row-major: what products read, not the f32 master beside it.
    pub fn read_weight_rows(&self, rows: Range<usize>, values: &mut [E]) -> Result<()> {
        if self.layout == Layout::Int8 {
            let mut wide = Buffer::<f32>::scratch(values.len());
            self.read_rows(rows, &mut wide)?;
            values.iter_mut().zip(wide.iter()).for_each(|(to, from)| *to = E::from_f32(*from));
            return Ok(());
        }
        let value = self.read();
        match &value.cuda {
            Some(cuda) => return cuda.read_weight(rows.start * self.columns, values),
            None => self.unpack(&value.weight, rows, values),
        }
        Ok(())
    }

    /// Ranges of rows of at most [`BLOCK_VALUES`] values, each of whole panels where it can be.
    pub(super) fn row_blocks(&self) -> impl Iterator<Item = Range<usize>> + use<E> {
        let (rows, step) = (self.rows, (BLOCK_VALUES / self.columns.max(1)).next_multiple_of(32));
        (0..rows).step_by(step).map(move |start| start..(start + step).min(rows))
    }

    fn unpack(&self, from: &[E], rows: Range<usize>, to: &mut [E]) {
        match self.layout {
            Layout::Rows => to.copy_from_slice(&from[rows.start * self.columns..rows.end * self.columns]),
            Layout::Panels => panels::unpack(from, self.rows, self.columns, rows, to),
            Layout::Int8 => unreachable!("integers are read by their own functions"),
        }
    }

    fn pack(&self, to: &mut [E], rows: Range<usize>, from: &[E]) {
        match self.layout {
            Layout::Rows => to[rows.start * self.columns..rows.end * self.columns].copy_from_slice(from),
            Layout::Panels => panels::pack(to, self.rows, self.columns, rows, from),
            Layout::Int8 => unreachable!("integers are written by their own functions"),
        }
    }

    /// Sets `rows` of the value from `values` `[rows, columns]`, row-major; bf16 keeps the rest as remainder if
    /// `split_master` asks for one or one is there already.
    ///
    /// Errors: [`Error::Device`] if it lies on a device that has no room for remainders, or is lost.
    pub fn write_rows(&self, rows: Range<usize>, values: &[f32], split_master: bool) -> Result<()> {
        let mut guard = self.value.write().expect("nothing panics while a parameter is written");
        self.write_value(own(&mut guard)?, rows, values, split_master)?;
        self.version.fetch_add(1, Relaxed);
        Ok(())
    }

    pub(super) fn write_value(&self, value: &mut Value<E>, rows: Range<usize>, values: &[f32], split_master: bool) -> Result<()> {
        assert_eq!(values.len(), rows.len() * self.columns, "{}: values of rows {rows:?}", self.name);
        if let Some(int8) = &mut value.int8 {
            let Int8 { values: integers, scales, sums } = int8;
            int8::pack(Int8WeightMut { values: integers, scales, sums, inputs: self.columns }, rows, values);
            return Ok(());
        }
        if let Some(cuda) = &mut value.cuda {
            return cuda.write_masters(rows.start * self.columns, values, split_master);
        }
        let mut narrow = Buffer::<E>::scratch(values.len());
        if E::HAS_REMAINDER && (split_master || value.remainder.is_some()) {
            let mut rest = Buffer::<E>::scratch(values.len());
            E::split_master(values, &mut narrow, &mut rest);
            let remainder = value.remainder.get_or_insert_with(|| vec![0; value.weight.len()]);
            self.pack(E::remainder_as_elements_mut(remainder), rows.clone(), &rest);
        } else {
            narrow.iter_mut().zip(values).for_each(|(to, from)| *to = E::from_f32(*from));
        }
        self.pack(&mut value.weight, rows, &narrow);
        Ok(())
    }

    /// Copies `rows` of the gradient, row-major; none if there is no gradient.
    pub fn gradient_rows(&self, rows: Range<usize>) -> Result<Option<Buffer<f32>>> {
        let guard = self.gradient.lock().expect("nothing panics while a gradient is written");
        let Some(gradient) = guard.as_ref() else { return Ok(None) };
        let mut values = Buffer::scratch(rows.len() * self.columns);
        match gradient {
            Array::Cuda(gradient) => {
                gradient.download_at(rows.start * self.columns, &mut values)?;
            }
            Array::Host(gradient) => self.layout.unpack_f32(gradient, (self.rows, self.columns), rows, &mut values),
        }
        Ok(Some(values))
    }

    /// Sets `rows` of the gradient; those of other rows are zero if there was none.
    ///
    /// Errors: [`Error::Device`] if the device has no room.
    pub fn write_gradient_rows(&self, rows: Range<usize>, values: &[f32]) -> Result<()> {
        let mut guard = self.gradient.lock().expect("nothing panics while a gradient is written");
        if guard.is_none() {
            *guard = Some(Array::zeroed(&self.place, GRADIENTS, self.gradient_len())?);
        }
        match guard.as_mut() {
            Some(Array::Cuda(gradient)) => gradient.upload_at(rows.start * self.columns, values)?,
            Some(Array::Host(gradient)) => self.layout.pack_f32(gradient, (self.rows, self.columns), rows, values),
            None => unreachable!("it was made above"),
        }
        self.gradients.fetch_add(1, Relaxed);
        Ok(())
    }

    /// Bytes of weight, remainder and gradient.
    pub fn state_bytes(&self) -> usize {
        let value = self.read();
        let gradient = self.gradient.lock().expect("nothing panics while a gradient is read").as_ref().map_or(0, Array::len);
        let int8 = value.int8.as_ref().map_or(0, |int8| int8.values.len() + 8 * int8.scales.len());
        let host = value.weight.len() * size_of::<E>() + value.remainder.as_ref().map_or(0, Vec::len) * 2;
        int8 + host + value.cuda.as_ref().map_or(0, DeviceValue::bytes) + gradient * 4
    }

    /// Lets `write` put a gradient in place, in the f32 layout: with `true` it must add to what is there, with `false`
    /// overwrite all of it, padding with zeros. Nothing happens to a frozen parameter.
    pub fn accumulate(&self, write: impl FnOnce(&mut [f32], bool)) {
        if !self.trains() {
            return;
        }
        let mut guard = self.gradient.lock().expect("nothing panics while a gradient is written");
        self.gradients.fetch_add(1, Relaxed);
        match guard.as_mut() {
            Some(Array::Host(sum)) => write(sum, true),
            Some(Array::Cuda(_)) => panic!("{}: a gradient of the host for a weight on {}", self.name, self.place),
            None => {
                let mut sum = Buffer::scratch(self.gradient_len());
                write(&mut sum, false);
                *guard = Some(Array::Host(sum));
            }
        }
    }

    /// As [`Parameter::accumulate`], of a parameter on a device.
    ///
    /// Errors: those of `write`; [`Error::Device`] if the device has no room.
    pub(super) fn accumulate_on_device(&self, write: impl FnOnce(ViewMut<f32>, bool) -> Result<()>) -> Result<()> {
        if !self.trains() {
            return Ok(());
        }
        let device = self.place.device().expect("a weight on the host was given a gradient on a device");
        let mut guard = self.gradient.lock().expect("nothing panics while a gradient is written");
        self.gradients.fetch_add(1, Relaxed);
        match guard.as_mut() {
            Some(Array::Cuda(sum)) => write(sum.view_mut(), true),
            Some(Array::Host(_)) => panic!("{}: a gradient on the host of a weight on {}", self.name, self.place),
            None => {
                let kept = self.kept_place().map(Ok);
                let mut sum = kept.unwrap_or_else(|| DeviceBuffer::scratch(device, GRADIENTS, self.gradient_len()))?;
                write(sum.view_mut(), false)?;
                *guard = Some(Array::Cuda(sum));
                Ok(())
            }
        }
    }

    /// Reads the gradient, if there is one; a copy of it, if it lies on a device.
    pub fn with_gradient<T>(&self, read: impl FnOnce(Option<&[f32]>) -> T) -> Result<T> {
        Ok(match self.gradient.lock().expect("nothing panics while a gradient is read").as_ref() {
            None => read(None),
            Some(Array::Host(gradient)) => read(Some(gradient)),
            Some(Array::Cuda(gradient)) => read(Some(&downloaded(gradient)?)),
        })
    }

    /// Whether there is one.
    pub fn has_gradient(&self) -> bool {
        self.gradient.lock().expect("nothing panics while a gradient is read").is_some()
    }

    /// Forgets the gradient.
    pub fn clear_gradient(&self) {
        *self.gradient.lock().expect("nothing panics while a gradient is dropped") = None;
        self.gradients.fetch_add(1, Relaxed);
    }

    /// Lets `write` change the value, given the gradient, which is gone afterwards; skipped without a gradient.
    ///
    /// Errors: those of copying a value that others share. Panics if it lies on a device.
    pub fn update(&self, write: impl FnOnce(&mut Value<E>, &[f32])) -> Result<()> {
        let gradient = self.gradient.lock().expect("nothing panics while a gradient is read").take();
        if let Some(gradient) = gradient {
            let mut value = self.value.write().expect("nothing panics while a parameter is written");
            write(own(&mut value)?, gradient.host());
            self.version.fetch_add(1, Relaxed);
        }
        Ok(())
    }

    /// Holds value and gradient for an update on the device, after which the gradient is gone; none without a gradient.
    ///
    /// Errors: [`Error::Device`] if the device has no room for the remainders of a first update.
    pub(super) fn lock_update(&self) -> Result<Option<Locked<'_, E>>> {
        let gradient = self.gradient.lock().expect("nothing panics while a gradient is read").take();
        let Some(gradient) = gradient.map(Array::into_cuda) else { return Ok(None) };
        let value = self.value.write().expect("nothing panics while a parameter is written");
        self.version.fetch_add(1, Relaxed);
        Locked::new(value, gradient).map(Some)
    }
}
