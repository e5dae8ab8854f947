//! Generic mathematics on the device: kernels written from an expression when they are first used. Elementwise with
//! broadcasting by strides, elements put where a view names them, reductions along one axis, rows picked along one axis with
//! their gradient, and rows added up by lists. All in f32, without contraction. Expressions are the engine's own, never a user's
//! text, and hold no numbers of a script: each new text is compiled.

use super::device::Device;
use super::launch::{Launch, blocks};
use super::memory::{View, ViewMut};
use super::program::{Program, Variant};
use crate::error::Result;
use crate::kernels::element::Dtype;
use std::fmt::Write as _;
use std::sync::Arc;

/// Most axes of an elementwise operation; adjacent axes that lie alike can be taken together to need fewer.
pub const AXES_MAX: usize = 6;
/// Threads of a block.
const THREADS: usize = 256;

fn variant(text: String) -> Variant {
    Variant::new(Program::Generated(Arc::from(text)), Dtype::F32)
}

/// An input of [`elementwise`]: where it lies, where its first element is, and how far apart they are along each axis: 0 where it
/// is repeated, negative where it runs backwards.
#[derive(Clone, Copy)]
pub struct Input<'a> {
    pub values: View<'a, f32>,
    pub offset: usize,
    pub strides: &'a [isize],
}

/// Asserts that a view of `len` elements stays within them.
fn check_view(op: &str, shape: &[usize], offset: usize, strides: &[isize], len: usize) {
    assert!(strides.len() == shape.len(), "{op}: {} strides for shape {shape:?}", strides.len());
    let reach = |forwards: bool| {
        let steps = shape.iter().zip(strides).filter(|(_, stride)| (**stride > 0) == forwards);
        steps.map(|(size, stride)| (*size as isize - 1) * stride).sum::<isize>()
    };
    let (first, last) = (offset as isize + reach(false), offset as isize + reach(true));
    assert!(first >= 0 && last < len as isize, "{op}: shape {shape:?} with strides {strides:?} from {offset} of {len} values");
}

/// The source of `out[i] = expression(x0[..], x1[..], ...)`.
fn elementwise_source(expression: &str, inputs: usize) -> String {
    let mut text = String::from("#include \"prelude.cuh\"\nextern \"C\" __global__ void elementwise(float* out, i64 count");
    for axis in 0..AXES_MAX {
        let _ = write!(text, ", int size{axis}");
    }
    for input in 0..inputs {
        let _ = write!(text, ", const float* in{input}, i64 offset{input}");
        for axis in 0..AXES_MAX {
            let _ = write!(text, ", int stride{input}_{axis}");
        }
    }
    text += ") {\n    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (i64)gridDim.x * blockDim.x) {\n        i64 left = i;\n";
    for input in 0..inputs {
        let _ = writeln!(text, "        i64 at{input} = offset{input};");
    }
    // The last axis runs fastest.
    for axis in (0..AXES_MAX).rev() {
        let _ = writeln!(text, "        i64 index{axis} = left % size{axis};\n        left /= size{axis};");
        for input in 0..inputs {
            let _ = writeln!(text, "        at{input} += index{axis} * stride{input}_{axis};");
        }
    }
    for input in 0..inputs {
        let _ = writeln!(text, "        float x{input} = in{input}[at{input}];");
    }
    let _ = write!(text, "        out[i] = {expression};\n    }}\n}}\n");
    text
}

/// `out = expression`, element by element, in one launch.
///
/// - `expression`: C++ of `x0`, `x1`, ...; one for each input
/// - `shape`: of `out`, at most [`AXES_MAX`] axes; each input has a stride for each axis
///
/// Errors: [`crate::error::Error::Device`] if the expression does not compile.
pub fn elementwise(
    device: &Device,
    op: &'static str,
    expression: &str,
    shape: &[usize],
    inputs: &[Input],
    mut out: ViewMut<f32>,
) -> Result<()> {
    assert!(shape.len() <= AXES_MAX, "{op}: {} axes, at most {AXES_MAX}", shape.len());
    assert!(out.len() == shape.iter().product::<usize>(), "{op}: {} elements for shape {shape:?}", out.len());
    if out.is_empty() {
        return Ok(());
    }
    let missing = AXES_MAX - shape.len();
    let mut launch = Launch::new(device, op, variant(elementwise_source(expression, inputs.len())), "elementwise")?;
    launch = launch.write(&mut out).long(out.len());
    for axis in 0..AXES_MAX {
        launch = launch.int(if axis < missing { 1 } else { shape[axis - missing] });
    }
    for Input { values, offset, strides } in inputs {
        check_view(op, shape, *offset, strides, values.len());
        launch = launch.read(*values).long(*offset);
        for axis in 0..AXES_MAX {
            launch = launch.signed(if axis < missing { 0 } else { strides[axis - missing] });
        }
    }
    // SAFETY: the arguments are those of the source above; all places that are read lie in each input (asserted).
    unsafe { launch.run((blocks(out.len(), THREADS, 1 << 16), 1, 1), THREADS, 0) }
}

