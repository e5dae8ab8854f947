//! Launcher of product_few.cu: products of up to 8 rows whose weights fit the shared memory of all multiprocessors together, or nearly, so
//! that all of a weight is asked for at once by bulk copies, from Hopper on. Rows may be normalised on their way, and gates meet what they
//! gate. Decoding has such products; bits are those of product.rs, rms_norm.rs and swiglu.rs one after the other.

use super::device::Device;
use super::launch::Launch;
use super::memory::{View, ViewMut};
use super::product::{Residual, Weight};
use super::program::{Program, Variant};
use super::rms_norm;
use crate::error::Result;
use crate::kernels::element::{Dtype, Float};

/// Most rows.
pub const ROWS_MAX: usize = 8;

/// Columns of a warp that multiplies.
const COLUMNS: usize = 8;

/// Elements of a line that one barrier is for.
const SLAB: usize = 512;

/// Most blocks for each multiprocessor where a block reads the rows for 8 columns only: of more columns wider tiles read rows less often.
const BLOCKS_MAX: usize = 5;

/// Threads of a block, and how many of them, and bytes of shared memory, a multiprocessor has on the smallest device that has both
/// (a block takes 1 KiB more than it asks for).
const THREADS: usize = 128;
const RESIDENT_THREADS: usize = 1536;

/// What rows are normalised by before they are multiplied.
#[derive(Clone, Copy)]
pub struct Norm<'a, E: Float> {
    /// `[inputs]`
    pub weight: View<'a, E>,
    pub eps: f32,
}

/// What the kernel does besides multiplying.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Form {
    /// Normalises rows first.
    pub normed: bool,
    /// The weight's first half of rows are gates of the second.
    pub gated: bool,
}

impl Form {
    pub const PLAIN: Self = Self { normed: false, gated: false };
    pub const NORMED: Self = Self { normed: true, gated: false };
    pub const GATED: Self = Self { normed: true, gated: true };

    fn outputs<E: Float>(self, weight: &Weight<E>) -> usize {
        if self.gated { weight.outputs / 2 } else { weight.outputs }
    }

    /// Bytes of shared memory of a block in which so many warps multiply: barriers of slabs, lines of columns and rows.
    fn shared_bytes(self, multipliers: usize, rows: usize, inputs: usize) -> usize {
        let line = inputs.next_multiple_of(128) * 2 + 16;
        let columns = if self.gated { 2 * COLUMNS } else { COLUMNS };
        (inputs.div_ceil(SLAB) * 8).next_multiple_of(16) + (multipliers * columns + rows) * line
    }

    /// Blocks of so many bytes of shared memory that a multiprocessor holds at once.
    fn resident(device: &Device, shared_bytes: usize) -> usize {
        ((device.shared_bytes_max + 1024) / (shared_bytes + 1024)).min(RESIDENT_THREADS / THREADS)
    }

    /// How many warps of a block multiply. Gates have columns enough for two, which then share the rows that a block normalises.
    fn multipliers(self, device: &Device, rows: usize, inputs: usize, outputs: usize) -> usize {
        let shared = self.shared_bytes(2, rows, inputs);
        let fits =
            shared <= device.shared_bytes_max && outputs.div_ceil(2 * COLUMNS) <= Self::resident(device, shared) * device.multiprocessors;
        if self.gated && fits { 2 } else { 1 }
    }

    /// Whether the device has bulk copies, from Hopper on.
    pub fn exists(device: &Device) -> bool {
        device.capability >= (9, 0)
    }

    /// Whether the kernel takes a product of this form.
    pub fn fits<E: Float>(self, device: &Device, rows: usize, x: View<E>, weight: &Weight<E>) -> bool {
        let outputs = self.outputs(weight);
        let whole = weight.inputs.is_multiple_of(8) && weight.outputs.is_multiple_of(if self.gated { 2 } else { 1 });
        let aligned = x.address.is_multiple_of(16) && weight.values.address.is_multiple_of(16);
        if E::DTYPE != Dtype::Bf16 || !(1..=ROWS_MAX).contains(&rows) || !whole || !aligned || !Self::exists(device) {
            return false;
        }
        let (blocks, shared) = (outputs.div_ceil(COLUMNS), self.shared_bytes(1, rows, weight.inputs));
        if shared > device.shared_bytes_max || (!self.gated && blocks > BLOCKS_MAX * device.multiprocessors) {
            return false;
        }
        // Where there are more than one round, several blocks of a multiprocessor take turns at fetching and multiplying.
        let resident = Self::resident(device, shared);
        resident >= 3 || blocks <= resident * device.multiprocessors
    }
}

