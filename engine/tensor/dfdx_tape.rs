//! The border to dfdx: runs a function of dfdx tensors on our elements, forwards and backwards.
//! It knows no single operation; `elementwise.rs`, `arithmetic.rs`, `reduce.rs` and `softmax.rs` bring the functions.
//!
//! - A dfdx tape is not `Send`, and our graph may be dropped or run on another thread. So the tape lives only during the
//!   backward step, which runs the function again on the saved elements; between the two steps nothing is kept twice.
//! - dfdx starts a backward pass only from a scalar. Here the gradient of a result of any shape is put on the tape before
//!   it runs, and a scalar that nothing depends on carries the tape.
//! - dfdx panics on operands it does not like, among them a tensor combined with itself. Callers check operands first,
//!   every operand becomes a dfdx tensor of its own, and a panic that comes all the same is caught and made an error.
//! - Shapes are collapsed by the callers (`[elements]`, `[outer, axis, inter]`), so a tensor's rank has no limit.

use super::any::AnyTensor;
use super::operation::{as_f32, record_float};
use super::shape::View;
use crate::error::{Error, Result};
use crate::kernels::buffer::Buffer;
use dfdx::shapes::{Rank0, Shape};
use dfdx::tensor::{Cpu, Gradients, Merge, NoneTape, OwnedTape, PutTape, SplitTape, Tensor, TensorFromVec, Trace, ZerosTensor};
use dfdx::tensor_ops::Backward;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// A dfdx tensor that records what happens to it.
pub(super) type Traced<S> = Tensor<S, f32, Cpu, OwnedTape<f32, Cpu>>;

type Plain<S> = Tensor<S, f32, Cpu, NoneTape>;

thread_local! {
    /// Made once a thread: a new one seeds a random generator.
    static DEVICE: Cpu = Cpu::default();
}

/// Runs `body`; a panic becomes an error.
fn guarded<T>(op: &'static str, body: impl FnOnce() -> T) -> Result<T> {
    catch_unwind(AssertUnwindSafe(body)).map_err(|panic| {
        let text = panic.downcast_ref::<&str>().map(|text| text.to_string());
        let text = text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".into());
        Error::Unsupported { what: format!("{op}: this use ({text})"), remedy: "please report it with the shapes of the operands".into() }
    })
}

fn place<S: Shape>(values: Vec<f32>, shape: S) -> Plain<S> {
    DEVICE.with(|device| device.tensor_from_vec(values, shape))
}

fn take<S: Shape>(y: &Plain<S>, len: usize) -> Buffer<f32> {
    let mut out = Buffer::scratch(len);
    y.copy_into(&mut out);
    out
}

/// Runs the tape behind `y` with the gradient of `y` given.
fn run_tape<S: Shape>(y: Traced<S>, gradient: &[f32]) -> Gradients<f32, Cpu> {
    let (y, tape) = y.split_tape();
    let mut seeded = Gradients::leaky();
    seeded.get_or_alloc_mut(&y).expect("dfdx allocates on the host").copy_from_slice(gradient);
    let carrier: Plain<Rank0> = DEVICE.with(|device| device.zeros());
    let (carrier, start) = carrier.traced(seeded).split_tape();
    carrier.put_tape(start.merge(tape)).backward()
}

fn gradient_of<S: Shape>(gradients: &mut Gradients<f32, Cpu>, x: &Plain<S>) -> Buffer<f32> {
    Buffer::copy_of(gradients.get_or_alloc_mut(x).expect("dfdx allocates on the host"))
}

