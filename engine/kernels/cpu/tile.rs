//! The innermost step of every matrix product: a tile of up to 12 rows (AMX: 16) times a panel of 32 columns, added up in
//! registers. Knows addresses and strides, not matrices; gemm.rs chooses what to multiply.
//!
//! Each of the tile's elements is one chain along the reduction index, in one lane, from zero or from the value already in
//! `c`: of fused multiply-adds unit by unit, or, on AMX, of groups of 32 values (amx.rs). So its bits depend neither on the
//! height of the tile nor on where a long reduction is cut into several calls, provided that it is cut between groups. The
//! forms differ from each other in rounding (the portable one does not fuse, `vdpbf16ps` takes two products at a time, AMX
//! 32), but every form keeps this law.

use super::isa::Isa;
use crate::kernels::element::Float;

/// Most rows of a tile on vector registers: 12 x 2 sums, 2 vectors of the panel and a broadcast fill the 32 of AVX-512.
pub const TILE_ROWS: usize = 12;

/// Most rows of a tile in any form.
pub(super) const TILE_ROWS_MAX: usize = 16;

/// Columns of a panel and of a tile: two AVX-512 vectors of f32.
pub const PANEL_COLUMNS: usize = 32;

/// An element in which matrix products are computed: f32, or bf16 with sums in f32.
///
/// Operands are made of *units* of 4 bytes along the reduction index: one f32, or a pair of bf16 (zero past the end).
pub trait TileElement: Float {
    /// Values in a unit.
    const UNIT: usize;

    /// Units that hold `count` values.
    fn units(count: usize) -> usize {
        count.div_ceil(Self::UNIT)
    }

    /// How rows lie for form `isa`.
    fn layout(_isa: Isa) -> Layout {
        Layout::UNITS
    }

    /// Computes `panels` neighbouring tiles of `rows` rows in form `isa`.
    ///
    /// # Safety
    /// The processor has `isa`; `rows` is 1 to the most of its [`Layout`], `panels` 1, or at most the layout's
    /// [`panels_abreast`](Layout::panels_abreast) of `rows`; every address that `args` describes is valid, that of `c` for
    /// writing by this thread alone. Where groups have more than one unit, those of `a` are whole, with zeros past the last
    /// unit, and a unit of the panel follows the one before.
    unsafe fn tile(isa: Isa, rows: usize, panels: usize, args: &TileArgs<Self>);
}

/// How the packed rows of a product lie: in tiles of `rows` rows, one after the other, the last as high as what is left;
/// each tile is `[groups of the reduction][its rows][units of a group]`. Units past the last, in its group, are zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    pub(super) rows: usize,
    /// Units of a group. A reduction may be cut between groups and nowhere else.
    pub(super) units: usize,
    /// Bytes that stand for a unit: 4, or more where values are widened or split (split_f32.rs).
    pub(super) unit_bytes: usize,
}

impl Layout {
    /// For vector registers, which take the units of all rows one after the other.
    pub(super) const UNITS: Self = Self { rows: TILE_ROWS, units: 1, unit_bytes: 4 };

    /// For vector registers that multiply f32 only: a pair of bf16 is packed as two f32, so that a value can be broadcast from
    /// memory, and the panel's pairs are widened in registers.
    pub(super) const WIDE: Self = Self { rows: TILE_ROWS, units: 1, unit_bytes: 8 };

    /// For AMX, whose tile registers hold 16 units of a row side by side.
    #[cfg(target_arch = "x86_64")]
    pub(super) const AMX: Self = Self { rows: super::amx::TILE_ROWS, units: super::amx::GROUP_UNITS, unit_bytes: 4 };

    /// For f32 on AMX, which takes each value as three of bf16.
    #[cfg(target_arch = "x86_64")]
    pub(super) const SPLIT: Self =
        Self { rows: super::amx::TILE_ROWS, units: super::split_f32::GROUP_UNITS, unit_bytes: super::split_f32::UNIT_BYTES };

    /// Whether products run on vector registers, a unit at a time.
    pub(super) const fn is_for_vectors(self) -> bool {
        self.units == 1
    }

    /// Whether values are split, those of a panel too, block by block, before they are multiplied.
    pub(super) const fn is_split(self) -> bool {
        self.units > 1 && self.unit_bytes > 4
    }

