//! `Parameter`: a weight that models train. Its value lies in the layout its products read, its gradient is an f32 sum
//! in the matching f32 layout. Optimizers and checkpoints see it through the methods here.
//! Layouts: `Rows` is row-major (norm weights, biases, untied embeddings); `Panels` is what the packed products read
//! (kernels/cpu/panels.rs). A trained bf16 weight is split: the bf16 value that products read, and the remainder that
//! completes it to the f32 master weight (kernels/cpu/adamw.rs).

use super::ModelElement;
use super::low_rank::LowRank;
use crate::error::{Error, Result};
use crate::kernels::buffer::Buffer;
use crate::kernels::cpu::gemm::{self, Weight};
use crate::kernels::cpu::int8::{self, Int8Weight, Int8WeightMut};
use crate::kernels::cpu::norm;
use crate::kernels::cpu::panels;
use crate::kernels::element::Float;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, RwLock, RwLockReadGuard};

/// f32 values of a block while all of a weight is read or changed.
const BLOCK_VALUES: usize = 1 << 20;

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

/// The value of a parameter.
#[derive(Clone)]
pub struct Value<E: ModelElement> {
    /// What the forward and backward products read.
    pub weight: Buffer<E>,
    /// For bf16 only, while it trains: what completes each element to its f32 master, in the order of `weight`.
    pub remainder: Option<Vec<i16>>,
    /// In place of `weight`, which is empty then.
    pub int8: Option<Int8>,
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
    /// Copies of a frozen parameter share it until one of them is written.
    value: RwLock<Arc<Value<E>>>,
    adapters: RwLock<Adapters<E>>,
    gradient: Mutex<Option<Buffer<f32>>>,
    trains: AtomicBool,
    /// Counts the updates, so that a backward pass notices that its forward pass saw other weights.
    version: AtomicU64,
    /// Gradients added and dropped so far.
    gradients: AtomicU64,
}

/// The low-rank parts of a weight.
#[derive(Clone)]
struct Adapters<E: ModelElement> {
    parts: Arc<[LowRank<E>]>,
    /// While they are merged: the value without them.
    former: Option<Arc<Value<E>>>,
}

impl<E: ModelElement> Default for Adapters<E> {
    fn default() -> Self {
        Self { parts: Arc::new([]), former: None }
    }
}

impl<E: ModelElement> Value<E> {
    /// Copies elements as they lie, as f32: masters where they exist.
    fn read_masters(&self, range: Range<usize>, masters: &mut [f32]) {
        match &self.remainder {
            None => norm::convert(&self.weight[range], masters),
            Some(remainder) => {
                E::join_master(&self.weight[range.clone()], E::remainder_as_elements(&remainder[range]), masters);
            }
        }
    }
}

