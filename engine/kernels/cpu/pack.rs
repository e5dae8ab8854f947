//! Rearranges operands for the tile product: rows into packed tiles, columns of tokens into tiles and panels, and weight
//! panels into those of the transposed weight. Copies only; nothing is computed.

use super::isa::Isa;
use super::tile::{Layout, PANEL_COLUMNS, TILE_ROWS, TILE_ROWS_MAX, TileElement};
#[cfg(target_arch = "x86_64")]
use super::{pack_256, split_f32};
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

/// Packs `rows`, of equal length, as one tile for products in form `isa`, which the processor must have.
pub(super) fn tile_of_rows_as<E: TileElement>(isa: Isa, rows: &[&[E]], out: &mut [E]) {
    let (count, k, layout) = (rows.len(), rows[0].len(), E::layout(isa));
    assert!((1..=layout.rows).contains(&count), "a tile of {count} rows");
    assert!(rows.iter().all(|row| row.len() == k), "rows of different lengths");
    assert_eq!(out.len(), layout.row_len::<E>(E::units(k)) * count, "a packed tile of {count} rows of {k}");
    #[cfg(target_arch = "x86_64")]
    if layout.is_split() {
        // SAFETY: a form that splits has AVX-512 F and BW; the length of `out` is asserted above.
        return unsafe { split_f32::tile_of_rows(&cast_rows(rows)[..count], bytemuck::cast_slice_mut(out)) };
    }
    if layout == Layout::WIDE {
        return tile_of_widened_rows(rows, bytemuck::cast_slice_mut(out));
    }
    if layout != Layout::UNITS {
        return tile_in_groups(rows, out);
    }
    let full_units = k / E::UNIT;
    let mut done = 0;
    if count == 1 {
        out[..k].copy_from_slice(rows[0]);
        done = full_units;
    }
    #[cfg(target_arch = "x86_64")]
    if isa >= Isa::Avx512 && count > 1 {
        // SAFETY: the processor has AVX-512 (`isa`); the rows hold `full_units` units each, and `out` at least
        // `full_units * count`, by the assertions.
        done = unsafe { tile_of_rows_avx512(rows, full_units, out) };
    } else if isa == Isa::Avx2 && count > 1 {
        // SAFETY: the processor has AVX2 (`isa`), where only f32 lies in units; the rows are of one length.
        done = unsafe { pack_256::tile_of_rows(&cast_rows(rows)[..count], bytemuck::cast_slice_mut(out)) };
    }
    let _ = isa;
    for u in done..E::units(k) {
        for (r, row) in rows.iter().enumerate() {
            let unit = &mut out[(u * count + r) * E::UNIT..][..E::UNIT];
            for (i, value) in unit.iter_mut().enumerate() {
                *value = row.get(u * E::UNIT + i).copied().unwrap_or_default();
            }
        }
    }
}

/// Rows as rows of the type they are known to have.
fn cast_rows<'a, E: TileElement, F: TileElement>(rows: &[&'a [E]]) -> [&'a [F]; TILE_ROWS_MAX] {
    let mut cast: [&[F]; TILE_ROWS_MAX] = [&[]; TILE_ROWS_MAX];
    cast.iter_mut().zip(rows).for_each(|(cast, row)| *cast = bytemuck::cast_slice(row));
    cast
}

/// Packs rows of bf16 pair by pair, as f32; without AVX2 there is no such layout in use.
fn tile_of_widened_rows<E: TileElement>(rows: &[&[E]], out: &mut [f32]) {
    let (count, units) = (rows.len(), E::units(rows[0].len()));
    let mut done = 0;
    #[cfg(target_arch = "x86_64")]
    if Isa::best() >= Isa::Avx2 {
        // SAFETY: the processor has AVX2; the rows, of bf16, are of one length.
        done = unsafe { pack_256::tile_of_widened_rows(&cast_rows(rows)[..count], out) };
    }
    for (u, unit) in out.chunks_exact_mut(2 * count).enumerate().take(units).skip(done) {
        for (pair, row) in unit.as_chunks_mut::<2>().0.iter_mut().zip(rows) {
            *pair = std::array::from_fn(|i| row.get(2 * u + i).map_or(0.0, |value| value.to_f32()));
        }
    }
}