    /// Elements that a group takes in a packed row.
    pub(super) const fn group_len<E>(self) -> usize {
        self.units * self.unit_bytes / size_of::<E>()
    }

    /// Elements of a packed row of `units`, in whole groups.
    pub(super) const fn row_len<E>(self, units: usize) -> usize {
        units.div_ceil(self.units) * self.group_len::<E>()
    }

    /// Panels that a tile of `rows` rows computes side by side: enough sums to hide the latency of an addition.
    pub(super) const fn panels_abreast(self, rows: usize) -> usize {
        match rows {
            _ if self.units > 1 => 1,
            1 | 2 => 4,
            3 | 4 => 2,
            _ => 1,
        }
    }
}

/// Addresses of a tile; strides count elements.
pub struct TileArgs<E> {
    pub(super) a: *const E,
    /// From a row of `a` to the next.
    pub(super) a_row: usize,
    /// From a group of units of `a` to the next; in most forms a group is one unit ([`Layout`]).
    pub(super) a_unit: usize,
    pub(super) b: *const E,
    /// From a unit of the panel (32 columns of [`TileElement::UNIT`] values) to the next.
    pub(super) b_unit: usize,
    /// From a panel to the next.
    pub(super) b_panel: usize,
    /// Columns of each panel: 32, or as [`strip_columns`] says.
    pub(super) columns: usize,
    pub(super) c: *mut f32,
    pub(super) c_row: usize,
    pub(super) c_panel: usize,
    pub(super) units: usize,
    /// What is asked for ahead of time, into the second cache: with each unit the lines here that those of the unit are at `b`.
    /// Any address will do.
    pub(super) ahead: *const E,
    /// Bytes from what is asked for with a unit to what is with the next.
    pub(super) ahead_unit: usize,
    /// Start from what `c` holds, not from zero.
    pub(super) add: bool,
}

impl<E> TileArgs<E> {
    /// Whether with each unit as much is asked for as it has, since no other tile does.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn asks_alone(&self) -> bool {
        self.ahead_unit == self.b_unit * size_of::<E>()
    }
}

/// How far ahead a panel is asked for that one tile alone meets: 4 KiB. A few rows are done with a unit before the next one has
/// come from memory.
pub(super) const AHEAD_UNITS: usize = 32;

/// Calls `$tile::<ROWS, $vectors>($args)` for the constant that equals `$rows`.
#[cfg(target_arch = "x86_64")]
macro_rules! for_rows {
    ($rows:expr, $tile:ident, $vectors:literal, $args:expr, [$($count:literal),*]) => {
        match $rows {
            $($count => $tile::<$count, $vectors>($args),)*
            rows => unreachable!("a tile of {rows} rows"),
        }
    };
}
#[cfg(target_arch = "x86_64")]
pub(super) use for_rows;

