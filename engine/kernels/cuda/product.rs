//! Launchers of product.cu, its forms for few rows and for Hopper, and product_plain.cu: the products of linear layers and of
//! groups of experts. Weights lie in rows: `W` is `[outputs, inputs]`, as files have it.
//!
//! Batch invariance: an element is one chain along its reduction in steps of 16 (bf16) or 1 (f32), and the tile, which does
//! depend on the number of rows, does not change it. Nor does the instruction: on an H200 Hopper's wgmma, which takes more than
//! 128 rows, gave the bits of mma.sync, which takes fewer, and `tests/gpu` holds that wherever it meets a Hopper. A library's
//! product would promise neither.

use super::device::Device;
use super::launch::Launch;
use super::memory::{View, ViewMut};
use super::product_few::{self, Form};
use super::program::{Program, Variant};
use super::tensor_map::{Matrices, TensorMap};
use crate::error::Result;
use crate::kernels::element::{Dtype, Float};

/// Rows and columns of a tile of product_narrow.cu.
const NARROW_ROWS: usize = 8;
const NARROW_COLUMNS: usize = 8;

/// Most rows for which there is nothing to gain from product_hopper.cu.
const FEW_ROWS: usize = 128;

/// Rows and columns of a tile of product_hopper.cu, and bytes of shared memory for its stages.
const HOPPER_ROWS: usize = 128;
const HOPPER_COLUMNS: [usize; 5] = [256, 224, 192, 128, 64];
const HOPPER_SHARED: usize = 224 * 1024;

/// Steps of the sum, or rows, of a line of a tile in shared memory.
const LINE: usize = 64;

/// Most such tiles for each multiprocessor, which holds three at a time. Of more columns wider tiles read rows less often.
const NARROW_TILES: usize = 5;

/// Grouped rows: those of group `g` are `offsets[g]..offsets[g + 1]`.
#[derive(Clone, Copy)]
pub struct Groups<'a> {
    /// `[groups + 1]`, on the device: the host need not know how many rows a group has.
    pub offsets: View<'a, i32>,
}

impl Groups<'_> {
    pub fn count(&self) -> usize {
        assert!(self.offsets.len() > 1, "groups: offsets of {} values", self.offsets.len());
        self.offsets.len() - 1
    }
}

/// What a product is of, in the words of product.cu.
struct Product<'a, E: Float> {
    op: &'static str,
    a: View<'a, E>,
    b: View<'a, E>,
    bias: Option<View<'a, E>>,
    /// Rows, columns and length of the sums; with groups, the most that a group has.
    rows: usize,
    columns: usize,
    depth: usize,
    a_strided: bool,
    b_strided: bool,
    /// 0, or how groups.offsets is meant.
    grouped: u32,
    groups: Option<Groups<'a>>,
    b_group: usize,
    out_group: usize,
}