/// Values of a group on AMX.
const GROUP: usize = 32;

/// Packs rows of bf16 group by group: 64 bytes of each row side by side.
fn tile_in_groups<E: TileElement>(rows: &[&[E]], out: &mut [E]) {
    // Some neighbouring groups of a row at a time: whole lines of the row are read one after the other, and the lines
    // written do not all fall into the same set of the first cache.
    const AT_ONCE: usize = 4 * GROUP;
    let (count, k) = (rows.len(), rows[0].len());
    for from in (0..k).step_by(AT_ONCE) {
        for (r, row) in rows.iter().enumerate() {
            for (g, values) in row[from..k.min(from + AT_ONCE)].chunks(GROUP).enumerate() {
                let group: &mut [E; GROUP] = out[((from / GROUP + g) * count + r) * GROUP..].first_chunk_mut().expect("a whole group");
                match values.first_chunk() {
                    Some(whole) => *group = *whole,
                    None => {
                        group[..values.len()].copy_from_slice(values);
                        group[values.len()..].fill(E::default());
                    }
                }
            }
        }
    }
}

/// Packs the first units, a multiple of 16; returns how many.
///
/// # Safety
/// The processor has AVX-512; `rows` (at most 12) hold `units` units each and `out` `units * rows.len()`.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn tile_of_rows_avx512<E: TileElement>(rows: &[&[E]], units: usize, out: &mut [E]) -> usize {
    let count = rows.len();
    let total = units * count;
    let target = out.as_mut_ptr().cast::<i32>();
    let mut square = [_mm512_setzero_si512(); 16];
    for u in (0..units / 16 * 16).step_by(16) {
        for (slot, row) in square.iter_mut().zip(rows) {
            // SAFETY: units `u` to `u + 15` lie inside the row; a unit is 4 bytes.
            *slot = unsafe { _mm512_loadu_si512(row.as_ptr().add(u * E::UNIT).cast()) };
        }
        square[count..].fill(_mm512_setzero_si512());
        let columns = transposed(square);
        for (i, column) in columns.iter().enumerate() {
            let at = (u + i) * count;
            if at + 16 <= total {
                // What this writes past the unit is overwritten by the units that follow.
                // SAFETY: the 16 units from `at` lie inside `out`.
                unsafe { _mm512_storeu_si512(target.add(at).cast(), *column) };
            } else {
                // SAFETY: only the first `count` units from `at` are written, and they lie inside `out`.
                unsafe { _mm512_mask_storeu_epi32(target.add(at), (1u16 << count) - 1, *column) };
            }
        }
    }
    units / 16 * 16
}

