//! Some rows of a matrix, also several times: the last tokens of documents and, on a device, the rows that several documents share.

use super::ModelElement;
use super::cuda::select_rows as cuda;
use super::typed::{Data, Tensor};
use crate::error::{Error, Result};
use crate::kernels::buffer::Buffer;
use crate::kernels::cpu::embedding::{Order, embed, embed_backward};
use crate::kernels::cpu::norm;
use std::sync::Arc;

/// Rows of `x` in the order asked for; one may be asked for several times. The gradient of a row is the sum of those of
/// its copies, in their order, in f32, rounded once.
///
/// - `x`: `[tokens, width]`
/// - returns `[rows.len(), width]`
///
/// Errors: [`Error::Argument`] for a row that `x` does not have.
pub fn select_rows<E: ModelElement>(op: &'static str, x: &Tensor<E, 2>, rows: &Arc<[i32]>) -> Result<Tensor<E, 2>> {
    let [tokens, width] = x.shape();
    if let Some(row) = rows.iter().find(|row| usize::try_from(**row).map_or(true, |row| row >= tokens)) {
        return Err(Error::argument(op, "rows", format!("indices from 0, below {tokens}"), row));
    }
    if let Some(device) = x.device() {
        return cuda::select_rows(device, x, rows);
    }
    let mut some = Buffer::scratch(rows.len() * width);
    embed(x.values(), Order::Rows, tokens, width, rows, &mut some);
    let (shape, rows) = ([rows.len(), width], rows.clone());
    Ok(Tensor::from_operation(shape, Data::ready(some), &[x.node()], false, move |d_some, sink| {
        let mut sums = Buffer::<f32>::zeroed(tokens * width);
        embed_backward(&d_some, &rows, Order::Rows, tokens, width, &mut sums);
        sink.accumulate::<E>(0, tokens * width, |dx, add| if add { norm::add(dx, &sums) } else { norm::convert(&sums, dx) });
        Ok(())
    }))
}

/// Row numbers as [`select_rows`] and the kernels take them.
pub fn row_ids(rows: &[usize]) -> Arc<[i32]> {
    rows.iter().map(|row| i32::try_from(*row).expect("a batch has fewer than 2^31 tokens")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;

    #[test]
    fn copies_of_a_row_add_their_gradients_and_round_once() {
        let values: Vec<bf16> = (0..6).map(|i| bf16::from_f32(i as f32)).collect();
        let x = Tensor::from_slice([3, 2], &values).unwrap().leaf();
        let y = select_rows("test", &x, &[2, 0, 2, 2].into()).unwrap();
        assert_eq!(y.values().iter().map(|v| v.to_f32()).collect::<Vec<_>>(), [4.0, 5.0, 0.0, 1.0, 4.0, 5.0, 4.0, 5.0]);
        // 256 + 1 + 1 is 258 in bf16 if it is rounded once, and 256 if each sum is.
        let d: Vec<bf16> = [256.0, 1.0, 3.0, 4.0, 1.0, 1.0, 1.0, 1.0].map(bf16::from_f32).to_vec();
        y.backward_with(Buffer::copy_of(&d)).unwrap();
        let gradient = x.gradient().unwrap().expect("a leaf has one");
        assert_eq!(gradient.values().iter().map(|v| v.to_f32()).collect::<Vec<_>>(), [3.0, 4.0, 0.0, 0.0, 258.0, 3.0]);
        assert!(select_rows("test", &x, &[3].into()).is_err() && select_rows("test", &x, &[-1].into()).is_err());
    }
}
