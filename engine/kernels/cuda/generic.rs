//! Generic mathematics on the device: kernels written from an expression when they are first used. Elementwise with
//! broadcasting by strides, reductions along one axis, and rows picked along one axis with their gradient. All in f32, without
//! contraction. Expressions are the engine's own, never a user's text.

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

/// An input of [`elementwise`]: where it lies, and how far apart its elements are along each axis (0 where it is repeated).
#[derive(Clone, Copy)]
pub struct Input<'a> {
    pub values: View<'a, f32>,
    pub strides: &'a [usize],
}

/// The source of `out[i] = expression(x0[..], x1[..], ...)`.
fn elementwise_source(expression: &str, inputs: usize) -> String {
    let mut text = String::from("#include \"prelude.cuh\"\nextern \"C\" __global__ void elementwise(float* out, i64 count");
    for axis in 0..AXES_MAX {
        let _ = write!(text, ", int size{axis}");
    }
    for input in 0..inputs {
        let _ = write!(text, ", const float* in{input}");
        for axis in 0..AXES_MAX {
            let _ = write!(text, ", int stride{input}_{axis}");
        }
    }
    text += ") {\n    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (i64)gridDim.x * blockDim.x) {\n        i64 left = i;\n";
    for input in 0..inputs {
        let _ = writeln!(text, "        i64 at{input} = 0;");
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
    for Input { values, strides } in inputs {
        assert!(strides.len() == shape.len(), "{op}: {} strides for shape {shape:?}", strides.len());
        let last: usize = shape.iter().zip(*strides).map(|(size, stride)| (size - 1) * stride).sum();
        assert!(last < values.len(), "{op}: shape {shape:?} with strides {strides:?} of {} values", values.len());
        launch = launch.read(*values);
        for axis in 0..AXES_MAX {
            launch = launch.int(if axis < missing { 0 } else { strides[axis - missing] });
        }
    }
    // SAFETY: the arguments are those of the source above; the largest place that is read lies in each input (asserted).
    unsafe { launch.run((blocks(out.len(), THREADS, 1 << 16), 1, 1), THREADS, 0) }
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
// Each element of d_from looks for the places that were read from it, in their order, so nothing is added atomically.
extern "C" __global__ void pick_backward(const float* d_out, const int* index, float* d_from, i64 total, int count, int axis, int inner) {
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < total; i += (i64)gridDim.x * blockDim.x) {
        i64 outer = i / inner / axis;
        int place = i / inner % axis;
        float sum = d_from[i];
        for (int j = 0; j < count; j++) {
            if (index[j] == place) sum += d_out[(outer * count + j) * inner + i % inner];
        }
        d_from[i] = sum;
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
    check_select(op, from.len(), out.len(), axis, inner, count);
    if out.is_empty() {
        return Ok(());
    }
    let launch = Launch::new(device, op, variant(SELECT.into()), "pick")?;
    let launch = launch.read(from).read(index).write(&mut out).long(out.len()).int(count).int(axis).int(inner);
    // SAFETY: the arguments are pick's; places are checked before they are read.
    unsafe { launch.run((blocks(out.len(), THREADS, 1 << 16), 1, 1), THREADS, 0) }
}

/// `d_from += ` the gradient of [`select`], in the order of `index`. For many rows of a long axis use `embed_backward`.
pub fn select_backward(
    device: &Device,
    op: &'static str,
    d_out: View<f32>,
    axis: usize,
    inner: usize,
    index: View<i32>,
    mut d_from: ViewMut<f32>,
) -> Result<()> {
    let count = index.len();
    check_select(op, d_from.len(), d_out.len(), axis, inner, count);
    if d_from.is_empty() {
        return Ok(());
    }
    let launch = Launch::new(device, op, variant(SELECT.into()), "pick_backward")?;
    let launch = launch.read(d_out).read(index).write(&mut d_from).long(d_from.len()).int(count).int(axis).int(inner);
    // SAFETY: the arguments are pick_backward's; a thread writes its own elements and reads places below `count`.
    unsafe { launch.run((blocks(d_from.len(), THREADS, 1 << 16), 1, 1), THREADS, 0) }
}

fn check_select(op: &str, from: usize, out: usize, axis: usize, inner: usize, count: usize) {
    assert!(axis > 0 && inner > 0 && from.is_multiple_of(axis * inner), "{op}: {from} values of [outer, {axis}, {inner}]");
    assert!(out == from / axis * count, "{op}: {out} values for [outer, {count}, {inner}]");
}