/// The source of `out[view of i] = in[i]`.
fn scatter_source() -> String {
    let mut text =
        String::from("#include \"prelude.cuh\"\nextern \"C\" __global__ void scatter(const float* in, float* out, i64 count, i64 offset");
    for axis in 0..AXES_MAX {
        let _ = write!(text, ", int size{axis}, int stride{axis}");
    }
    text += ") {\n    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (i64)gridDim.x * blockDim.x) {\n        i64 left = i, at = offset;\n";
    for axis in (0..AXES_MAX).rev() {
        let _ = writeln!(text, "        at += left % size{axis} * stride{axis};\n        left /= size{axis};");
    }
    text + "        out[at] = in[i];\n    }\n}\n"
}

/// Writes `from`, row-major of `shape`, to where `out` has those elements: the way back of a view that names none twice. Other
/// elements of `out` keep theirs.
///
/// - `shape`: at most [`AXES_MAX`] axes; `offset`, `strides`: as in [`Input`]
pub fn scatter(
    device: &Device,
    op: &'static str,
    from: View<f32>,
    shape: &[usize],
    offset: usize,
    strides: &[isize],
    mut out: ViewMut<f32>,
) -> Result<()> {
    assert!(shape.len() <= AXES_MAX, "{op}: {} axes, at most {AXES_MAX}", shape.len());
    assert!(from.len() == shape.iter().product::<usize>(), "{op}: {} elements for shape {shape:?}", from.len());
    if from.is_empty() {
        return Ok(());
    }
    check_view(op, shape, offset, strides, out.len());
    let missing = AXES_MAX - shape.len();
    let mut launch = Launch::new(device, op, variant(scatter_source()), "scatter")?;
    launch = launch.read(from).write(&mut out).long(from.len()).long(offset);
    for axis in 0..AXES_MAX {
        let (size, stride) = if axis < missing { (1, 0) } else { (shape[axis - missing], strides[axis - missing]) };
        launch = launch.int(size).signed(stride);
    }
    // SAFETY: the arguments are those of the source above; all places that are written lie in `out` (asserted), one thread each.
    unsafe { launch.run((blocks(from.len(), THREADS, 1 << 16), 1, 1), THREADS, 0) }
}

/// How a reduction goes on and ends; C++ of `sum`, `x` and `count`.
#[derive(Clone, Copy, Debug)]
pub struct Reduction {
    pub start: &'static str,
    /// The next `sum` with one more `x`; also merges two sums, so it must be associative up to rounding.
    pub step: &'static str,
    pub finish: &'static str,
}

impl Reduction {
    pub const SUM: Self = Self { start: "0.0f", step: "sum + x", finish: "sum" };
    pub const MEAN: Self = Self { start: "0.0f", step: "sum + x", finish: "sum / (float)count" };
    /// A NaN wins, as on the CPU.
    pub const MIN: Self = Self { start: "INFINITE", step: "(x < sum || x != x) ? x : sum", finish: "sum" };
    /// As [`Reduction::MIN`].
    pub const MAX: Self = Self { start: "-INFINITE", step: "(x > sum || x != x) ? x : sum", finish: "sum" };
}

/// Lanes sum every 32nd element, then a tree over the lanes: the order depends on the axis alone.
const REDUCE: &str = r#"#include "prelude.cuh"
__device__ __forceinline__ float step(float sum, float x) { return STEP; }
extern "C" __global__ void reduce(const float* from, float* out, i64 outputs, int count, int inner) {
    i64 item = (i64)blockIdx.x * (blockDim.x / 32) + warp_id();
    if (item >= outputs) return;
    from += item / inner * count * inner + item % inner;
    float sum = START;
    for (int i = lane_id(); i < count; i += 32) sum = step(sum, from[(i64)i * inner]);
    for (int by = 16; by > 0; by /= 2) {
        float other = __shfl_xor_sync(~0u, sum, by);
        // Both lanes of a pair merge in one order, so they hold the same bits.
        sum = lane_id() & by ? step(other, sum) : step(sum, other);
    }
    if (lane_id() == 0) out[item] = FINISH;
}
"#;

