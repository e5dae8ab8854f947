//! Rotary position embedding: tables of angles, and the rotation of queries and keys inside the fused activation.
//! Knows no scaling rule for long contexts: whoever computes `inv_freq` applies it.
//! Source: Su et al., arXiv 2104.09864, in the half-split layout of GPT-NeoX: column i turns with column i + head_dim/2.

use super::heads::Heads;
use super::threads::{Shared, parallel_ranges};
use crate::error::{Error, Result};
use crate::kernels::element::Float;

/// Rows that one task turns at least: fewer are not worth a second thread.
const ROWS_LEAST: usize = 16;

/// Fills the tables: `cos[t, i] = cos(inv_freq[i] * positions[t]) * attention_scaling`, `sin` alike.
///
/// - `inv_freq`: `[head_dim / 2]`, radians a position; the angle is one f32 product
/// - `attention_scaling`: no unit; 1 unless YaRN
/// - `positions`: `[tokens]`, each from 0
/// - `cos`, `sin`: `[tokens, head_dim / 2]`, f32, written in full. For `E` = bf16 their values are rounded to bf16, as
///   transformers casts them to the activations' type.
///
/// Errors: [`Error::Shape`] if a table has another size.
pub fn rope_tables<E: Float>(inv_freq: &[f32], attention_scaling: f32, positions: &[i32], cos: &mut [f32], sin: &mut [f32]) -> Result<()> {
    let half = inv_freq.len();
    check_tables("rope_tables", positions.len(), half, cos, sin)?;
    if half == 0 {
        return Ok(());
    }
    let (cos, sin) = (Shared::new(cos), Shared::new(sin));
    parallel_ranges(positions.len(), ROWS_LEAST, |rows| {
        let columns = rows.start * half..rows.end * half;
        // SAFETY: parallel_ranges hands out disjoint rows, and each task makes one part of each table.
        let (cos, sin) = unsafe { (cos.part(columns.clone()), sin.part(columns)) };
        for ((position, cos), sin) in positions[rows].iter().zip(cos.chunks_exact_mut(half)).zip(sin.chunks_exact_mut(half)) {
            for ((freq, cos), sin) in inv_freq.iter().zip(cos).zip(sin) {
                let (s, c) = (freq * *position as f32).sin_cos();
                *cos = E::from_f32(c * attention_scaling).to_f32();
                *sin = E::from_f32(s * attention_scaling).to_f32();
            }
        }
    });
    Ok(())
}

/// Turns each query and key head of `qkv` by its position's angles; values stay.
///
/// - `qkv`: `[tokens, (heads + 2 * kv_heads) * head_dim]`, query heads, then key heads, then value heads
/// - `turned`: the same shape, written in full
/// - `cos`, `sin`: `[tokens, head_dim / 2]`, f32, from [`rope_tables`]
///
/// The arithmetic is f32 with one rounding to `E` at the end; transformers in bf16 rounds each product as well, so
/// the two may differ by the last bit of a bf16.
///
/// Errors: [`Error::Shape`] or [`Error::Argument`] if the shapes do not fit.
pub fn rope<E: Float>(qkv: &[E], turned: &mut [E], heads: Heads, cos: &[f32], sin: &[f32]) -> Result<()> {
    assert!(turned.len() == qkv.len(), "rope: room for {} values of {}", turned.len(), qkv.len());
    turn("rope", Some(qkv), turned, heads, cos, sin, 1.0)
}

/// Turns gradients back: the derivative of [`rope`] is the rotation by the negative angle (with the same scaling).
///
/// - `dqkv`: the gradient with respect to rope's output on entry, to its input on return; shapes as in [`rope`]
///
/// Errors: as [`rope`].
pub fn rope_backward<E: Float>(dqkv: &mut [E], heads: Heads, cos: &[f32], sin: &[f32]) -> Result<()> {
    turn("rope_backward", None, dqkv, heads, cos, sin, -1.0)
}

fn check_tables(op: &'static str, tokens: usize, half: usize, cos: &[f32], sin: &[f32]) -> Result<()> {
    for (arg, table) in [("cos", cos), ("sin", sin)] {
        if table.len() != tokens * half {
            return Err(Error::Shape { op, arg, expected: format!("[{tokens}, {half}]"), got: format!("{} values", table.len()) });
        }
    }
    Ok(())
}

/// Turns `from`, or what is in `qkv` already.
fn turn<E: Float>(
    op: &'static str,
    from: Option<&[E]>,
    qkv: &mut [E],
    heads: Heads,
    cos: &[f32],
    sin: &[f32],
    direction: f32,
) -> Result<()> {
    heads.check(op)?;
    let tokens = heads.tokens(op, "qkv", qkv.len())?;
    let half = heads.head_dim / 2;
    check_tables(op, tokens, half, cos, sin)?;
    let width = heads.width();
    let qkv = Shared::new(qkv);
    parallel_ranges(tokens, ROWS_LEAST, |rows| {
        let values = rows.start * width..rows.end * width;
        // SAFETY: parallel_ranges hands out disjoint rows.
        let part = unsafe { qkv.part(values.clone()) };
        let angles = rows.start * half..rows.end * half;
        turn_rows(from.map(|from| &from[values]), part, heads, &cos[angles.clone()], &sin[angles], direction);
    });
    Ok(())
}