/// The transpose of 16 x 16 values of 4 bytes.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
pub(super) fn transposed(rows: [__m512i; 16]) -> [__m512i; 16] {
    let mut pairs = rows;
    for i in 0..8 {
        pairs[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
        pairs[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
    }
    // fours[4g + c], 128-bit lane l: column 4l + c of rows 4g to 4g + 3.
    let mut fours = pairs;
    for g in 0..4 {
        fours[4 * g] = _mm512_unpacklo_epi64(pairs[4 * g], pairs[4 * g + 2]);
        fours[4 * g + 1] = _mm512_unpackhi_epi64(pairs[4 * g], pairs[4 * g + 2]);
        fours[4 * g + 2] = _mm512_unpacklo_epi64(pairs[4 * g + 1], pairs[4 * g + 3]);
        fours[4 * g + 3] = _mm512_unpackhi_epi64(pairs[4 * g + 1], pairs[4 * g + 3]);
    }
    let mut columns = fours;
    for c in 0..4 {
        let even_top = _mm512_shuffle_i32x4::<0x88>(fours[c], fours[4 + c]);
        let odd_top = _mm512_shuffle_i32x4::<0xdd>(fours[c], fours[4 + c]);
        let even_bottom = _mm512_shuffle_i32x4::<0x88>(fours[8 + c], fours[12 + c]);
        let odd_bottom = _mm512_shuffle_i32x4::<0xdd>(fours[8 + c], fours[12 + c]);
        columns[c] = _mm512_shuffle_i32x4::<0x88>(even_top, even_bottom);
        columns[4 + c] = _mm512_shuffle_i32x4::<0x88>(odd_top, odd_bottom);
        columns[8 + c] = _mm512_shuffle_i32x4::<0xdd>(even_top, even_bottom);
        columns[12 + c] = _mm512_shuffle_i32x4::<0xdd>(odd_top, odd_bottom);
    }
    columns
}

/// Transposes one 32 x 32 block of a weight panel: outputs become the reduction index, inputs the columns.
///
/// - `block`: `height` (1 to 32) inputs of a panel, `[units(height)][32][UNIT]`; inputs past `height` count as zero
/// - `out`: `[32 / UNIT][32][UNIT]`, with outputs running down and inputs across
pub(super) fn transposed_block<E: TileElement>(isa: Isa, block: &[E], height: usize, out: &mut [E]) {
    assert!((1..=PANEL_COLUMNS).contains(&height), "a block of {height} inputs");
    assert_eq!(block.len(), E::units(height) * PANEL_COLUMNS * E::UNIT, "a block of {height} inputs");
    assert_eq!(out.len(), PANEL_COLUMNS * PANEL_COLUMNS, "a transposed block");
    #[cfg(target_arch = "x86_64")]
    if isa >= Isa::Avx512 {
        // SAFETY: the processor has AVX-512 F and BW (`isa`); the lengths are asserted above.
        unsafe { transposed_block_avx512(block, out) };
        return;
    }
    #[cfg(target_arch = "x86_64")]
    if isa == Isa::Avx2 {
        let (block, out) = (bytemuck::cast_slice(block), bytemuck::cast_slice_mut(out));
        // SAFETY: the processor has AVX2 (`isa`); the lengths are asserted above.
        unsafe {
            if E::UNIT == 1 { pack_256::transposed_block::<false>(block, out) } else { pack_256::transposed_block::<true>(block, out) }
        };
        return;
    }
    let _ = isa;
    for column in 0..PANEL_COLUMNS {
        for row in 0..PANEL_COLUMNS {
            let value = block.get((column / E::UNIT * PANEL_COLUMNS + row) * E::UNIT + column % E::UNIT);
            out[(row / E::UNIT * PANEL_COLUMNS + column) * E::UNIT + row % E::UNIT] = value.copied().unwrap_or_default();
        }
    }
}

/// # Safety
/// The processor has AVX-512 F and BW; `block` is a whole number of rows of 32 units; `out` has 32 x 32 elements.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn transposed_block_avx512<E: TileElement>(block: &[E], out: &mut [E]) {
    let rows = block.len() / (PANEL_COLUMNS * E::UNIT);
    let (source, target) = (block.as_ptr().cast::<i32>(), out.as_mut_ptr().cast::<i32>());
    for top in (0..PANEL_COLUMNS / E::UNIT).step_by(16) {
        for left in [0, 16] {
            let mut square = [_mm512_setzero_si512(); 16];
            for (i, slot) in square.iter_mut().enumerate().take(rows.saturating_sub(top)) {
                // SAFETY: row `top + i` is below `rows`, so its 16 units from `left` lie inside `block`.
                *slot = unsafe { _mm512_loadu_si512(source.add((top + i) * PANEL_COLUMNS + left).cast()) };
            }
            let columns = transposed(square);
            if E::UNIT == 1 {
                for (i, column) in columns.iter().enumerate() {
                    // SAFETY: row `left + i` and the 16 columns from `top` lie inside the 32 x 32 elements of `out`.
                    unsafe { _mm512_storeu_si512(target.add((left + i) * PANEL_COLUMNS + top).cast(), *column) };
                }
                continue;
            }
            // Each of `columns` holds the 32 inputs of one output.
            for (i, pair) in columns.chunks_exact(2).enumerate() {
                let (at, [low, high]) = ((left / 2 + i) * PANEL_COLUMNS, dealt(pair[0], pair[1]));
                // SAFETY: row `left / 2 + i` is one of the 16 rows of 32 units of `out`.
                unsafe {
                    _mm512_storeu_si512(target.add(at).cast(), low);
                    _mm512_storeu_si512(target.add(at + 16).cast(), high);
                }
            }
        }
    }
}

/// Two rows of 32 values of 2 bytes dealt out alternately: 32 pairs.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn dealt(even: __m512i, odd: __m512i) -> [__m512i; 2] {
    let low = _mm512_set_epi16(
        47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0,
    );
    let high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    [_mm512_permutex2var_epi16(even, low, odd), _mm512_permutex2var_epi16(even, high, odd)]
}