/// `f(x)` for a float tensor `x` seen in `seen`; the result has `shape` and the element type of `x`. `load` copies the
/// elements into the layout of `seen`, `unload` brings a gradient back.
///
/// Errors: [`Error::Unsupported`] if dfdx panics.
pub(super) fn unary<S: Shape, T: Shape>(
    op: &'static str,
    x: &AnyTensor,
    seen: S,
    shape: Vec<usize>,
    f: impl Fn(Traced<S>) -> Traced<T> + Send + 'static,
    load: impl Fn(&[f32]) -> Vec<f32> + Send + 'static,
    unload: impl Fn(Buffer<f32>) -> Buffer<f32> + Send + 'static,
) -> Result<AnyTensor> {
    let len = shape.iter().product();
    if len == 0 || x.is_empty() {
        assert_eq!(len, 0, "{op} of an empty tensor with a result is the caller's matter");
        let len = x.len();
        return Ok(record_float(shape, x.dtype(), Buffer::zeroed(0), &[x], move |_, sink| {
            sink.add(0, Buffer::zeroed(len));
            Ok(())
        }));
    }
    let saved = x.data().clone();
    let values = guarded(op, || take(&f(place(load(&as_f32(&saved)), seen).leaky_traced()).split_tape().0, len))?;
    Ok(record_float(shape, x.dtype(), values, &[x], move |gradient, sink| {
        let gradient = guarded(op, || {
            let x = place(load(&as_f32(&saved)), seen);
            gradient_of(&mut run_tape(f(x.leaky_trace()), gradient), &x)
        })?;
        sink.add(0, unload(gradient));
        Ok(())
    }))
}

/// `f` of plain values, without a derivative.
///
/// Errors: [`Error::Unsupported`] if dfdx panics.
pub(super) fn values(op: &'static str, x: &[f32], f: impl Fn(Plain<(usize,)>) -> Plain<(usize,)>) -> Result<Buffer<f32>> {
    match x.len() {
        0 => Ok(Buffer::zeroed(0)),
        len => guarded(op, || take(&f(place(x.to_vec(), (len,))), len)),
    }
}

/// `f(a, b)`, element by element, for float tensors of one type that broadcast to `shape`.
///
/// Errors: [`Error::Unsupported`] if dfdx panics.
pub(super) fn binary(
    op: &'static str,
    a: &AnyTensor,
    b: &AnyTensor,
    shape: Vec<usize>,
    f: impl Fn(Traced<(usize,)>, Traced<(usize,)>) -> Traced<(usize,)> + Send + 'static,
) -> Result<AnyTensor> {
    let len: usize = shape.iter().product();
    let views = [View::broadcast(a.shape(), &shape), View::broadcast(b.shape(), &shape)];
    let (saved, lens) = ([a.data().clone(), b.data().clone()], [a.len(), b.len()]);
    let load = {
        let views = views.clone();
        move || [0, 1].map(|i| place(views[i].read_vec(&as_f32(&saved[i])), (len,)))
    };
    let values = match len {
        0 => Buffer::zeroed(0),
        _ => guarded(op, || {
            let [a, b] = load();
            take(&f(a.leaky_traced(), b.leaky_traced()).split_tape().0, len)
        })?,
    };
    Ok(record_float(shape, a.dtype(), values, &[a, b], move |gradient, sink| {
        if len == 0 {
            (0..2).for_each(|i| sink.add(i, Buffer::zeroed(lens[i])));
            return Ok(());
        }
        let mut parts = guarded(op, || {
            let [a, b] = load();
            let mut gradients = run_tape(f(a.leaky_trace(), b.leaky_trace()), gradient);
            [gradient_of(&mut gradients, &a), gradient_of(&mut gradients, &b)].map(Some)
        })?;
        for (index, view) in views.iter().enumerate() {
            if sink.wants(index) {
                let part = parts[index].take().expect("taken once");
                sink.add(index, view.scatter_add(&part, lens[index]));
            }
        }
        Ok(())
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_of_dfdx_becomes_an_error() {
        let x = AnyTensor::new(&[3], Buffer::copy_of(&[1f32, 2., 3.])).unwrap();
        let error = unary("probe", &x, (2,), vec![3], |x| x, |x| x.to_vec(), |g| g).unwrap_err();
        assert!(error.to_string().starts_with("probe: this use"), "{error}");
    }

    /// Why matmul.rs does not ask dfdx: without its feature `cpu`, dfdx 0.13 overwrites instead of adding along k.
    /// When this fails, dfdx has been mended, and matmul.rs may call it.
    #[test]
    fn dfdx_matmul_keeps_only_the_last_product() {
        use dfdx::tensor_ops::TryMatMul;
        let (a, b) = (place(vec![1., 2.], (1, 2)), place(vec![10., 100.], (2, 1)));
        assert_eq!(a.matmul(b).as_vec(), [200.0]); // 210 would be right
    }
}
