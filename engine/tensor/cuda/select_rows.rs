//! Some rows of a matrix, on a GPU; see tensor/select_rows.rs. Sums are rounded at each addition.

use super::activation;
use crate::error::Result;
use crate::kernels::cuda::device::Device;
use crate::kernels::cuda::memory::DeviceBuffer;
use crate::kernels::cuda::{elements, embedding::embed};
use crate::tensor::{ModelElement, Tensor};
use std::sync::Arc;

/// As [`crate::tensor::select_rows::select_rows`], of rows that `x` has.
pub fn select_rows<E: ModelElement>(device: &Arc<Device>, x: &Tensor<E, 2>, rows: &Arc<[i32]>) -> Result<Tensor<E, 2>> {
    let [tokens, hidden] = x.shape();
    let on_device = DeviceBuffer::copy_of(device, "rows", rows)?;
    let mut some = activation::<E>(device, rows.len() * hidden)?;
    embed(device, x.cuda(), hidden, on_device.view(), some.view_mut())?;
    let (device, rows) = (device.clone(), rows.clone());
    Ok(Tensor::from_operation_on_device([rows.len(), hidden], some, &[x.node()], false, move |dy, sink| {
        sink.accumulate_on_device::<E>(0, &device, tokens * hidden, |mut dx, add| {
            if !add {
                dx.zero(&device)?;
            }
            let mut start = 0;
            // A row that was asked for twice is added to twice, in that order.
            for part in distinct(&rows) {
                let (from, to) = (dy.part(start * hidden..(start + part.len()) * hidden), DeviceBuffer::copy_of(&device, "rows", part)?);
                elements::put_rows(&device, from, to.view(), hidden, dx.reborrow(), true)?;
                start += part.len();
            }
            Ok(())
        })
    }))
}

/// The longest parts, one after the other, in which no number comes twice.
fn distinct(ids: &[i32]) -> Vec<&[i32]> {
    let (mut parts, mut start, mut seen) = (Vec::new(), 0, std::collections::HashSet::new());
    for (at, id) in ids.iter().enumerate() {
        if !seen.insert(id) {
            parts.push(&ids[start..at]);
            (start, seen) = (at, std::collections::HashSet::from([id]));
        }
    }
    parts.push(&ids[start..]);
    parts
}

#[cfg(test)]
mod tests {
    use super::distinct;

    #[test]
    fn rows_are_cut_before_each_repetition() {
        assert_eq!(distinct(&[3, 1, 3, 2, 2]), [&[3, 1][..], &[3, 2], &[2]]);
        assert_eq!(distinct(&[]), [&[] as &[i32]]);
    }
}
