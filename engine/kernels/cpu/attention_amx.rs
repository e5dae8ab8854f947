//! The register tile under attention on AMX: the words of the form with pairs, multiplied 16 at a time (amx.rs). What is
//! done to rows of scores is that form's. `vdpbf16ps` and its broadcasts took three quarters of attention's time.
//!
//! A reduction is walked in whole groups of 16 words, 32 places, so that only models whose head_dim is a multiple of 32 get
//! this form. Where the others end a walk earlier, the left operand is zero; and zeros added change no sum.

use super::attention_tile::{BLOCK, COLUMNS, Form, Left, Pairs512, ROWS, Row, Start, check};

/// bf16 pairs on tile registers. A value is proof that this process may use them: only `Choice::at` has one made.
#[derive(Clone, Copy)]
pub struct Amx(Pairs512);

impl Amx {
    /// The form for a process that has `Isa::AmxBf16`, of which `pairs` is one half of the proof.
    pub(super) fn new(pairs: Pairs512) -> Self {
        assert!(super::isa::Isa::best() == super::isa::Isa::AmxBf16);
        Self(pairs)
    }
}

impl Form for Amx {
    const PAIRS: bool = true;
    const GROUP: usize = 16;

    #[inline(always)]
    fn multiply<const STEP: usize>(self, a: Left, b: &[f32], depth: usize, c: &mut [f32], stride: usize, start: Start) {
        assert_eq!(STEP, 1, "words of the left operand lie side by side");
        self.multiply_panels(a, b, 0, 1, depth, c, stride, start);
    }

    #[inline(always)]
    fn multiply_panels(self, a: Left, b: &[f32], b_panel: usize, panels: usize, depth: usize, c: &mut [f32], stride: usize, start: Start) {
        assert_eq!(depth % Self::GROUP, 0, "a walk of {depth} words");
        if let Start::Scaled(factors) = start {
            for (row, factor) in c.chunks_mut(stride).zip(factors) {
                row[..panels * COLUMNS].iter_mut().for_each(|value| *value *= factor);
            }
        }
        for panel in 0..panels {
            let (b, c) = (&b[panel * b_panel..], &mut c[panel * COLUMNS..]);
            check::<1>(a, b, depth, c, stride);
            #[cfg(target_arch = "x86_64")]
            {
                use super::{amx, tile::TileArgs};
                // Words are pairs, strides count elements.
                let args = TileArgs {
                    a: a.words.as_ptr().cast(),
                    a_row: 2 * a.row,
                    a_unit: 2 * Self::GROUP,
                    b: b.as_ptr().cast(),
                    b_unit: 2 * COLUMNS,
                    b_panel: 0,
                    columns: COLUMNS,
                    c: c.as_mut_ptr(),
                    c_row: stride,
                    c_panel: 0,
                    units: depth,
                    ahead: b.as_ptr().cast(),
                    ahead_unit: 0,
                    add: !matches!(start, Start::Zero),
                };
                // SAFETY: `new` saw a process that may use the registers. `check` holds that words 0..depth of 8 rows of
                // `a`, whole groups, `depth` rows of 32 of the panel and rows 0..8 of `c`, 32 wide, lie within their slices;
                // `c` is borrowed mutably.
                unsafe { amx::tile(ROWS, &args) };
            }
        }
    }

    #[inline(always)]
    fn max(self, row: &Row) -> f32 {
        self.0.max(row)
    }

    #[inline(always)]
    fn exp(self, row: &mut Row, walk: usize, scale: f32, shift: f32) {
        self.0.exp(row, walk, scale, shift);
    }

    #[inline(always)]
    fn pair_rows(self, first: &Row, second: &Row, words: &mut Row) {
        self.0.pair_rows(first, second, words);
    }

    #[inline(always)]
    fn pair_columns(self, row: &Row, words: &mut [f32; BLOCK / 2]) {
        self.0.pair_columns(row, words);
    }

    /// Turns the 8 columns of `tile` of up to 32 rows of words into the rows of a left operand.
    #[inline(always)]
    fn turn(self, rows: &[Row], tile: usize, turned: &mut [[f32; BLOCK / 2]; ROWS]) {
        assert!(rows.len() <= BLOCK / 2 && (tile + 1) * ROWS <= BLOCK, "{} rows, tile {tile}", rows.len());
        #[cfg(target_arch = "x86_64")]
        {
            #[target_feature(enable = "avx512f")]
            fn turn(rows: &[Row], tile: usize, turned: &mut [[f32; BLOCK / 2]; ROWS]) {
                use std::arch::x86_64::*;
                for (index, rows) in rows.chunks(16).enumerate() {
                    let mut square = [_mm512_setzero_si512(); 16];
                    for (slot, row) in square.iter_mut().zip(rows) {
                        // SAFETY: the mask lets 8 words from `tile * 8` be read, which lie in the row by the assertion.
                        *slot = unsafe { _mm512_maskz_loadu_epi32(0xff, row.as_ptr().add(tile * ROWS).cast()) };
                    }
                    for (out, column) in turned.iter_mut().zip(super::pack::transposed(square)) {
                        // SAFETY: at most two times 16 words are written to a row of 32.
                        unsafe { _mm512_storeu_si512(out.as_mut_ptr().add(index * 16).cast(), column) };
                    }
                }
            }
            // SAFETY: the token exists, so `Choice::at` saw a processor with AVX-512 F.
            unsafe { turn(rows, tile, turned) };
        }
    }

    #[inline(always)]
    fn enter(self, work: impl FnOnce()) {
        #[cfg(target_arch = "x86_64")]
        let _release = super::amx::Release;
        self.0.enter(work);
    }
}