impl<E: Float> Product<'_, E> {
    /// Elements from one row of an operand to the next in memory.
    fn strides(&self) -> (usize, usize) {
        let stride = |strided: bool, across: usize| if strided { across } else { self.depth };
        (stride(self.a_strided, self.rows), stride(self.b_strided, self.columns))
    }

    fn variant(&self, program: Program, out: Dtype, tile: Option<(usize, usize)>) -> Variant {
        let variant = Variant::of::<E>(program)
            .with("A_STRIDED", u32::from(self.a_strided))
            .with("B_STRIDED", u32::from(self.b_strided))
            .with("GROUPED", self.grouped);
        let Some((rows, columns)) = tile else { return variant };
        variant.with("OUT_F32", u32::from(out == Dtype::F32)).with("TILE_ROWS", rows as u32).with("TILE_COLUMNS", columns as u32)
    }

    /// Queues it, in the form for its number of rows.
    fn run<O: Float>(self, device: &Device, out: ViewMut<O>, residual: Residual<O>) -> Result<()> {
        if out.is_empty() {
            return Ok(());
        }
        let wide = E::DTYPE == Dtype::Bf16;
        assert!(wide || O::DTYPE == Dtype::F32, "{}: products of f32 are f32", self.op);
        if wide && self.rows > FEW_ROWS && device.capability == (9, 0) {
            let (a, b) = self.matrices();
            if a.are_aligned(self.a.cast()) && b.are_aligned(self.b.cast()) {
                return self.run_hopper(device, out, residual);
            }
        }
        self.run_tiles(device, out, residual)
    }

    /// The operands as they lie in memory.
    fn matrices(&self) -> (Matrices, Matrices) {
        let groups = if self.grouped == 1 { self.b.len() / self.b_group } else { 1 };
        let of = |strided: bool, across: usize, count: usize| match strided {
            true => Matrices { count, rows: self.depth, columns: across },
            false => Matrices { count, rows: across, columns: self.depth },
        };
        (of(self.a_strided, self.rows, 1), of(self.b_strided, self.columns, groups))
    }

    /// product_hopper.cu: one block a multiprocessor.
    fn run_hopper<O: Float>(self, device: &Device, mut out: ViewMut<O>, residual: Residual<O>) -> Result<()> {
        let columns = hopper_columns((self.rows, self.columns, self.depth), self.b_strided, device.multiprocessors);
        // Strided, rows come in blocks of 64.
        let stage = (HOPPER_ROWS + if self.b_strided { columns.next_multiple_of(LINE) } else { columns }) * LINE * 2;
        let stages = HOPPER_SHARED / stage;
        let variant = self.variant(Program::ProductHopper, O::DTYPE, Some((HOPPER_ROWS, columns)));
        let (a, b) = self.matrices();
        // Of a strided operand blocks of 64 rows are copied one by one.
        let tile = |strided: bool, rows: usize| if strided { LINE } else { rows };
        let a = TensorMap::new(device, self.op, self.a.cast(), a, tile(self.a_strided, HOPPER_ROWS))?;
        let b = TensorMap::new(device, self.op, self.b.cast(), b, tile(self.b_strided, columns))?;
        let launch = Launch::new(device, self.op, variant, "product")?.waiting().map(&a).map(&b).write(&mut out);
        let launch = residual.push(self.op, launch, &out).read_or_null(self.bias).int(self.rows).int(self.columns).int(self.depth);
        let groups = self.groups.map_or(1, |groups| groups.count());
        let launch = launch.read_or_null(self.groups.map(|groups| groups.offsets)).int(groups).long(self.out_group);
        let tiles =
            (self.rows.div_ceil(HOPPER_ROWS) + groups - 1) * self.columns.div_ceil(columns) * if self.grouped == 2 { groups } else { 1 };
        // SAFETY: the arguments are product's of product_hopper.cu, and the public functions below have checked sizes as `run_tiles`
        // says. Bulk copies read nothing beyond the matrices. A block takes tiles until there are none, however many blocks there are.
        unsafe { launch.run((tiles.min(device.multiprocessors), 1, 1), 384, stages * (stage + 16)) }
    }

    /// product.cu, product_narrow.cu or product_plain.cu: a block a tile.
    fn run_tiles<O: Float>(self, device: &Device, mut out: ViewMut<O>, residual: Residual<O>) -> Result<()> {
        let wide = E::DTYPE == Dtype::Bf16;
        let stage = |rows: usize, columns: usize| (rows + columns) * LINE * 2;
        // A strided operand of few rows takes the room of 64.
        let few = if self.a_strided || self.b_strided { 64 } else { 16 };
        let narrow = !self.a_strided
            && !self.b_strided
            && self.grouped == 0
            && self.columns.div_ceil(NARROW_COLUMNS) <= NARROW_TILES * device.multiprocessors;
        // (program, rows and columns of a tile, threads, shared bytes)
        let (program, tile_rows, tile_columns, threads, shared) = match (wide, self.rows) {
            (false, _) => (Program::ProductPlain, 64, 64, 256, 0),
            (true, ..=NARROW_ROWS) if narrow => (Program::ProductNarrow, NARROW_ROWS, NARROW_COLUMNS, 128, 8 * 16 * 256 * 2 + 16),
            // Narrow tiles where wide ones would leave multiprocessors without one.
            (true, ..=16) if self.columns.div_ceil(64) < device.multiprocessors => {
                (Program::Product, 16, 32, 64, 8 * stage(few, few.max(32)))
            }
            (true, ..=16) => (Program::Product, 16, 64, 128, 6 * stage(few, 64)),
            (true, ..=256) => (Program::Product, 64, 64, 128, 4 * stage(64, 64)),
            (true, _) => (Program::Product, 128, 128, 128, 3 * stage(128, 128)),
        };
        let variant = self.variant(program, O::DTYPE, wide.then_some((tile_rows, tile_columns)));
        let launch = Launch::new(device, self.op, variant, "product")?.waiting().read(self.a).read(self.b).write(&mut out);
        let launch = residual.push(self.op, launch, &out).read_or_null(self.bias).int(self.rows).int(self.columns).int(self.depth);
        let (a_stride, b_stride) = self.strides();
        let launch = launch.long(a_stride).long(b_stride).read_or_null(self.groups.map(|groups| groups.offsets));
        let launch = launch.long(self.b_group).long(self.out_group);
        let tiles = self.rows.div_ceil(tile_rows) * self.columns.div_ceil(tile_columns);
        let layers = self.groups.map_or(1, |groups| groups.count());
        // SAFETY: the arguments are product's. The public functions below have checked that a, b, bias, out and residual have
        // rows x depth, columns x depth, columns and rows x columns elements for each group; blocks beyond the tiles return,
        // and the kernel cuts its tiles at those sizes. The residual may be `out`: a thread reads an element, then writes it.
        unsafe { launch.run((tiles, 1, layers), threads, shared) }
    }
}

