//! Recomputation of a part of the graph ("activation checkpointing"): its forward pass keeps only the input, and the
//! backward pass runs it again. Kernels are deterministic, so not one bit of the result changes.
//! Source: Chen et al., arXiv 1604.06174.

use super::autograd::{Differentiable, with_recording};
use super::typed::Tensor;
use crate::error::Result;

/// `body(x)`, whose inner results are dropped after the forward pass and computed again for the backward pass.
///
/// `body` must compute the same from the same input each time. Parameters that it uses receive their gradients as usual;
/// `parameters` says whether any of them trains. If nothing wants a gradient, nothing is kept.
///
/// Errors: those of `body`.
pub fn recompute<E: Differentiable, const R: usize, const S: usize>(
    x: &Tensor<E, R>,
    parameters: bool,
    body: impl Fn(&Tensor<E, R>) -> Result<Tensor<E, S>> + Send + 'static,
) -> Result<Tensor<E, S>> {
    let result = with_recording(false, || body(&x.detach()))?;
    let input = x.detach();
    Ok(Tensor::from_operation_anywhere(result.shape(), result.data().clone(), &[x.node()], parameters, move |gradient, sink| {
        let input = input.leaf();
        let output = with_recording(true, || body(&input))?;
        output.backward_from(gradient)?;
        if let Some(node) = input.node()
            && let Some(gradient) = node.take_leaf_gradient()
        {
            sink.add_array(0, E::unwrap_gradient(gradient))?;
        }
        Ok(())
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::buffer::Buffer;

    /// y = x * x with its derivative written by hand.
    fn square(x: &Tensor<f32, 1>) -> Result<Tensor<f32, 1>> {
        let saved = x.data().clone();
        let mut y = Buffer::copy_of(x.values());
        y.iter_mut().for_each(|v| *v *= *v);
        Ok(Tensor::from_operation(x.shape(), super::super::Data::ready(y), &[x.node()], false, move |mut gradient, sink| {
            gradient.iter_mut().zip(saved.get()).for_each(|(g, x)| *g *= 2.0 * x);
            sink.add(0, gradient);
            Ok(())
        }))
    }

    #[test]
    fn recomputation_changes_no_bit_and_a_graph_runs_backwards_once() {
        let x = Tensor::from_slice([3], &[0.5f32, -2.0, 3.25]).unwrap();
        let (plain, again) = (x.leaf(), x.leaf());
        let y = square(&square(&plain).unwrap()).unwrap();
        let z = recompute(&again, false, |x| square(&square(x)?)).unwrap();
        assert_eq!(y.values(), z.values());
        y.backward_with(Buffer::copy_of(&[1.0, 1.0, 1.0])).unwrap();
        z.backward_with(Buffer::copy_of(&[1.0, 1.0, 1.0])).unwrap();
        assert_eq!(plain.gradient().unwrap().unwrap().values(), [0.5, -32.0, 137.3125]); // 4 x^3
        assert_eq!(plain.gradient().unwrap().unwrap().values(), again.gradient().unwrap().unwrap().values());
        assert!(y.backward_with(Buffer::zeroed(3)).unwrap_err().to_string().contains("has not run backwards yet"));
        assert!(recompute(&x, false, square).unwrap().node().is_none(), "nothing wants a gradient, so nothing is kept");
    }

    #[test]
    fn a_long_chain_is_dropped_without_recursion_and_shared_parents_add_up() {
        let x = Tensor::from_slice([1], &[1.0f32]).unwrap().leaf();
        let mut y = x.clone();
        for _ in 0..200_000 {
            y = Tensor::from_operation(y.shape(), y.data().clone(), &[y.node()], false, |gradient, sink| {
                sink.add(0, gradient);
                Ok(())
            });
        }
        y.backward().unwrap();
        let twice = Tensor::from_operation([1], x.data().clone(), &[x.node(), x.node()], false, |gradient, sink| {
            sink.add(0, gradient.clone());
            sink.accumulate::<f32>(1, 1, |sum, add| if add { sum[0] += gradient[0] } else { sum[0] = gradient[0] });
            Ok(())
        });
        twice.backward().unwrap();
        assert_eq!(x.gradient().unwrap().unwrap().values(), [3.0]);
    }
}