/// Packs the columns of a row-major matrix, whose rows are tokens, as the rows of a product over tokens in form `isa`, which
/// the processor must have: into tiles of its [`Layout`], one after the other.
///
/// - `token(i)`: the `width` wanted values of token `i`, for `i` below `count`
pub(super) fn tiles_of_columns<'a, E: TileElement>(isa: Isa, token: impl Fn(usize) -> &'a [E], count: usize, width: usize, out: &mut [E]) {
    let layout = E::layout(isa);
    if layout == Layout::UNITS {
        return columns_of_tokens::<E, TILE_ROWS>(isa, token, count, width, false, out);
    }
    if layout == Layout::WIDE {
        return widened_columns_of_tokens(token, count, width, bytemuck::cast_slice_mut(out));
    }
    let row_len = layout.row_len::<E>(E::units(count));
    assert_eq!(out.len(), width * row_len, "{width} packed rows of {count}");
    for from in (0..count).step_by(GROUP) {
        let mut rows: [&[E]; GROUP] = [&[]; GROUP];
        for (i, row) in rows.iter_mut().enumerate().take(count - from) {
            *row = token(from + i);
            assert_eq!(row.len(), width, "values of a token");
        }
        for left in (0..width).step_by(layout.rows) {
            let columns = layout.rows.min(width - left);
            let group_len = layout.group_len::<E>();
            let group = &mut out[left * row_len + from / GROUP * columns * group_len..][..columns * group_len];
            #[cfg(target_arch = "x86_64")]
            if layout.is_split() {
                // SAFETY: a form that splits has AVX-512 F and BW; each token has `columns` values from `left`, or none, and
                // `group` a row of a group for each of them.
                unsafe { split_f32::group_of_columns(&rows.map(bytemuck::cast_slice), left, columns, bytemuck::cast_slice_mut(group)) };
                continue;
            }
            #[cfg(target_arch = "x86_64")]
            if size_of::<E>() == 2 {
                // SAFETY: a form in groups has AVX-512 F and BW; `group` has `columns`, at most 32, rows of 32 values, and
                // each token has `columns` values from `left`, or none.
                unsafe { group_of_columns(&rows, left, columns, group) };
                continue;
            }
            for (j, row) in group.chunks_exact_mut(GROUP).enumerate() {
                row.iter_mut().zip(&rows).for_each(|(value, token)| *value = token.get(left + j).copied().unwrap_or_default());
            }
        }
    }
}

/// As [`columns_of_tokens`] into tiles of 12 columns, for bf16 that is packed as f32.
fn widened_columns_of_tokens<'a, E: TileElement>(token: impl Fn(usize) -> &'a [E], count: usize, width: usize, out: &mut [f32]) {
    const GROUP: usize = 16;
    let units = E::units(count);
    for from in (0..units).step_by(GROUP) {
        let group = GROUP.min(units - from);
        let mut rows: [[&[E]; 2]; GROUP] = [[&[]; 2]; GROUP];
        for (i, row) in rows.as_flattened_mut().iter_mut().enumerate().take((2 * group).min(count - 2 * from)) {
            *row = token(2 * from + i);
            assert_eq!(row.len(), width, "values of a token");
        }
        for left in (0..width).step_by(TILE_ROWS) {
            let columns = TILE_ROWS.min(width - left);
            let tile = &mut out[(left * units + from * columns) * 2..][..group * columns * 2];
            for (unit, [even, odd]) in tile.chunks_exact_mut(2 * columns).zip(&rows) {
                #[cfg(target_arch = "x86_64")]
                if columns == TILE_ROWS && !odd.is_empty() && Isa::best() >= Isa::Avx2 {
                    let [even, odd] = [even, odd].map(|row| bytemuck::cast_slice(row)[left..].first_chunk().expect("a full tile"));
                    // SAFETY: the processor has AVX2.
                    unsafe { pack_256::widened_columns(even, odd, unit.first_chunk_mut().expect("a full tile")) };
                    continue;
                }
                for (j, pair) in unit.as_chunks_mut::<2>().0.iter_mut().enumerate() {
                    *pair = [even, odd].map(|row| row.get(left + j).map_or(0.0, |value| value.to_f32()));
                }
            }
        }
    }
}