/// Columns of a tile of product_hopper.cu: those with which the slowest multiprocessor has least to do. Wider tiles fetch less for a
/// product, narrow ones leave fewer idle. The times, of no unit, are fitted to an H100's.
fn hopper_columns((rows, columns, depth): (usize, usize, usize), strided: bool, multiprocessors: usize) -> usize {
    let cost = |width: usize| {
        let tiles = rows.div_ceil(HOPPER_ROWS) * columns.div_ceil(width);
        // Strided columns are fetched in blocks of 64.
        let fetched = if strided { width.next_multiple_of(LINE) } else { width };
        tiles.div_ceil(multiprocessors) * (depth.div_ceil(LINE) * 3 * (200 + fetched) + 8 * fetched + 1000)
    };
    HOPPER_COLUMNS.into_iter().min_by_key(|width| cost(*width)).expect("there are widths")
}

/// What is added to a product, in f32 before it is rounded.
pub enum Residual<'a, O: Float> {
    None,
    /// What the output holds: `+=`.
    Own,
    /// Something of the output's size.
    Other(View<'a, O>),
}

impl<O: Float> Residual<'_, O> {
    /// The argument of a launch that writes `out`.
    fn push<'l>(self, op: &str, launch: Launch<'l>, out: &ViewMut<O>) -> Launch<'l> {
        match self {
            Self::None => launch.read_or_null::<O>(None),
            Self::Own => launch.read(out.view()),
            Self::Other(view) => {
                assert!(view.len() == out.len(), "{op}: a residual of {} for {}", view.len(), out.len());
                launch.read(view)
            }
        }
    }
}

/// A weight `[outputs, inputs]` in rows, or one for each group, one after the other.
#[derive(Clone, Copy)]
pub struct Weight<'a, E: Float> {
    pub values: View<'a, E>,
    pub outputs: usize,
    pub inputs: usize,
}

impl<E: Float> Weight<'_, E> {
    fn check(&self, op: &str, groups: usize) -> usize {
        assert!(self.outputs > 0 && self.inputs > 0, "{op}: a weight of [{}, {}]", self.outputs, self.inputs);
        let len = self.outputs * self.inputs;
        assert!(
            self.values.len() == groups * len,
            "{op}: {} values for {groups} weights [{}, {}]",
            self.values.len(),
            self.outputs,
            self.inputs
        );
        len
    }
}

