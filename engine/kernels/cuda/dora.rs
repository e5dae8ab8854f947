//! Launchers of dora.cu: lengths of the rows of adapted weights, and the scaling of products to lengths that are learnt. The CPU's
//! are in tensor/dora.rs. Weights lie in rows; of `groups` experts one after the other.

use super::device::Device;
use super::graph::refuse_capture;
use super::launch::Launch;
use super::memory::{View, ViewMut};
use super::product::Groups;
use super::program::{Program, Variant};
use crate::error::Result;
use crate::kernels::element::{Dtype, Float};
use std::ops::Range;

/// Threads of a block, and rows whose lengths it computes.
const THREADS: usize = 256;
const ROWS: usize = 8;

/// Which rows of each weight a low-rank part belongs to.
#[derive(Clone, Debug)]
pub struct Part {
    pub groups: usize,
    /// Rows of each weight.
    pub width: usize,
    pub rows: Range<usize>,
}

impl Part {
    /// Rows of all groups.
    fn check(&self, op: &str) -> usize {
        assert!(self.groups > 0 && self.rows.start < self.rows.end && self.rows.end <= self.width, "{op}: {self:?}");
        self.groups * self.rows.len()
    }
}

/// Values, and what completes those of bf16 to their f32 masters.
#[derive(Clone, Copy)]
pub struct Master<'a, E: Float> {
    pub values: View<'a, E>,
    pub rest: Option<View<'a, i16>>,
}

impl<E: Float> Master<'_, E> {
    fn check(&self, op: &str, len: usize) {
        assert!(self.values.len() == len, "{op}: {} values for {len}", self.values.len());
        assert!(self.rest.is_none_or(|rest| rest.len() == len), "{op}: remainders of {len} values");
    }
}

fn launch<'d, E: Float, O: Float>(device: &'d Device, name: &'static str) -> Result<Launch<'d>> {
    assert!(O::DTYPE == E::DTYPE || O::DTYPE == Dtype::F32, "{name}: results in the type of the weights or in f32");
    Launch::new(device, name, Variant::of::<E>(Program::Dora).with("OUT_F32", u32::from(O::DTYPE == Dtype::F32)), name)
}

/// `norms = |W + scale * B A|` of each of the part's rows, in f32 from the masters, squares in f64.
///
/// - `weight`: `[groups, width, inputs]`; `a`: `[groups, rank, inputs]`; `b`: `[groups, rows, rank]`; `norms`: `[groups, rows]`
///
/// Errors: those of the device; while a graph is captured, which would compute the lengths that are kept at each launch.
pub fn row_norms<E: Float>(
    device: &Device,
    part: &Part,
    weight: Master<E>,
    a: Master<E>,
    b: Master<E>,
    scale: f32,
    mut norms: ViewMut<f32>,
) -> Result<()> {
    let op = "row_norms";
    refuse_capture(device, op, "computing lengths of rows")?;
    let count = part.check(op);
    assert!(norms.len() == count && b.values.len().is_multiple_of(count), "{op}: {} norms of {count} rows", norms.len());
    let rank = b.values.len() / count;
    assert!(rank > 0 && a.values.len().is_multiple_of(part.groups * rank), "{op}: factors of rank {rank}");
    let inputs = a.values.len() / (part.groups * rank);
    weight.check(op, part.groups * part.width * inputs);
    a.check(op, part.groups * rank * inputs);
    b.check(op, count * rank);
    let launch = launch::<E, E>(device, op)?.read(weight.values).read_or_null(weight.rest).read(a.values).read_or_null(a.rest);
    let launch = launch.read(b.values).read_or_null(b.rest).write(&mut norms);
    let launch = launch.int(part.width).int(part.rows.start).int(part.rows.len()).int(rank).int(inputs).float(scale);
    // SAFETY: the arguments are row_norms's, with the sizes that were checked above. Blocks cut their rows at the part's and threads
    // their columns at the inputs.
    unsafe { launch.run((part.rows.len().div_ceil(ROWS), part.groups, 1), THREADS, 0) }
}

/// What each column of a product is multiplied by: `lengths / norms` for the part's, and with `fresh` 1 for all others, which keep
/// theirs without.
///
/// - `lengths`, `norms`: `[groups, rows]`; `gains`: `[groups, width]`
pub fn gains<E: Float>(
    device: &Device,
    part: &Part,
    lengths: Master<E>,
    norms: View<f32>,
    mut gains: ViewMut<f32>,
    fresh: bool,
) -> Result<()> {
    let op = "gains";
    let count = part.check(op);
    lengths.check(op, count);
    assert!(norms.len() == count && gains.len() == part.groups * part.width, "{op}: {} norms, {} gains", norms.len(), gains.len());
    let launch = launch::<E, E>(device, op)?.read(lengths.values).read_or_null(lengths.rest).read(norms).write(&mut gains);
    let launch = launch.int(part.width).int(part.rows.start).int(part.rows.len()).int(usize::from(fresh));
    // SAFETY: the arguments are gains's, with the sizes that were checked above. A thread stays in its column, cut at the width.
    unsafe { launch.run((part.width.div_ceil(THREADS), part.groups, 1), THREADS, 0) }
}

