//! `ModelElement`: the two types in which models compute, f32 and bf16, and what differs between them above the
//! kernels: whether a trained weight has a remainder, and where the gradient of logits is written.

use super::autograd::Differentiable;
use crate::kernels::buffer::Buffer;
use crate::kernels::cpu::adamw::{self, AdamW};
use crate::kernels::cpu::cross_entropy::{self, EntropyGradient};
use crate::kernels::cpu::tile::TileElement;
use half::bf16;

/// f32, or bf16 with f32 sums and a split f32 master weight.
pub trait ModelElement: Differentiable + TileElement {
    /// Whether a trained weight keeps a remainder beside it.
    const HAS_REMAINDER: bool;

    /// The remainder's bits seen as elements, so that it moves between layouts as the weight does.
    fn remainder_as_elements(remainder: &[i16]) -> &[Self];
    /// As [`ModelElement::remainder_as_elements`], to write.
    fn remainder_as_elements_mut(remainder: &mut [i16]) -> &mut [Self];
    /// Splits master weights into weights and remainders; all of one length.
    fn split_master(master: &[f32], weight: &mut [Self], remainder: &mut [Self]);
    /// Puts master weights together again; all of one length.
    fn join_master(weight: &[Self], remainder: &[Self], master: &mut [f32]);

    /// The gradient in the logits as an operand of the backward products; arguments as in
    /// [`crate::kernels::cpu::cross_entropy::gradient`].
    fn logits_gradient(
        logits: Buffer<f32>,
        vocab: usize,
        labels: &[i32],
        lse: &[f32],
        coefficients: &[f32],
        entropy: Option<EntropyGradient>,
    ) -> Buffer<Self>;

    /// One AdamW update; `panel_columns` is the number of columns of a weight in panels, none for one in rows.
    fn adamw(
        weight: &mut [Self],
        remainder: Option<&mut [i16]>,
        gradient: &[f32],
        m: &mut [f32],
        v: &mut [f32],
        panel_columns: Option<usize>,
        settings: &AdamW,
    );
}

impl ModelElement for f32 {
    const HAS_REMAINDER: bool = false;

    fn remainder_as_elements(_: &[i16]) -> &[Self] {
        unreachable!("f32 weights have no remainder")
    }

    fn remainder_as_elements_mut(_: &mut [i16]) -> &mut [Self] {
        unreachable!("f32 weights have no remainder")
    }

    fn split_master(master: &[f32], weight: &mut [Self], _: &mut [Self]) {
        weight.copy_from_slice(master);
    }

    fn join_master(weight: &[Self], _: &[Self], master: &mut [f32]) {
        master.copy_from_slice(weight);
    }

    fn logits_gradient(
        mut logits: Buffer<f32>,
        vocab: usize,
        labels: &[i32],
        lse: &[f32],
        coefficients: &[f32],
        entropy: Option<EntropyGradient>,
    ) -> Buffer<Self> {
        cross_entropy::gradient::<f32>(&mut logits, vocab, labels, lse, coefficients, entropy, None);
        logits
    }

    fn adamw(
        weight: &mut [Self],
        _: Option<&mut [i16]>,
        gradient: &[f32],
        m: &mut [f32],
        v: &mut [f32],
        _: Option<usize>,
        settings: &AdamW,
    ) {
        adamw::adamw(weight, gradient, m, v, settings);
    }
}

impl ModelElement for bf16 {
    const HAS_REMAINDER: bool = true;

    fn remainder_as_elements(remainder: &[i16]) -> &[Self] {
        bytemuck::cast_slice(remainder)
    }

    fn remainder_as_elements_mut(remainder: &mut [i16]) -> &mut [Self] {
        bytemuck::cast_slice_mut(remainder)
    }

    fn split_master(master: &[f32], weight: &mut [Self], remainder: &mut [Self]) {
        adamw::split_all(master, weight, bytemuck::cast_slice_mut(remainder));
    }

    fn join_master(weight: &[Self], remainder: &[Self], master: &mut [f32]) {
        adamw::join_all(weight, bytemuck::cast_slice(remainder), master);
    }

    fn logits_gradient(
        mut logits: Buffer<f32>,
        vocab: usize,
        labels: &[i32],
        lse: &[f32],
        coefficients: &[f32],
        entropy: Option<EntropyGradient>,
    ) -> Buffer<Self> {
        let mut rounded = Buffer::scratch(logits.len());
        cross_entropy::gradient(&mut logits, vocab, labels, lse, coefficients, entropy, Some(&mut rounded[..]));
        rounded
    }

    fn adamw(
        weight: &mut [Self],
        remainder: Option<&mut [i16]>,
        gradient: &[f32],
        m: &mut [f32],
        v: &mut [f32],
        panel_columns: Option<usize>,
        settings: &AdamW,
    ) {
        let remainder = remainder.expect("a bf16 weight that trains has a remainder");
        match panel_columns {
            Some(columns) => adamw::adamw_bf16_panels(weight, remainder, gradient, m, v, columns, settings),
            None => adamw::adamw_bf16(weight, remainder, gradient, m, v, settings),
        }
    }
}