/// Turns `columns` values, from `left`, of up to 32 tokens into as many rows of 32 tokens.
///
/// # Safety
/// The processor has AVX-512 F and BW; `E` has 2 bytes; `columns` is at most 32; each of `tokens` is empty, which counts as
/// zeros, or holds `left + columns` values; `out` has `columns * 32` values.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn group_of_columns<E: TileElement>(tokens: &[&[E]; GROUP], left: usize, columns: usize, out: &mut [E]) {
    let mask = if columns == GROUP { u32::MAX } else { (1 << columns) - 1 };
    let load = |token: &[E]| match token.len() {
        0 => _mm512_setzero_si512(),
        // SAFETY: the mask lets `columns` values from `left` be read, which the token holds.
        _ => unsafe { _mm512_maskz_loadu_epi16(mask, token.as_ptr().add(left).cast()) },
    };
    let mut halves = [[_mm512_setzero_si512(); 16]; 2];
    for (u, pair) in tokens.chunks_exact(2).enumerate() {
        let [low, high] = dealt(load(pair[0]), load(pair[1]));
        halves[0][u] = low;
        halves[1][u] = high;
    }
    for (half, rows) in halves.into_iter().zip(out.chunks_mut(16 * GROUP)) {
        for (row, values) in rows.chunks_exact_mut(GROUP).zip(transposed(half)) {
            // SAFETY: a row has 32 values of 2 bytes.
            unsafe { _mm512_storeu_si512(row.as_mut_ptr().cast(), values) };
        }
    }
}

/// Pairs 32 values, from `left`, of each two tokens.
///
/// # Safety
/// The processor has AVX-512 F and BW; `E` has 2 bytes; `out` is a number of units of 32 pairs; of the first tokens, two for
/// each unit, each is empty, which counts as zeros, or holds `left + 32` values.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn panel_of_tokens<E: TileElement>(tokens: &[&[E]], left: usize, out: &mut [E]) {
    let load = |token: &[E]| match token.len() {
        0 => _mm512_setzero_si512(),
        // SAFETY: the token holds 32 values from `left`.
        _ => unsafe { _mm512_loadu_si512(token.as_ptr().add(left).cast()) },
    };
    for (unit, pair) in out.chunks_exact_mut(2 * PANEL_COLUMNS).zip(tokens.chunks_exact(2)) {
        let [low, high] = dealt(load(pair[0]), load(pair[1]));
        // SAFETY: a unit has 32 pairs of 4 bytes.
        unsafe {
            _mm512_storeu_si512(unit.as_mut_ptr().cast(), low);
            _mm512_storeu_si512(unit.as_mut_ptr().add(PANEL_COLUMNS).cast(), high);
        }
    }
}