impl<E: ModelElement> Parameter<E> {
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
            value: RwLock::new(Arc::new(Value { weight: Buffer::zeroed(len), remainder: None, int8 })),
            adapters: RwLock::default(),
            gradient: Mutex::new(None),
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
        self.trains.store(trains, Relaxed);
        if !trains {
            self.clear_gradient();
        }
    }

    /// Forgets what completes a bf16 weight to its f32 master: a weight that will not train needs none.
    pub fn drop_master(&self) {
        let mut value = self.value.write().expect("nothing panics while a parameter is written");
        if value.remainder.is_some() {
            Arc::make_mut(&mut value).remainder = None;
            self.version.fetch_add(1, Relaxed);
        }
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

    /// A number that changes with every change of value or gradient.
    pub fn changes(&self) -> u64 {
        self.version().wrapping_add(self.gradients.load(Relaxed))
    }

    /// Errors: [`Error::Argument`] if it was updated since version `seen`: derivatives would mix two models.
    pub fn check_version(&self, seen: u64, op: &'static str) -> Result<()> {
        if self.version() == seen {
            return Ok(());
        }
        Err(Error::argument(
            op,
            &self.name,
            "weights as they were in the forward pass",
            "weights that an optimizer or a load has changed since; run backward, or read the loss, before the update",
        ))
    }

    /// A parameter of its own with the same value, low-rank parts, gradient and flag. Its version begins anew. A value that
    /// does not train is shared until one of the two is written.
    pub fn copy(&self) -> Self {
        let value = self.read();
        let gradient = self.gradient.lock().expect("nothing panics while a gradient is read");
        let adapters = self.lock_adapters();
        let parts = adapters.parts.iter().map(LowRank::copy).collect();
        Self {
            name: self.name.clone(),
            rows: self.rows,
            columns: self.columns,
            layout: self.layout,
            value: RwLock::new(if self.trains() { Arc::new(Value::clone(&value)) } else { value.clone() }),
            adapters: RwLock::new(Adapters { parts, former: adapters.former.clone() }),
            gradient: Mutex::new(gradient.clone()),
            trains: AtomicBool::new(self.trains()),
            version: AtomicU64::new(0),
            gradients: AtomicU64::new(0),
        }
    }

    /// Takes value, gradient and low-rank parts of `other`, to the bit. Panics if it has another shape, or parts of other
    /// shapes.
    pub fn copy_from(&self, other: &Self) {
        assert_eq!((self.rows, self.columns, self.layout), (other.rows, other.columns, other.layout), "{}: another shape", self.name);
        {
            let from = other.read();
            let mut value = self.value.write().expect("nothing panics while a parameter is written");
            if !self.trains() {
                *value = from.clone();
            } else if !Arc::ptr_eq(&value, &from) {
                let value = Arc::make_mut(&mut value);
                value.weight.copy_from_slice(&from.weight);
                value.remainder.clone_from(&from.remainder);
            }
        }
        let theirs = other.lock_adapters().clone();
        let ours = {
            let mut adapters = self.adapters.write().expect("nothing panics while adapters change");
            adapters.former = theirs.former;
            adapters.parts.clone()
        };
        assert_eq!(ours.len(), theirs.parts.len(), "{}: other low-rank parts", self.name);
        for (to, from) in ours.iter().zip(theirs.parts.iter()) {
            to.a.copy_from(&from.a);
            to.b.copy_from(&from.b);
        }
        *self.gradient.lock().expect("nothing panics while a gradient is written") =
            other.gradient.lock().expect("nothing panics while a gradient is read").clone();
        self.version.fetch_add(1, Relaxed);
    }

    fn lock_adapters(&self) -> RwLockReadGuard<'_, Adapters<E>> {
        self.adapters.read().expect("nothing panics while adapters change")
    }

    /// The low-rank parts that products add to this weight; none while they are merged.
    pub fn adapters(&self) -> Arc<[LowRank<E>]> {
        let adapters = self.lock_adapters();
        if adapters.former.is_some() { Arc::new([]) } else { adapters.parts.clone() }
    }

    /// The low-rank parts, merged or not.
    pub fn all_adapters(&self) -> Arc<[LowRank<E>]> {
        self.lock_adapters().parts.clone()
    }

    /// Gives the weight low-rank parts in place of those it has. Panics for parts that do not fit, and while parts are merged.
    pub fn set_adapters(&self, parts: Vec<LowRank<E>>) {
        for part in &parts {
            let (rank, b) = (part.rank(), (part.b.rows(), part.b.columns()));
            assert!(part.rows.end <= self.rows && part.a.columns() == self.columns, "{}: rows or inputs of a low-rank part", self.name);
            assert_eq!(b, (part.rows.len(), rank), "{}: the second factor of a low-rank part", self.name);
        }
        let mut adapters = self.adapters.write().expect("nothing panics while adapters change");
        assert!(adapters.former.is_none(), "{}: low-rank parts are merged", self.name);
        adapters.parts = parts.into();
        self.version.fetch_add(1, Relaxed);
    }

    /// Whether this weight or a factor of its low-rank parts trains.
    pub fn learns(&self) -> bool {
        self.trains() || self.adapters().iter().any(|part| part.a.trains() || part.b.trains())
    }

    /// Whether the low-rank parts are merged.
    pub fn is_merged(&self) -> bool {
        self.lock_adapters().former.is_some()
    }

    /// Adds the low-rank parts to the weight, in f32, and sets them aside; the weight as it was is kept for
    /// [`Parameter::unmerge`]. Nothing happens without parts, or if they are merged.
    pub fn merge(&self) {
        if self.adapters().is_empty() {
            return;
        }
        let former = self.read().clone();
        let mut merged = Value::clone(&former);
        for rows in self.row_blocks() {
            let mut values = Buffer::scratch(rows.len() * self.columns);
            self.read_adapted_rows(rows.clone(), &mut values);
            self.write_value(&mut merged, rows, &values, false);
        }
        *self.value.write().expect("nothing panics while a parameter is written") = Arc::new(merged);
        self.adapters.write().expect("nothing panics while adapters change").former = Some(former);
        self.version.fetch_add(1, Relaxed);
    }

    /// Puts back, to the bit, the weight that [`Parameter::merge`] changed, and its low-rank parts.
    pub fn unmerge(&self) {
        if let Some(former) = self.adapters.write().expect("nothing panics while adapters change").former.take() {
            *self.value.write().expect("nothing panics while a parameter is written") = former;
            self.version.fetch_add(1, Relaxed);
        }
    }

    /// As [`Parameter::read_rows`], with the low-rank parts added in f32.
    pub fn read_adapted_rows(&self, rows: Range<usize>, values: &mut [f32]) {
        self.read_rows(rows.clone(), values);
        self.adapters().iter().for_each(|part| part.add_to_rows(&rows, values));
    }

    /// Takes what training keeps beside the weight, in the layout of the weight and of the gradient. Panics if it has another
    /// length.
    pub fn set_training_state(&self, remainder: Option<Vec<i16>>, gradient: Option<Buffer<f32>>) {
        let mut guard = self.value.write().expect("nothing panics while a parameter is written");
        assert!(remainder.as_ref().is_none_or(|remainder| remainder.len() == guard.weight.len()), "{}: remainder", self.name);
        assert!(gradient.as_ref().is_none_or(|gradient| gradient.len() == self.gradient_len()), "{}: gradient", self.name);
        // A frozen weight has neither: it stays shared, and as it was.
        if remainder.is_some() || guard.remainder.is_some() {
            Arc::make_mut(&mut guard).remainder = remainder;
            self.version.fetch_add(1, Relaxed);
        }
        *self.gradient.lock().expect("nothing panics while a gradient is written") = gradient;
        self.gradients.fetch_add(1, Relaxed);
    }

    /// Copies `rows` of the value to `values` `[rows, columns]`, row-major, as f32: master weights where they exist.
    pub fn read_rows(&self, rows: Range<usize>, values: &mut [f32]) {
        let value = self.read();
        if let Some(int8) = &value.int8 {
            let rows = rows.zip(values.chunks_exact_mut(self.columns.max(1)));
            return rows.for_each(|(row, out)| int8::read_row(self.int8_weight(int8), row, out));
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
    }

    /// Copies `rows` of the weight itself, row-major: what products read, not the f32 master beside it.
    pub fn read_weight_rows(&self, rows: Range<usize>, values: &mut [E]) {
        if self.layout == Layout::Int8 {
            let mut wide = Buffer::<f32>::scratch(values.len());
            self.read_rows(rows, &mut wide);
            return values.iter_mut().zip(wide.iter()).for_each(|(to, from)| *to = E::from_f32(*from));
        }
        self.unpack(&self.read().weight, rows, values);
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
    pub fn write_rows(&self, rows: Range<usize>, values: &[f32], split_master: bool) {
        let mut guard = self.value.write().expect("nothing panics while a parameter is written");
        self.write_value(Arc::make_mut(&mut guard), rows, values, split_master);
        self.version.fetch_add(1, Relaxed);
    }

    fn write_value(&self, value: &mut Value<E>, rows: Range<usize>, values: &[f32], split_master: bool) {
        assert_eq!(values.len(), rows.len() * self.columns, "{}: values of rows {rows:?}", self.name);
        if let Some(int8) = &mut value.int8 {
            let Int8 { values: integers, scales, sums } = int8;
            return int8::pack(Int8WeightMut { values: integers, scales, sums, inputs: self.columns }, rows, values);
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
    }

    /// `this = (1 - weight) * this + weight * other`, in f32 from masters where they exist; a bf16 weight has one afterwards.
    /// Panics if `other` has another shape or layout.
    pub fn average(&self, other: &Self, weight: f64) {
        assert_eq!((self.rows, self.columns, self.layout), (other.rows, other.columns, other.layout), "{}: another shape", self.name);
        let from = other.read().clone();
        let mut guard = self.value.write().expect("nothing panics while a parameter is written");
        let to = Arc::make_mut(&mut guard);
        let len = to.weight.len();
        if E::HAS_REMAINDER {
            to.remainder.get_or_insert_with(|| vec![0; len]);
        }
        for start in (0..len).step_by(BLOCK_VALUES) {
            let range = start..(start + BLOCK_VALUES).min(len);
            let (mut ours, mut theirs) = (Buffer::<f32>::scratch(range.len()), Buffer::<f32>::scratch(range.len()));
            to.read_masters(range.clone(), &mut ours);
            from.read_masters(range.clone(), &mut theirs);
            norm::blend(&mut ours, &theirs, weight);
            match &mut to.remainder {
                None => E::split_master(&ours, &mut to.weight[range], &mut []),
                Some(remainder) => {
                    E::split_master(&ours, &mut to.weight[range.clone()], E::remainder_as_elements_mut(&mut remainder[range]));
                }
            }
        }
        self.version.fetch_add(1, Relaxed);
    }

    /// Copies `rows` of the gradient, row-major; none if there is no gradient.
    pub fn gradient_rows(&self, rows: Range<usize>) -> Option<Buffer<f32>> {
        let guard = self.gradient.lock().expect("nothing panics while a gradient is written");
        let gradient = guard.as_ref()?;
        let mut values = Buffer::scratch(rows.len() * self.columns);
        match self.layout {
            Layout::Rows => values.copy_from_slice(&gradient[rows.start * self.columns..rows.end * self.columns]),
            Layout::Panels | Layout::Int8 => panels::unpack(gradient, self.rows, self.columns, rows, &mut values),
        }
        Some(values)
    }

    /// Bytes of weight, remainder and gradient.
    pub fn state_bytes(&self) -> usize {
        let value = self.read();
        let gradient = self.with_gradient(|gradient| gradient.map_or(0, <[f32]>::len));
        let int8 = value.int8.as_ref().map_or(0, |int8| int8.values.len() + 8 * int8.scales.len());
        int8 + value.weight.len() * size_of::<E>() + value.remainder.as_ref().map_or(0, Vec::len) * 2 + gradient * 4
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
            Some(sum) => write(sum, true),
            None => {
                let mut sum = Buffer::scratch(self.gradient_len());
                write(&mut sum, false);
                *guard = Some(sum);
            }
        }
    }

    /// Reads the gradient, if there is one.
    pub fn with_gradient<T>(&self, read: impl FnOnce(Option<&[f32]>) -> T) -> T {
        read(self.gradient.lock().expect("nothing panics while a gradient is read").as_deref())
    }

    /// Forgets the gradient.
    pub fn clear_gradient(&self) {
        *self.gradient.lock().expect("nothing panics while a gradient is dropped") = None;
        self.gradients.fetch_add(1, Relaxed);
    }

    /// Lets `write` change the value, given the gradient, which is gone afterwards; skipped without a gradient.
    pub fn update(&self, write: impl FnOnce(&mut Value<E>, &[f32])) {
        let gradient = self.gradient.lock().expect("nothing panics while a gradient is read").take();
        if let Some(gradient) = gradient {
            write(Arc::make_mut(&mut self.value.write().expect("nothing panics while a parameter is written")), &gradient);
            self.version.fetch_add(1, Relaxed);
        }
    }
}
