//! `ModelElement`: the two types in which models compute, f32 and bf16, and what differs between them above the
//! kernels: whether a trained weight has a remainder, and how it is updated.

use super::autograd::Differentiable;
use crate::kernels::cpu::adamw::{self, AdamW, Moment};
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

    /// One AdamW update; `panel_columns` is the number of columns of a weight in panels, none for one in rows.
    fn adamw<M: Moment>(
        weight: &mut [Self],
        remainder: Option<&mut [i16]>,
        gradient: &[f32],
        m: &mut [M],
        v: &mut [M],
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

    fn adamw<M: Moment>(
        weight: &mut [Self],
        _: Option<&mut [i16]>,
        gradient: &[f32],
        m: &mut [M],
        v: &mut [M],
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

    fn adamw<M: Moment>(
        weight: &mut [Self],
        remainder: Option<&mut [i16]>,
        gradient: &[f32],
        m: &mut [M],
        v: &mut [M],
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