/// Defines `$tile`, the AVX-512 tile of `ROWS` rows and `VECTORS` vectors of 16 columns, and `$run`, which picks its
/// constants. `$step` adds the product of a unit of `a`, broadcast, and 16 units of the panel to a vector of sums.
#[cfg(target_arch = "x86_64")]
macro_rules! tile_avx512 {
    ($run:ident, $tile:ident, $element:ty, $features:literal, |$sum:ident, $a:ident, $b:ident| $step:expr) => {
        /// # Safety
        /// As [`TileElement::tile`].
        #[target_feature(enable = $features)]
        unsafe fn $tile<const ROWS: usize, const VECTORS: usize>(args: &TileArgs<$element>) {
            const UNIT: usize = <$element as TileElement>::UNIT;
            let TileArgs {
                a: mut at, a_row, a_unit, b: mut bt, b_unit, b_panel, c, c_row, c_panel, units, mut ahead, ahead_unit, add, ..
            } = *args;
            // Where vector `v` of 16 columns lies: two to a panel.
            let b_vector = |v: usize| (v / 2) * b_panel + (v % 2) * 16 * UNIT;
            let c_vector = |r: usize, v: usize| r * c_row + (v / 2) * c_panel + (v % 2) * 16;
            let mut sums = [[_mm512_setzero_ps(); VECTORS]; ROWS];
            // SAFETY: the caller vouches for every address: `units` units of `ROWS` rows of `a` and of `VECTORS * 16`
            // columns of the panels, and the tile `c`. Loads and stores ask no alignment.
            unsafe {
                if add {
                    for (r, row) in sums.iter_mut().enumerate() {
                        for (v, sum) in row.iter_mut().enumerate() {
                            *sum = _mm512_loadu_ps(c.add(c_vector(r, v)));
                        }
                    }
                }
                for _ in 0..units {
                    let mut columns = [_mm512_setzero_si512(); VECTORS];
                    for (v, column) in columns.iter_mut().enumerate() {
                        _mm_prefetch::<_MM_HINT_T1>(ahead.wrapping_add(b_vector(v)).cast());
                        *column = _mm512_loadu_si512(bt.add(b_vector(v)).cast());
                    }
                    for (r, row) in sums.iter_mut().enumerate() {
                        let $a = _mm512_set1_epi32(at.add(r * a_row).cast::<i32>().read_unaligned());
                        for (sum, &$b) in row.iter_mut().zip(&columns) {
                            let $sum = *sum;
                            *sum = $step;
                        }
                    }
                    at = at.wrapping_add(a_unit);
                    bt = bt.wrapping_add(b_unit);
                    ahead = ahead.wrapping_byte_add(ahead_unit);
                }
                for (r, row) in sums.iter().enumerate() {
                    for (v, sum) in row.iter().enumerate() {
                        _mm512_storeu_ps(c.add(c_vector(r, v)), *sum);
                    }
                }
            }
        }

        /// # Safety
        /// As [`TileElement::tile`].
        #[target_feature(enable = $features)]
        unsafe fn $run(rows: usize, panels: usize, args: &TileArgs<$element>) {
            // SAFETY: the caller's promise, passed on.
            unsafe {
                match panels {
                    1 => for_rows!(rows, $tile, 2, args, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]),
                    2 => for_rows!(rows, $tile, 4, args, [1, 2, 3, 4]),
                    3 => for_rows!(rows, $tile, 6, args, [1, 2]),
                    4 => for_rows!(rows, $tile, 8, args, [1, 2]),
                    _ => unreachable!("{panels} panels abreast"),
                }
            }
        }
    };
}
#[cfg(target_arch = "x86_64")]
pub(super) use tile_avx512;

/// Columns of a panel that all rows, `rows` of them, are multiplied by before the next: on AVX2, where pieces of a tile are half
/// as wide as a panel (but those of f32, when there is more than one tile), the columns of a piece, since a longer part of them
/// fits the first cache.
pub(super) const fn strip_columns<E: TileElement>(isa: Isa, rows: usize) -> usize {
    let is_wide = rows <= 3 || E::UNIT == 1 && rows > TILE_ROWS;
    if matches!(isa, Isa::Avx2) && !is_wide { PANEL_COLUMNS / 2 } else { PANEL_COLUMNS }
}

/// Where a piece of a tile lies: what is not as in the [`TileArgs`] of the tile.
pub(super) struct Piece<E> {
    pub(super) a: *const E,
    pub(super) b: *const E,
    pub(super) c: *mut f32,
    pub(super) ahead: *const E,
    pub(super) ahead_unit: usize,
}

/// Cuts a tile of `$rows` rows into pieces of at most `$most` rows, as equal as they can be, and `$width` columns, for forms with
/// fewer or narrower registers. `$piece` computes one of `$count` rows. For a full tile the cuts are constants: the divisions took
/// a hundredth of the time.
macro_rules! tile_in_pieces {
    ($rows:expr, $panels:expr, $args:expr, $width:literal, $most:literal, $unit:expr, $pieces:tt) => {
        if $rows == $crate::kernels::cpu::tile::TILE_ROWS && $args.columns == $crate::kernels::cpu::tile::PANEL_COLUMNS {
            use $crate::kernels::cpu::tile::{PANEL_COLUMNS, TILE_ROWS};
            tile_in_pieces!(@cut TILE_ROWS, PANEL_COLUMNS, $panels, $args, $width, $most, $unit, $pieces)
        } else {
            tile_in_pieces!(@cut $rows, $args.columns, $panels, $args, $width, $most, $unit, $pieces)
        }
    };
    (@cut $rows:expr, $columns:expr, $panels:expr, $args:expr, $width:literal, $most:literal, $unit:expr, [$($count:literal => $piece:expr),*]) => {{
        let step = $rows.div_ceil($rows.div_ceil($most));
        // Each piece asks for its share of what lies ahead.
        let ahead_unit = $args.ahead_unit / ($columns / $width * $rows.div_ceil(step));
        for panel in 0..$panels {
            let mut ahead = $args.ahead.wrapping_add(panel * $args.b_panel);
            for left in (0..$columns).step_by($width) {
                for top in (0..$rows).step_by(step) {
                    let at = Piece {
                        a: $args.a.wrapping_add(top * $args.a_row),
                        b: $args.b.wrapping_add(panel * $args.b_panel + left * $unit),
                        c: $args.c.wrapping_add(panel * $args.c_panel + top * $args.c_row + left),
                        ahead,
                        ahead_unit,
                    };
                    match ($rows - top).min(step) {
                        $($count => $piece(at, $args),)*
                        rows => unreachable!("a piece of {rows} rows"),
                    }
                    ahead = ahead.wrapping_byte_add($args.units * ahead_unit);
                }
            }
        }
    }};
}
pub(super) use tile_in_pieces;