crate::vectorised! {
    /// `direction` is 1 or -1, the sign of the angle.
    fn turn_rows<E: Float>(from: Option<&[E]>, rows: &mut [E], heads: Heads, cos: &[f32], sin: &[f32], direction: f32) {
        let (half, width) = (heads.head_dim / 2, heads.width());
        let turned = heads.value(0);
        for (index, ((row, cos), sin)) in rows.chunks_exact_mut(width).zip(cos.chunks_exact(half)).zip(sin.chunks_exact(half)).enumerate() {
            if let Some(from) = from {
                row.copy_from_slice(&from[index * width..][..width]);
            }
            for head in row[..turned].chunks_exact_mut(heads.head_dim) {
                let (low, high) = head.split_at_mut(half);
                for i in 0..half {
                    let (a, b, c, s) = (low[i].to_f32(), high[i].to_f32(), cos[i], sin[i] * direction);
                    low[i] = E::from_f32(a * c - b * s);
                    high[i] = E::from_f32(b * c + a * s);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;

    fn inv_freq(head_dim: usize, theta: f64) -> Vec<f32> {
        (0..head_dim / 2).map(|i| (1.0 / theta.powf(2.0 * i as f64 / head_dim as f64)) as f32).collect()
    }

    /// The rotation written out in f64 for one element of a head.
    fn reference(head: &[f64], i: usize, inv_freq: &[f32], position: i32, scaling: f64) -> f64 {
        let half = head.len() / 2;
        let angle = f64::from(inv_freq[i % half] * position as f32);
        let partner = if i < half { -head[i + half] } else { head[i - half] };
        (head[i] * angle.cos() + partner * angle.sin()) * scaling
    }

    fn check<E: Float>(heads: Heads, tokens: usize, scaling: f32, tolerance: f64) {
        let freq = inv_freq(heads.head_dim, 1e6);
        let positions: Vec<i32> = (0..tokens).map(|t| (t * t * 37) as i32).collect();
        let size = tokens * heads.head_dim / 2;
        let (mut cos, mut sin) = (vec![0.0; size], vec![0.0; size]);
        rope_tables::<E>(&freq, scaling, &positions, &mut cos, &mut sin).unwrap();
        let x: Vec<E> = (0..tokens * heads.width()).map(|i| E::from_f32(((i * 7919) % 1013) as f32 / 500.0 - 1.0)).collect();
        let mut y = x.clone();
        rope(&x, &mut y, heads, &cos, &sin).unwrap();
        let dim = heads.head_dim;
        for (t, position) in positions.iter().enumerate() {
            for h in 0..heads.heads + 2 * heads.kv_heads {
                let start = t * heads.width() + h * dim;
                let head: Vec<f64> = x[start..start + dim].iter().map(|v| f64::from(v.to_f32())).collect();
                for i in 0..dim {
                    let got = y[start + i].to_f32();
                    if h >= heads.heads + heads.kv_heads {
                        assert_eq!(y[start + i], x[start + i], "values are not turned");
                        continue;
                    }
                    let want = reference(&head, i, &freq, *position, f64::from(scaling));
                    assert!((f64::from(got) - want).abs() < tolerance, "token {t} head {h} column {i}: {got} against {want}");
                }
            }
        }
        // The derivative of a linear map is its transpose: <rope(x), g> = <x, rope_backward(g)>.
        let g: Vec<E> = (0..x.len()).map(|i| E::from_f32(((i * 104_729) % 997) as f32 / 498.0 - 1.0)).collect();
        let mut back = g.clone();
        rope_backward(&mut back, heads, &cos, &sin).unwrap();
        let dot = |a: &[E], b: &[E]| a.iter().zip(b).map(|(a, b)| f64::from(a.to_f32()) * f64::from(b.to_f32())).sum::<f64>();
        let (forward, backward) = (dot(&y, &g), dot(&x, &back));
        assert!((forward - backward).abs() <= tolerance * x.len() as f64, "{forward} against {backward}");
    }

    #[test]
    fn rope_matches_the_rotation_in_f64() {
        for (heads, kv_heads, head_dim) in [(1, 1, 2), (4, 2, 16), (7, 1, 64), (2, 2, 128)] {
            for tokens in [0, 1, 7, 33] {
                let heads = Heads { heads, kv_heads, head_dim };
                check::<f32>(heads, tokens, 1.0, 1e-6);
                check::<f32>(heads, tokens, 1.138_629_4, 1e-6);
                // Cosine, sine and result are each rounded to 8 bits: 3 half units of 2^-8 at magnitudes below 2.
                check::<bf16>(heads, tokens, 1.0, 3.0 / 128.0);
            }
        }
    }

    #[test]
    fn position_zero_leaves_the_row_as_it_is() {
        let heads = Heads { heads: 2, kv_heads: 1, head_dim: 4 };
        let (mut cos, mut sin) = (vec![9.0; 2], vec![9.0; 2]);
        rope_tables::<f32>(&inv_freq(4, 1e4), 1.0, &[0], &mut cos, &mut sin).unwrap();
        let (x, mut y) = ((0..16).map(|i| i as f32).collect::<Vec<_>>(), vec![9.0; 16]);
        rope(&x, &mut y, heads, &cos, &sin).unwrap();
        assert_eq!(x, y);
    }

    #[test]
    fn wrong_shapes_are_refused() {
        let heads = Heads { heads: 2, kv_heads: 1, head_dim: 4 };
        assert!(rope(&[0.0; 15], &mut [0.0f32; 15], heads, &[0.0; 2], &[0.0; 2]).is_err());
        assert!(rope(&[0.0; 16], &mut [0.0f32; 16], heads, &[0.0; 3], &[0.0; 2]).is_err());
        assert!(rope_tables::<f32>(&[1.0, 0.1], 1.0, &[0, 1], &mut [0.0; 4], &mut [0.0; 3]).is_err());
    }
}