/// Reduces the middle axis of `[outer, count, inner]` to `[outer, inner]`.
pub fn reduce(
    device: &Device,
    op: &'static str,
    reduction: Reduction,
    from: View<f32>,
    count: usize,
    inner: usize,
    mut out: ViewMut<f32>,
) -> Result<()> {
    assert!(inner > 0 && out.len().is_multiple_of(inner), "{op}: {} sums in rows of {inner}", out.len());
    assert!(from.len() == out.len() * count, "{op}: {} values for {} sums of {count}", from.len(), out.len());
    if out.is_empty() {
        return Ok(());
    }
    let text = REDUCE.replace("START", reduction.start).replace("STEP", reduction.step).replace("FINISH", reduction.finish);
    let launch = Launch::new(device, op, variant(text), "reduce")?;
    let launch = launch.read(from).write(&mut out).long(out.len()).int(count).int(inner);
    // SAFETY: the arguments are reduce's; a warp reads `count` elements of its own output's line and writes that output.
    unsafe { launch.run((out.len().div_ceil(THREADS / 32), 1, 1), THREADS, 0) }
}

const SELECT: &str = r#"#include "prelude.cuh"
extern "C" __global__ void pick(const float* from, const int* index, float* out, i64 total, int count, int axis, int inner) {
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < total; i += (i64)gridDim.x * blockDim.x) {
        i64 outer = i / inner / count;
        int place = index[i / inner % count];
        if (place < 0 || place >= axis) __trap();
        out[i] = from[(outer * axis + place) * inner + i % inner];
    }
}
"#;

/// Picks places `index` of the middle axis: `[outer, axis, inner]` to `[outer, count, inner]`.
///
/// - `index`: `[count]`, each below `axis`, else the device is lost
pub fn select(
    device: &Device,
    op: &'static str,
    from: View<f32>,
    axis: usize,
    inner: usize,
    index: View<i32>,
    mut out: ViewMut<f32>,
) -> Result<()> {
    let count = index.len();
    assert!(axis > 0 && inner > 0 && from.len().is_multiple_of(axis * inner), "{op}: {} values of [outer, {axis}, {inner}]", from.len());
    assert!(out.len() == from.len() / axis * count, "{op}: {} values for [outer, {count}, {inner}]", out.len());
    if out.is_empty() {
        return Ok(());
    }
    let launch = Launch::new(device, op, variant(SELECT.into()), "pick")?;
    let launch = launch.read(from).read(index).write(&mut out).long(out.len()).int(count).int(axis).int(inner);
    // SAFETY: the arguments are pick's; places are checked before they are read.
    unsafe { launch.run((blocks(out.len(), THREADS, 1 << 16), 1, 1), THREADS, 0) }
}

const SUM_ROWS: &str = r#"#include "prelude.cuh"
extern "C" __global__ void sum_rows(const float* from, const int* starts, const int* rows, float* out, i64 total, int width, int from_rows, int count) {
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < total; i += (i64)gridDim.x * blockDim.x) {
        double sum = 0.0;
        for (int j = starts[i / width]; j < starts[i / width + 1]; j++) {
            if (j < 0 || j >= count || rows[j] < 0 || rows[j] >= from_rows) __trap();
            sum += from[(i64)rows[j] * width + i % width];
        }
        out[i] = (float)sum;
    }
}
"#;

/// Row i of `out` is the sum of the rows of `from` that list i names, in its order, in f64 and rounded once.
///
/// - `from`: `[any, width]`; `out`: `[lists, width]`
/// - `starts`: `[lists + 1]`, where each list begins in `rows` and the one before it ends; from 0 to the length of `rows`
/// - `rows`: each below the rows of `from`; else, as with other starts, the device is lost
pub fn sum_rows(
    device: &Device,
    op: &'static str,
    from: View<f32>,
    starts: View<i32>,
    rows: View<i32>,
    width: usize,
    mut out: ViewMut<f32>,
) -> Result<()> {
    assert!(width > 0 && out.len() == (starts.len() - 1) * width, "{op}: {} sums for {} lists of width {width}", out.len(), starts.len());
    if out.is_empty() {
        return Ok(());
    }
    let launch = Launch::new(device, op, variant(SUM_ROWS.into()), "sum_rows")?;
    let launch = launch.read(from).read(starts).read(rows).write(&mut out).long(out.len());
    let launch = launch.int(width).int(from.len() / width).int(rows.len());
    // SAFETY: the arguments are sum_rows's; places in `rows` and rows of `from` are checked before they are read.
    unsafe { launch.run((blocks(out.len(), THREADS, 1 << 16), 1, 1), THREADS, 0) }
}