/// `y = x W^T + bias + residual`, in f32, rounded once.
///
/// - `y`: `[m, outputs]`, E or f32; `x`: `[m, inputs]`; `bias`: `[outputs]`, one for each group if there are groups
/// - `groups`: rows of each group use its own weight
pub fn forward<E: Float, O: Float>(
    device: &Device,
    y: ViewMut<O>,
    x: View<E>,
    weight: Weight<E>,
    bias: Option<View<E>>,
    residual: Residual<O>,
    groups: Option<Groups>,
) -> Result<()> {
    let op = "linear";
    let count = groups.map_or(1, |groups| groups.count());
    let len = weight.check(op, count);
    let Weight { values, outputs, inputs } = weight;
    assert!(y.len().is_multiple_of(outputs), "{op}: y has {} values, rows of {outputs}", y.len());
    let rows = y.len() / outputs;
    assert!(x.len() == rows * inputs, "{op}: x has {} values for [{rows}, {inputs}]", x.len());
    assert!(bias.is_none_or(|bias| bias.len() == count * outputs), "{op}: a bias of {outputs}");
    if groups.is_none() && Form::PLAIN.fits(device, rows, x, &weight) {
        return product_few::forward(device, Form::PLAIN, y, x, None, weight, bias, residual);
    }
    let product = Product {
        op,
        a: x,
        b: values,
        bias,
        rows,
        columns: outputs,
        depth: inputs,
        a_strided: false,
        b_strided: false,
        grouped: u32::from(groups.is_some()),
        groups,
        b_group: len,
        out_group: 0,
    };
    product.run(device, y, residual)
}

/// `dx = dy W`, or `dx += dy W`: the gradient of the layer's input.
///
/// - `dx`: `[m, inputs]`, E or f32; `dy`: `[m, outputs]`
pub fn input_gradient<E: Float, O: Float>(
    device: &Device,
    dx: ViewMut<O>,
    dy: View<E>,
    weight: Weight<E>,
    add: bool,
    groups: Option<Groups>,
) -> Result<()> {
    let op = "linear_backward";
    let len = weight.check(op, groups.map_or(1, |groups| groups.count()));
    let Weight { values, outputs, inputs } = weight;
    assert!(dx.len().is_multiple_of(inputs), "{op}: dx has {} values, rows of {inputs}", dx.len());
    let rows = dx.len() / inputs;
    assert!(dy.len() == rows * outputs, "{op}: dy has {} values for [{rows}, {outputs}]", dy.len());
    let product = Product {
        op,
        a: dy,
        b: values,
        bias: None,
        rows,
        columns: inputs,
        depth: outputs,
        a_strided: false,
        b_strided: true,
        grouped: u32::from(groups.is_some()),
        groups,
        b_group: len,
        out_group: 0,
    };
    product.run(device, dx, if add { Residual::Own } else { Residual::None })
}

/// `dW = dy^T x`, or `dW += dy^T x`, in f32: the gradient of the weight, tokens in their order.
///
/// - `dw`: `[outputs, inputs]`, f32, one for each group; `dy`: `[m, outputs]`; `x`: `[m, inputs]`
/// - `groups`: the weight of a group sums over its rows
pub fn weight_gradient<E: Float>(
    device: &Device,
    dw: ViewMut<f32>,
    dy: View<E>,
    x: View<E>,
    (outputs, inputs): (usize, usize),
    add: bool,
    groups: Option<Groups>,
) -> Result<()> {
    let op = "linear_backward";
    let count = groups.map_or(1, |groups| groups.count());
    assert!(dw.len() == count * outputs * inputs, "{op}: dw has {} values for {count} of [{outputs}, {inputs}]", dw.len());
    assert!(dy.len().is_multiple_of(outputs), "{op}: dy has {} values, rows of {outputs}", dy.len());
    let depth = dy.len() / outputs;
    assert!(x.len() == depth * inputs, "{op}: x has {} values for [{depth}, {inputs}]", x.len());
    let product = Product {
        op,
        a: dy,
        b: x,
        bias: None,
        rows: outputs,
        columns: inputs,
        depth,
        a_strided: true,
        b_strided: true,
        grouped: if groups.is_some() { 2 } else { 0 },
        groups,
        b_group: 0,
        out_group: outputs * inputs,
    };
    product.run(device, dw, if add { Residual::Own } else { Residual::None })
}
