//! A tensor as text, for `print`: its type and shape, then its elements in rows, with the middle of long ones left out.

use crate::kernels::element::Dtype;
use crate::tensor::{AnyTensor, Place};

/// Tensors up to this many elements are shown whole.
const WHOLE: usize = 1000;
/// Elements shown at each end of a longer side.
const EDGE: usize = 3;

/// For example
/// ```text
/// Tensor f32 [2, 3]
/// [[ 1.0000, -2.0000,  0.5000],
///  [ 0.0000,  4.2500, 10.0000]]
/// ```
///
/// - `tensor`: on the host
/// - `place`: where it was; a device is named
pub fn tensor_text(tensor: &AnyTensor, place: &Place) -> String {
    let on = place.device().map_or_else(String::new, |_| format!(" on {place}"));
    let head = format!("Tensor {} {:?}{on}", tensor.dtype(), tensor.shape());
    if tensor.is_empty() {
        return head;
    }
    let values = tensor.to_f32_vec();
    let write = number_format(&values, matches!(tensor.dtype(), Dtype::I32 | Dtype::I8));
    if tensor.rank() == 0 {
        return format!("{head}\n{}", write(values[0]).trim());
    }
    let mut text = format!("{head}\n");
    rows(&mut text, tensor.shape(), &values, tensor.len() > WHOLE, 1, &write);
    text
}

/// One format for all elements: as wide as the widest, scientific if their sizes differ too much for four decimals.
fn number_format(values: &[f32], integer: bool) -> impl Fn(f32) -> String {
    let finite = || values.iter().filter(|v| v.is_finite() && **v != 0.0).map(|v| v.abs());
    let (largest, smallest) = (finite().fold(0f32, f32::max), finite().fold(f32::MAX, f32::min));
    let scientific = !integer && (largest >= 1e5 || (smallest < 1e-3 && largest > 0.0));
    let write = move |value: f32| match (integer, scientific) {
        (true, _) => format!("{value}"),
        (_, true) => format!("{value:.4e}"),
        _ => format!("{value:.4}"),
    };
    let width = values.iter().take(WHOLE).map(|value| write(*value).len()).max().unwrap_or(0);
    move |value| format!("{:>width$}", write(value))
}

fn rows(text: &mut String, shape: &[usize], values: &[f32], cut: bool, indent: usize, write: &impl Fn(f32) -> String) {
    let (size, inner) = (shape[0], values.len() / shape[0]);
    let gap = if shape.len() == 1 { ", ".to_string() } else { format!(",{}{}", "\n".repeat(shape.len() - 1), " ".repeat(indent)) };
    text.push('[');
    let mut index = 0;
    while index < size {
        if index > 0 {
            text.push_str(&gap);
        }
        if cut && size > 2 * EDGE && index == EDGE {
            text.push_str("...");
            index = size - EDGE;
            continue;
        }
        let part = &values[index * inner..(index + 1) * inner];
        match shape.len() {
            1 => text.push_str(&write(part[0])),
            _ => rows(text, &shape[1..], part, cut, indent + 1, write),
        }
        index += 1;
    }
    text.push(']');
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::buffer::Buffer;

    fn text(shape: &[usize], values: &[f32]) -> String {
        tensor_text(&AnyTensor::new(shape, Buffer::copy_of(values)).unwrap(), &Place::Host)
    }

    #[test]
    fn rows_line_up_and_long_ones_are_cut() {
        assert_eq!(text(&[2, 2], &[1.0, -2.0, 0.5, 10.0]), "Tensor f32 [2, 2]\n[[ 1.0000, -2.0000],\n [ 0.5000, 10.0000]]");
        assert_eq!(text(&[], &[2.5]), "Tensor f32 []\n2.5000");
        assert_eq!(text(&[0, 3], &[]), "Tensor f32 [0, 3]");
        assert_eq!(text(&[2], &[1e-7, 1.0]), "Tensor f32 [2]\n[1.0000e-7,  1.0000e0]");
        let long: Vec<f32> = (0..2000).map(|v| v as f32).collect();
        assert!(text(&[2000], &long).contains("2.0000, ..., 1997.0000"));
        assert!(text(&[1, 1, 2], &[1.0, f32::NAN]).ends_with("[[[1.0000,    NaN]]]"));
    }
}
