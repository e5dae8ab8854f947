//! What stands on top of the layers, as tensors that scripts go on with: their logits, and one score for each.
//! Losses over labels do not come here: they go through logprobs.rs, which never stores logits.

use super::ModelElement;
use super::linear::{check_weight, weight_gradients};
use super::parameter::Parameter;
use super::typed::{Data, Tensor};
use crate::error::Result;
use crate::kernels::buffer::Buffer;
use crate::kernels::cpu::{gemm, norm};
use std::sync::Arc;

/// All logits of each row: `[rows, hidden]` times the head gives `[rows, vocab]`, f32.
///
/// Errors: [`Error::Shape`] if the sizes do not fit.
pub fn logits<E: ModelElement>(x: &Tensor<E, 2>, head: &Arc<Parameter<E>>) -> Result<Tensor<f32, 2>> {
    product("logits", [x.shape()[0], head.rows()], x, head)
}

/// One number for each row: `[rows, hidden]` times a head of one output gives `[rows]`, f32.
///
/// Errors: [`Error::Shape`] if the sizes do not fit.
pub fn scores<E: ModelElement>(x: &Tensor<E, 2>, head: &Arc<Parameter<E>>) -> Result<Tensor<f32, 1>> {
    assert_eq!(head.rows(), 1, "{}: outputs of a head that scores", head.name());
    product("scores", [x.shape()[0]], x, head)
}

fn product<E: ModelElement, const R: usize>(
    op: &'static str,
    shape: [usize; R],
    x: &Tensor<E, 2>,
    head: &Arc<Parameter<E>>,
) -> Result<Tensor<f32, R>> {
    let [rows, hidden] = x.shape();
    check_weight(op, hidden, head)?;
    let mut y = Buffer::scratch(rows * head.rows());
    head.multiply(&mut y, x.values(), None, None, None);
    let (saved, head, seen) = (head.trains().then(|| x.data().clone()), head.clone(), head.version());
    Ok(Tensor::from_operation(shape, Data::ready(y), &[x.node()], head.trains(), {
        move |dy, sink| {
            head.check_version(seen, op)?;
            let mut narrow = Buffer::<E>::scratch(dy.len());
            norm::convert(&dy, &mut narrow);
            drop(dy);
            weight_gradients(&narrow, saved.as_ref().map_or(&[][..], |saved| saved.get()), &head, None);
            let weight = head.read();
            sink.accumulate::<E>(0, rows * hidden, |dx, add| gemm::input_gradient(dx, &narrow, head.product_weight(&weight), add));
            Ok(())
        }
    }))
}
