//! What is done to finished sums of a product (gemm.rs): bias and residual are added in f32, then a row is rounded once and
//! written. Knows no operands of the product.

use super::threads::{Shared, threads};
use super::tile::PANEL_COLUMNS;
use crate::kernels::element::Float;
use crate::vectorised;

vectorised! {
    /// Adds bias and residual to `sums` `[rows][32]` and rounds them to rows of `y`, from element `first` on.
    #[allow(clippy::too_many_arguments, reason = "the operands of one piece")]
    pub(super) fn finish_forward<E: Float, O: Float>(
        y: &Shared<O>, first: usize, stride: usize, width: usize, sums: &[f32], bias: Option<&[E]>, residual: Option<&[O]>, streams: bool,
    ) {
        for (r, sums) in sums.chunks_exact(PANEL_COLUMNS).enumerate() {
            let at = first + r * stride;
            ask_for_row(y, residual, at + AHEAD_ROWS * stride, streams);
            let mut row: [f32; PANEL_COLUMNS] = *sums.first_chunk().expect("sums of a row");
            if let Some(bias) = bias {
                row.iter_mut().zip(bias).for_each(|(sum, bias)| *sum += bias.to_f32());
            }
            if let Some(residual) = residual {
                row.iter_mut().zip(&residual[at..at + width]).for_each(|(sum, residual)| *sum += residual.to_f32());
            }
            // SAFETY: this piece of these rows belongs to the calling task alone, and one part is held at a time.
            write_row(unsafe { y.part(at..at + width) }, &row, streams);
        }
    }
}

vectorised! {
    /// Rounds `sums` `[rows][32]` to rows of `dx`, from element `first` on, or adds them.
    pub(super) fn finish_gradient<O: Float>(dx: &Shared<O>, first: usize, stride: usize, width: usize, sums: &[f32], add: bool, streams: bool) {
        for (r, sums) in sums.chunks_exact(PANEL_COLUMNS).enumerate() {
            let at = first + r * stride;
            // SAFETY: this piece of these rows belongs to the calling task alone, and one part is held at a time.
            let out = unsafe { dx.part(at..at + width) };
            if add {
                out.iter_mut().zip(sums).for_each(|(out, sum)| *out = O::from_f32(out.to_f32() + sum));
            } else {
                write_row(out, sums.first_chunk().expect("sums of a row"), streams);
            }
        }
    }
}

/// Bytes of a result, for each thread, from which on it is written past the caches: what a core's second cache holds.
const STREAM_BYTES: usize = 2 << 20;

/// Whether the result of a product is written past the caches, which otherwise fetch its lines only to have them overwritten.
/// Milliseconds of a core without and with it: on AMX, 2048 x 896 x 9728, 55 and 37, and 2048 x 896 x 1152, which is read again
/// at once, 9.2 and 7.2; in f32, 2048 x 256 x 1408, 14.9 and 10.9.
pub(super) fn streams<O: Float>(result: &[O]) -> bool {
    cfg!(target_arch = "x86_64") && size_of_val(result) >= STREAM_BYTES * threads()
}

/// How many rows ahead of the one that is written lines are asked for: rows are pages apart, which no processor foresees.
const AHEAD_ROWS: usize = 16;

/// Asks for the lines of a later row, from element `at` on, of which there need not be any.
#[inline(always)]
fn ask_for_row<O: Float>(y: &Shared<O>, residual: Option<&[O]>, at: usize, streams: bool) {
    #[cfg(target_arch = "x86_64")]
    for line in (0..PANEL_COLUMNS * size_of::<O>()).step_by(64) {
        use std::arch::x86_64::{_MM_HINT_ET0, _MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch may be of any address.
        unsafe {
            if !streams {
                _mm_prefetch::<_MM_HINT_ET0>(y.as_mut_ptr().wrapping_add(at).cast::<i8>().wrapping_add(line));
            }
            if let Some(residual) = residual {
                _mm_prefetch::<_MM_HINT_T0>(residual.as_ptr().wrapping_add(at).cast::<i8>().wrapping_add(line));
            }
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (y, residual, at, streams);
}

/// When it goes out of scope, what was written past the caches comes before all that follows. A task holds one.
pub(super) struct Fence;

impl Drop for Fence {
    fn drop(&mut self) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: every x86-64 processor has SSE, and a fence touches no memory.
        unsafe {
            std::arch::x86_64::_mm_sfence();
        }
    }
}

/// Rounds a row of sums to `out`, which may be shorter; past the caches, if that is wanted and `out` is made of whole lines.
/// The caller's task holds a [`Fence`].
#[inline(always)]
fn write_row<O: Float>(out: &mut [O], sums: &[f32; PANEL_COLUMNS], streams: bool) {
    let mut rounded = [O::default(); PANEL_COLUMNS];
    for (out, sum) in rounded.iter_mut().zip(sums) {
        *out = O::from_f32(*sum);
    }
    #[cfg(target_arch = "x86_64")]
    if streams && out.len() == PANEL_COLUMNS && out.as_ptr().addr().is_multiple_of(64) {
        use std::arch::x86_64::{_mm_loadu_ps, _mm_stream_ps};
        let (from, to) = (rounded.as_ptr().cast::<f32>(), out.as_mut_ptr().cast::<f32>());
        for i in (0..size_of_val(out) / 4).step_by(4) {
            // SAFETY: both hold 32 values, 16 bytes from place `i` lie inside them, and `to` is aligned to 64 bytes. Moves
            // change no bits, whatever the type.
            unsafe { _mm_stream_ps(to.add(i), _mm_loadu_ps(from.add(i))) };
        }
        return;
    }
    let _ = streams;
    // Of the whole width almost always, whose copy is a few moves and no call.
    match out.first_chunk_mut::<PANEL_COLUMNS>() {
        Some(out) => *out = rounded,
        None => out.copy_from_slice(&rounded[..out.len()]),
    }
}