/// `y = norm(x) W^T + bias + residual`, or `y = silu(gate) * up` of the two halves of `norm(x) W^T`, each half rounded first.
///
/// - `form`: what [`Form::fits`] was asked for; with a norm if it has one, without bias and residual if gated
/// - `y`: `[rows, outputs]`, of half as many outputs if gated; `x`: `[rows, inputs]`; `bias`: `[outputs]`
#[allow(clippy::too_many_arguments, reason = "the operands of one product")]
pub fn forward<E: Float, O: Float>(
    device: &Device,
    form: Form,
    mut y: ViewMut<O>,
    x: View<E>,
    norm: Option<Norm<E>>,
    weight: Weight<E>,
    bias: Option<View<E>>,
    residual: Residual<O>,
) -> Result<()> {
    let (op, outputs, inputs) = ("linear", form.outputs(&weight), weight.inputs);
    let rows = x.len() / inputs;
    assert!(form.fits(device, rows, x, &weight), "{op}: {rows} rows, [{}, {inputs}]", weight.outputs);
    assert!(x.len() == rows * inputs && y.len() == rows * outputs, "{op}: {} and {} values, [{outputs}, {inputs}]", y.len(), x.len());
    assert!(weight.values.len() == weight.outputs * inputs, "{op}: {} values for [{}, {inputs}]", weight.values.len(), weight.outputs);
    assert!(norm.is_some() == form.normed && norm.is_none_or(|norm| norm.weight.len() == inputs), "{op}: a norm of {inputs}");
    assert!(norm.is_none_or(|norm| norm.weight.address.is_multiple_of(16)), "{op}: a norm that begins inside 16 bytes");
    assert!(bias.is_none_or(|bias| !form.gated && bias.len() == outputs), "{op}: a bias of {outputs}");
    assert!(!form.gated || O::DTYPE == Dtype::Bf16, "{op}: gates in f32");
    let multipliers = form.multipliers(device, rows, inputs, outputs);
    let norm_warps = if form.normed { rms_norm::threads(inputs) / 32 } else { 0 };
    let variant = variant(O::DTYPE, norm_warps, form.gated, multipliers);
    let launch = Launch::new(device, op, variant, "product_few")?.fetching().read(x);
    let launch = launch.read_or_null(norm.map(|norm| norm.weight)).float(norm.map_or(0.0, |norm| norm.eps));
    let launch = launch.read(weight.values).write(&mut y);
    let launch = match residual {
        Residual::None => launch.read_or_null::<O>(None),
        Residual::Own => launch.read(y.view()),
        Residual::Other(view) => {
            assert!(view.len() == y.len() && !form.gated, "{op}: a residual of {} for {}", view.len(), y.len());
            launch.read(view)
        }
    };
    let launch = launch.read_or_null(bias).int(rows).int(outputs).int(inputs);
    let shared = form.shared_bytes(multipliers, rows, inputs);
    // SAFETY: the arguments are product_few's. Sizes were looked at above, and the kernel copies and writes no column beyond them; its
    // copies are whole 16 bytes, since rows are. The shared memory holds its lines. The residual may be `y`: a thread reads, then writes it.
    unsafe { launch.run((outputs.div_ceil(COLUMNS * multipliers), 1, 1), THREADS, shared) }
}

fn variant(out: Dtype, norm_warps: usize, gated: bool, multipliers: usize) -> Variant {
    let variant = Variant::new(Program::ProductFew, Dtype::Bf16).with("OUT_F32", u32::from(out == Dtype::F32));
    let variant = variant.with("NORM_WARPS", norm_warps as u32).with("GATED", u32::from(gated));
    variant.with("MULTIPLIERS", multipliers as u32)
}

/// The variants of product_few.cu for hidden widths of 896, 1536 and 3584, for tests that compile all.
pub(super) fn variants() -> impl Iterator<Item = Variant> {
    let normed = [4, 6, 14].into_iter().flat_map(|warps| [(Dtype::Bf16, warps, false, 1), (Dtype::Bf16, warps, true, 1)]);
    let others = [(Dtype::Bf16, 0, false, 1), (Dtype::F32, 0, false, 1), (Dtype::Bf16, 4, true, 2)];
    normed.chain(others).map(|(out, warps, gated, multipliers)| variant(out, warps, gated, multipliers))
}
