//! Launchers of embedding.cu: rows of a table by number, and the gradient of the table. Tables lie in rows.

use super::device::Device;
use super::launch::Launch;
use super::memory::{View, ViewMut};
use super::program::{Program, Variant};
use crate::error::Result;
use crate::kernels::element::Float;

/// Threads of a row of `hidden` elements.
fn threads(hidden: usize) -> usize {
    (hidden / 8).next_multiple_of(32).clamp(32, 256)
}

fn check(weight: usize, vocab: usize, hidden: usize, ids: usize, rows: usize) {
    assert!(weight == vocab * hidden, "embedding: a {vocab} x {hidden} table of {weight} values");
    assert!(rows == ids * hidden, "embedding: {rows} values for [{ids}, {hidden}]");
}

/// Copies row `ids[t]` of `weight` to row `t` of `out`.
///
/// - `weight`: `[vocab, hidden]`; `ids`: `[tokens]`, each in `0..vocab`, else the device is lost; `out`: `[tokens, hidden]`
pub fn embed<E: Float>(device: &Device, weight: View<E>, hidden: usize, ids: View<i32>, mut out: ViewMut<E>) -> Result<()> {
    assert!(hidden > 0 && weight.len().is_multiple_of(hidden), "embedding: a table of {} values in rows of {hidden}", weight.len());
    let vocab = weight.len() / hidden;
    check(weight.len(), vocab, hidden, ids.len(), out.len());
    if ids.is_empty() {
        return Ok(());
    }
    let launch = Launch::new(device, "embedding", Variant::of::<E>(Program::Embedding), "embed")?.waiting();
    let launch = launch.read(weight).read(ids).write(&mut out).int(vocab).int(hidden);
    // SAFETY: the arguments are embed's. Block t reads ids[t] and one row of the table, which it checks, and writes row t.
    unsafe { launch.run((ids.len(), 1, 1), threads(hidden), 0) }
}

/// Adds row `t` of `d_out` to row `ids[t]` of the table's gradient, tokens in order, so that a row that occurs often always
/// sums the same way, as on the CPU.
///
/// - `d_out`: `[tokens, hidden]`; `ids`: `[tokens]`, each in `0..vocab`, else the device is lost
/// - `d_weight`: `[vocab, hidden]`, f32, added to
pub fn embed_backward<E: Float>(device: &Device, d_out: View<E>, ids: View<i32>, hidden: usize, d_weight: ViewMut<f32>) -> Result<()> {
    add_rows(device, d_out, ids, hidden, d_weight, false)
}

/// Copies column `ids[t]` of `table` to row `t` of `out`.
///
/// - `table`: `[rows, vocab]`; `ids`: `[tokens]`, each in `0..vocab`, else the device is lost; `out`: `[tokens, rows]`
pub fn take_columns_of<E: Float>(device: &Device, table: View<E>, rows: usize, ids: View<i32>, mut out: ViewMut<E>) -> Result<()> {
    assert!(rows > 0 && table.len().is_multiple_of(rows), "embedding: a table of {} values in {rows} rows", table.len());
    let vocab = table.len() / rows;
    check(table.len(), vocab, rows, ids.len(), out.len());
    if ids.is_empty() {
        return Ok(());
    }
    let launch = Launch::new(device, "embedding", Variant::of::<E>(Program::Embedding), "take_columns_of")?;
    let launch = launch.read(table).read(ids).write(&mut out).int(vocab).int(rows);
    // SAFETY: the arguments are take_columns_of's. Block t reads ids[t] and one column of the table, which it checks, and writes row t.
    unsafe { launch.run((ids.len(), 1, 1), threads(rows), 0) }
}

/// The way back of [`take_columns_of`], as [`embed_backward`]: adds row `t` of `d_out` `[tokens, rows]` to column `ids[t]` of
/// `d_table` `[rows, vocab]`, f32.
pub fn add_to_columns_of<E: Float>(device: &Device, d_out: View<E>, ids: View<i32>, rows: usize, d_table: ViewMut<f32>) -> Result<()> {
    add_rows(device, d_out, ids, rows, d_table, true)
}

/// - `turned`: whether rows of the table are columns of `d_weight`
fn add_rows<E: Float>(
    device: &Device,
    d_out: View<E>,
    ids: View<i32>,
    hidden: usize,
    mut d_weight: ViewMut<f32>,
    turned: bool,
) -> Result<()> {
    assert!(hidden > 0 && d_weight.len().is_multiple_of(hidden), "embedding: a gradient of {} values in rows of {hidden}", d_weight.len());
    let vocab = d_weight.len() / hidden;
    check(d_weight.len(), vocab, hidden, ids.len(), d_out.len());
    if ids.is_empty() {
        return Ok(());
    }
    let launch = Launch::new(device, "embedding_backward", Variant::of::<E>(Program::Embedding), "embed_backward")?;
    let launch = launch.read(d_out).read(ids).write(&mut d_weight).int(ids.len()).int(vocab).int(hidden);
    let (row_stride, column_stride) = if turned { (1, vocab) } else { (hidden, 1) };
    let launch = launch.long(row_stride).long(column_stride);
    // SAFETY: the arguments are embed_backward's. A block writes the row of its token's id, which it checks, and only the
    // block of the id's first token does.
    unsafe { launch.run((ids.len(), 1, 1), 256, 0) }
}