/// Packs columns of a row-major matrix so that its rows, tokens, are the reduction index: into tiles of `WIDTH` columns,
/// one after the other, each `[units(count)][columns][UNIT]`. With `padded`, the last tile has `WIDTH` columns too, zero
/// past the given ones, as panels do; else it is as narrow as what is left.
///
/// - `token(i)`: the `width` wanted values of token `i`, for `i` below `count`
pub(super) fn columns_of_tokens<'a, E: TileElement, const WIDTH: usize>(
    isa: Isa,
    token: impl Fn(usize) -> &'a [E],
    count: usize,
    width: usize,
    padded: bool,
    out: &mut [E],
) {
    const GROUP: usize = 16;
    let _ = isa;
    let units = E::units(count);
    // A few tokens at a time, all columns of each: whole lines of the matrix are read once, and written in runs.
    for from in (0..units).step_by(GROUP) {
        let group = GROUP.min(units - from);
        let mut rows: [&[E]; 2 * GROUP] = [&[]; 2 * GROUP];
        for (i, row) in rows.iter_mut().enumerate().take((group * E::UNIT).min(count - from * E::UNIT)) {
            *row = token(from * E::UNIT + i);
            assert_eq!(row.len(), width, "values of a token");
        }
        for left in (0..width).step_by(WIDTH) {
            let full = left + WIDTH <= width;
            let columns = if full || padded { WIDTH } else { width - left };
            let tile = &mut out[(left * units + from * columns) * E::UNIT..][..group * columns * E::UNIT];
            #[cfg(target_arch = "x86_64")]
            if E::UNIT == 2 && WIDTH == PANEL_COLUMNS && full && isa >= Isa::Avx512 {
                // SAFETY: the processor has AVX-512 F and BW (`isa`); `tile` has `group` units of 32 pairs, and each of the
                // `rows` before them is empty, which counts as zeros, or holds 32 values of 2 bytes from `left`.
                unsafe { panel_of_tokens(&rows, left, tile) };
                continue;
            }
            for (unit, tokens) in tile.chunks_exact_mut(columns * E::UNIT).zip(rows.chunks_exact(E::UNIT)) {
                match *tokens {
                    [only] if full => {
                        let only = only[left..].first_chunk::<WIDTH>().expect("a full tile");
                        *unit.first_chunk_mut().expect("a full tile") = *only;
                    }
                    [even, odd] if full && !odd.is_empty() => {
                        // Fixed lengths, so that this becomes a few loads, unpacks and stores.
                        let [even, odd] = [even, odd].map(|row| row[left..].first_chunk::<WIDTH>().expect("a full tile"));
                        let pairs = unit.as_chunks_mut::<2>().0.first_chunk_mut::<WIDTH>().expect("a full tile");
                        for j in 0..WIDTH {
                            pairs[j] = [even[j], odd[j]];
                        }
                    }
                    _ => {
                        for (j, values) in unit.chunks_exact_mut(E::UNIT).enumerate() {
                            for (value, token) in values.iter_mut().zip(tokens) {
                                *value = token.get(left + j).copied().unwrap_or_default();
                            }
                        }
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;

    fn forms() -> impl Iterator<Item = Isa> {
        Isa::ALL.into_iter().filter(|isa| *isa <= Isa::best())
    }

    fn value<E: TileElement>(i: usize) -> E {
        E::from_f32((i % 255) as f32 + 1.0)
    }

    fn tiles<E: TileElement>() {
        for isa in forms() {
            let layout = E::layout(isa);
            if layout.is_split() {
                continue; // split_f32.rs tests how split values lie.
            }
            let (group, is_wide) = (layout.units * E::UNIT, layout == Layout::WIDE);
            for count in 1..=layout.rows {
                for k in [1, 2, 15, 33, 64, 101, 160] {
                    let rows: Vec<Vec<E>> = (0..count).map(|r| (0..k).map(|i| value(r * 31 + i)).collect()).collect();
                    let rows: Vec<&[E]> = rows.iter().map(Vec::as_slice).collect();
                    let mut out = vec![value::<E>(7); layout.row_len::<E>(E::units(k)) * count];
                    tile_of_rows_as(isa, &rows, &mut out);
                    let wide: Vec<E>;
                    let out = if is_wide {
                        wide = bytemuck::cast_slice::<E, f32>(&out).iter().map(|value| E::from_f32(*value)).collect();
                        &wide
                    } else {
                        &out
                    };
                    assert_eq!(out.len(), E::units(k).div_ceil(layout.units) * layout.units * E::UNIT * count);
                    for (at, got) in out.iter().enumerate() {
                        let (g, r, i) = (at / group / count, at / group % count, at % group);
                        assert_eq!(*got, rows[r].get(g * group + i).copied().unwrap_or_default(), "{isa:?} {count} x {k} at {at}");
                    }
                }
            }
        }
    }

    fn blocks<E: TileElement>() {
        for isa in forms() {
            for height in [1, 2, 9, 16, 17, 32] {
                let mut block: Vec<E> = (0..E::units(height) * PANEL_COLUMNS * E::UNIT).map(value).collect();
                if height % E::UNIT == 1 {
                    let last = (E::units(height) - 1) * PANEL_COLUMNS * E::UNIT;
                    block[last..].iter_mut().skip(1).step_by(2).for_each(|v| *v = E::default());
                }
                let mut out = vec![value::<E>(7); PANEL_COLUMNS * PANEL_COLUMNS];
                transposed_block(isa, &block, height, &mut out);
                for (output, input) in (0..32).flat_map(|output| (0..32).map(move |input| (output, input))) {
                    let got = out[(output / E::UNIT * 32 + input) * E::UNIT + output % E::UNIT];
                    let want =
                        if input < height { block[(input / E::UNIT * 32 + output) * E::UNIT + input % E::UNIT] } else { E::default() };
                    assert_eq!(got, want, "{isa:?} height {height} output {output} input {input}");
                }
            }
        }
    }

    #[test]
    fn every_form_packs_the_same_tile() {
        tiles::<f32>();
        tiles::<bf16>();
    }

    #[test]
    fn every_form_transposes_a_block() {
        blocks::<f32>();
        blocks::<bf16>();
    }

    /// The columns of a matrix as rows of a product are what packing the rows of its transpose gives.
    fn turned<E: TileElement>() {
        for isa in forms() {
            let layout = E::layout(isa);
            for (count, width) in [(1, 1), (2, 12), (33, 40), (7, 64), (50, 25), (64, 33), (95, 100)] {
                let matrix: Vec<E> = (0..count * width).map(value).collect();
                let row_len = layout.row_len::<E>(E::units(count));
                let (mut got, mut want) = (vec![value::<E>(7); width * row_len], vec![value::<E>(9); width * row_len]);
                tiles_of_columns(isa, |t| &matrix[t * width..(t + 1) * width], count, width, &mut got);
                let rows: Vec<Vec<E>> = (0..width).map(|j| (0..count).map(|t| matrix[t * width + j]).collect()).collect();
                for (tile, rows) in want.chunks_mut(layout.rows * row_len).zip(rows.chunks(layout.rows)) {
                    tile_of_rows_as(isa, &rows.iter().map(Vec::as_slice).collect::<Vec<_>>(), tile);
                }
                assert!(got == want, "{isa:?} {} {count} x {width}", E::DTYPE);
            }
        }
    }

    #[test]
    fn every_form_turns_columns_into_rows() {
        turned::<f32>();
        turned::<bf16>();
    }

    fn columns<E: TileElement, const WIDTH: usize>(isa: Isa, padded: bool) {
        for (count, width) in [(1, 1), (2, 12), (33, 40), (7, 64), (50, 25)] {
            let matrix: Vec<E> = (0..count * width).map(value).collect();
            let (units, last) = (E::units(count), if padded { width.next_multiple_of(WIDTH) } else { width });
            let mut out = vec![value::<E>(7); units * last * E::UNIT];
            columns_of_tokens::<E, WIDTH>(isa, |t| &matrix[t * width..(t + 1) * width], count, width, padded, &mut out);
            for (t, j) in (0..units * E::UNIT).flat_map(|t| (0..last).map(move |j| (t, j))) {
                let left = j / WIDTH * WIDTH;
                let tile_width = WIDTH.min(last - left);
                let got = out[(left * units + t / E::UNIT * tile_width + j % WIDTH) * E::UNIT + t % E::UNIT];
                let want = if t < count && j < width { matrix[t * width + j] } else { E::default() };
                assert_eq!(got, want, "{} {count} x {width}: token {t} column {j}", E::DTYPE);
            }
        }
    }

    #[test]
    fn tokens_become_the_reduction_index() {
        for isa in forms() {
            columns::<f32, 12>(isa, false);
            columns::<bf16, 12>(isa, false);
            columns::<f32, 32>(isa, true);
            columns::<bf16, 32>(isa, true);
        }
    }
}