/// Defines `$piece`, the AVX2 tile of `ROWS` rows and `VECTORS` vectors of 8 columns, and `$run`, which cuts a whole tile into such
/// pieces, or into `$three` of three rows and 32 columns. The rows hold f32, [`TileElement::UNIT`] a unit; each `$widen` loads the
/// values at its `$place` of a unit of 8 columns.
#[cfg(target_arch = "x86_64")]
macro_rules! tile_avx2 {
    ($run:ident, $piece:ident, $three:expr, $element:ty, [$($place:literal => $widen:expr),*]) => {
        /// # Safety
        /// As [`TileElement::tile`], for `8 * VECTORS` columns.
        #[target_feature(enable = "avx2,fma")]
        unsafe fn $piece<const ROWS: usize, const VECTORS: usize>(piece: Piece<$element>, args: &TileArgs<$element>) {
            const UNIT: usize = <$element as TileElement>::UNIT;
            let Piece { a, b: mut bt, c, mut ahead, ahead_unit } = piece;
            let TileArgs { a_unit, b_unit, c_row, units, add, .. } = *args;
            let (mut at, a_unit) = (a.cast::<f32>(), a_unit * size_of::<$element>() / 4);
            let mut sums = [[_mm256_setzero_ps(); VECTORS]; ROWS];
            // SAFETY: the caller vouches for every address: `units` units of `ROWS` rows of `a` and of `8 * VECTORS` columns
            // of the panel, and as many columns of `c`. Loads and stores ask no alignment.
            unsafe {
                if add {
                    for (r, row) in sums.iter_mut().enumerate() {
                        for (v, sum) in row.iter_mut().enumerate() {
                            *sum = _mm256_loadu_ps(c.add(r * c_row + v * 8));
                        }
                    }
                }
                for _ in 0..units {
                    for left in (0..8 * VECTORS).step_by(16) {
                        _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(left * UNIT).cast());
                    }
                    $(
                        let mut columns = [_mm256_setzero_ps(); VECTORS];
                        for (v, column) in columns.iter_mut().enumerate() {
                            *column = $widen(bt.add(v * 8 * UNIT));
                        }
                        for (r, row) in sums.iter_mut().enumerate() {
                            let value = _mm256_broadcast_ss(&*at.add(r * UNIT + $place));
                            for (sum, column) in row.iter_mut().zip(columns) {
                                *sum = _mm256_fmadd_ps(value, column, *sum);
                            }
                        }
                    )*
                    at = at.wrapping_add(a_unit);
                    bt = bt.wrapping_add(b_unit);
                    ahead = ahead.wrapping_byte_add(ahead_unit);
                }
                for (r, row) in sums.iter().enumerate() {
                    for (v, sum) in row.iter().enumerate() {
                        _mm256_storeu_ps(c.add(r * c_row + v * 8), *sum);
                    }
                }
            }
        }

        /// # Safety
        /// As [`TileElement::tile`].
        #[target_feature(enable = "avx2,fma")]
        unsafe fn $run(rows: usize, panels: usize, args: &TileArgs<$element>) {
            const UNIT: usize = <$element as TileElement>::UNIT;
            // SAFETY: the pieces cover the caller's tile and nothing else.
            unsafe {
                // 12 sums, their columns and a value fill the 16 registers; a few rows take wider pieces to have as many.
                if args.columns == PANEL_COLUMNS {
                    tile_in_pieces!(rows, panels, args, 32, 3, UNIT, [1 => $piece::<1, 4>, 2 => $piece::<2, 4>, 3 => $three]);
                } else {
                    tile_in_pieces!(
                        rows,
                        panels,
                        args,
                        16,
                        6,
                        UNIT,
                        [
                            1 => $piece::<1, 2>,
                            2 => $piece::<2, 2>,
                            3 => $piece::<3, 2>,
                            4 => $piece::<4, 2>,
                            5 => $piece::<5, 2>,
                            6 => $piece::<6, 2>
                        ]
                    );
                }
            }
        }
    };
}
#[cfg(target_arch = "x86_64")]
pub(super) use tile_avx2;