/// Rows of `gains`, and those of what is scaled.
fn check_rows(op: &str, gains: usize, len: usize, groups: Option<Groups>) -> (usize, usize, usize) {
    let count = groups.map_or(1, |groups| groups.count());
    assert!(gains > 0 && gains.is_multiple_of(count), "{op}: {gains} gains of {count} groups");
    let width = gains / count;
    assert!(len.is_multiple_of(width), "{op}: {len} values in rows of {width}");
    (len / width, width, count)
}

/// `y = gains * sums (+ bias) (+ residual)`, in f32, rounded once.
///
/// - `sums`: `[rows, width]`; `gains`: `[groups, width]`; `bias`: `[width]`; `residual`, `y`: `[rows, width]`
pub fn scale_sums<E: Float, O: Float>(
    device: &Device,
    sums: View<f32>,
    gains: View<f32>,
    bias: Option<View<E>>,
    residual: Option<View<O>>,
    mut y: ViewMut<O>,
    groups: Option<Groups>,
) -> Result<()> {
    let op = "scale_sums";
    let (rows, width, count) = check_rows(op, gains.len(), y.len(), groups);
    assert!(sums.len() == y.len() && residual.is_none_or(|residual| residual.len() == y.len()), "{op}: {} sums", sums.len());
    assert!(bias.is_none_or(|bias| bias.len() == width && count == 1), "{op}: a bias of {width}");
    if rows == 0 {
        return Ok(());
    }
    let launch = launch::<E, O>(device, op)?.read(sums).read(gains).read_or_null(bias).read_or_null(residual).write(&mut y);
    let launch = launch.int(width).read_or_null(groups.map(|groups| groups.offsets)).int(count);
    // SAFETY: the arguments are scale_sums's, with the sizes that were checked above. A block stays in its row.
    unsafe { launch.run((rows, 1, 1), THREADS, 0) }
}

/// The backward pass of [`scale_sums`]: `d_sums = gains * dy`, and `products = sums * dy`, whose column sums are the gradients of gains.
///
/// - `dy`, `d_sums`: `[rows, width]`; `gains`: `[groups, width]`; `sums`, `products`: `[rows, width]`, if they are wanted
pub fn scale_back<E: Float>(
    device: &Device,
    dy: View<E>,
    gains: View<f32>,
    mut d_sums: ViewMut<E>,
    products: Option<(View<E>, ViewMut<f32>)>,
    groups: Option<Groups>,
) -> Result<()> {
    let op = "scale_back";
    let (rows, width, count) = check_rows(op, gains.len(), dy.len(), groups);
    assert!(d_sums.len() == dy.len(), "{op}: {} values for {}", d_sums.len(), dy.len());
    let (sums, mut products) = products.unzip();
    assert!(sums.is_none_or(|sums| sums.len() == dy.len()), "{op}: sums of {} values", dy.len());
    assert!(products.as_ref().is_none_or(|products| products.len() == dy.len()), "{op}: products of {} values", dy.len());
    if rows == 0 {
        return Ok(());
    }
    let launch = launch::<E, E>(device, op)?.read(dy).read(gains).read_or_null(sums).write(&mut d_sums).write_or_null(products.as_mut());
    let launch = launch.int(width).read_or_null(groups.map(|groups| groups.offsets)).int(count);
    // SAFETY: the arguments are scale_back's, with the sizes that were checked above. A block stays in its row.
    unsafe { launch.run((rows, 1, 1), THREADS, 0) }
}

/// `gradient (+)= sums / norms` of the part's rows: that of lengths which the gains' gradients `sums` give.
///
/// - `sums`: `[groups, width]`; `norms`, `gradient`: `[groups, rows]`
pub fn length_gradient(
    device: &Device,
    part: &Part,
    sums: View<f32>,
    norms: View<f32>,
    mut gradient: ViewMut<f32>,
    add: bool,
) -> Result<()> {
    let op = "length_gradient";
    let count = part.check(op);
    assert!(sums.len() == part.groups * part.width, "{op}: {} sums", sums.len());
    assert!(norms.len() == count && gradient.len() == count, "{op}: {} norms, {} gradients", norms.len(), gradient.len());
    let launch = launch::<f32, f32>(device, op)?.read(sums).read(norms).write(&mut gradient);
    let launch = launch.int(part.width).int(part.rows.start).int(part.rows.len()).int(usize::from(add));
    // SAFETY: the arguments are length_gradient's, with the sizes that were checked above. A thread is a row, cut at the part's.
    unsafe { launch.run((part.rows.len().div_ceil(THREADS), part.groups, 1), THREADS, 0) }
}