#[cfg(test)]
mod tests {
    use super::super::pack;
    use super::*;
    use crate::kernels::buffer::Buffer;
    use half::bf16;

    /// Forms that this processor can run.
    fn forms() -> impl Iterator<Item = Isa> {
        Isa::ALL.into_iter().filter(|isa| *isa <= Isa::best())
    }

    /// Small numbers that differ from place to place, exact in bf16.
    fn value(i: usize) -> f32 {
        ((i * 37 + i / 7 * 11) % 61) as f32 / 32.0 - 0.9375
    }

    fn check<E: TileElement>(rows: usize, k: usize) {
        let units = E::units(k);
        let a: Vec<Vec<E>> = (0..rows).map(|r| (0..k).map(|i| E::from_f32(value(r * (k + 3) + i))).collect()).collect();
        let b_unit = PANEL_COLUMNS * E::UNIT + 5;
        let b: Vec<E> = (0..units * b_unit).map(|i| E::from_f32(value(i * 3 + 1))).collect();
        let c_row = PANEL_COLUMNS + 2;
        // AMX has tests of its own (amx.rs).
        for isa in forms().filter(|isa| *isa <= Isa::Avx512Bf16) {
            let group = E::layout(isa).group_len::<E>();
            let mut packed = Buffer::<E>::zeroed((units * rows * group).max(1));
            pack::tile_of_rows_as(isa, &a.iter().map(Vec::as_slice).collect::<Vec<_>>(), &mut packed[..units * rows * group]);
            for add in [false, true] {
                let mut c: Vec<f32> = (0..rows * c_row).map(|i| value(i * 5)).collect();
                let before = c.clone();
                let strip = strip_columns::<E>(isa, rows);
                let mut args = |left: usize| TileArgs {
                    a: packed.as_ptr(),
                    a_row: group,
                    a_unit: rows * group,
                    b: b.as_ptr().wrapping_add(left * E::UNIT),
                    b_unit,
                    b_panel: 0,
                    columns: strip,
                    c: c.as_mut_ptr().wrapping_add(left),
                    c_row,
                    c_panel: 0,
                    units,
                    ahead: b.as_ptr(),
                    ahead_unit: 0,
                    add,
                };
                // SAFETY: the processor has `isa`; `packed` holds `rows` rows of `units` units, `b` as many of a panel, and
                // `c` has `rows` rows of 32 sums.
                (0..PANEL_COLUMNS).step_by(strip).for_each(|left| unsafe { E::tile(isa, rows, 1, &args(left)) });
                for (i, got) in c.iter().enumerate() {
                    let (r, j) = (i / c_row, i % c_row);
                    if j >= PANEL_COLUMNS {
                        assert_eq!(*got, before[i], "wrote outside the tile");
                        continue;
                    }
                    let mut want = if add { f64::from(before[i]) } else { 0.0 };
                    let mut size = want.abs();
                    for (kk, x) in a[r].iter().enumerate() {
                        let product = f64::from(x.to_f32()) * f64::from(b[kk / E::UNIT * b_unit + j * E::UNIT + kk % E::UNIT].to_f32());
                        want += product;
                        size += product.abs();
                    }
                    // Each of k + 1 additions rounds once, by at most 2^-24 of the sum of sizes; twice that if unfused.
                    let bound = size * (k + 1) as f64 * 2.0f64.powi(-23);
                    assert!((f64::from(*got) - want).abs() <= bound, "{isa:?} {rows} x {k} at {r},{j}: {got} against {want}");
                }
            }
        }
    }

    #[test]
    fn every_form_agrees_with_f64() {
        for rows in 1..=TILE_ROWS {
            for k in [0, 1, 2, 7, 33, 66] {
                check::<f32>(rows, k);
                check::<bf16>(rows, k);
            }
        }
    }
}
