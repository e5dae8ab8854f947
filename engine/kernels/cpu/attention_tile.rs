//! The register tile under attention: 8 rows by 32 columns, summed along one chain an element, in each vector form.
//! Knows no masks and no softmax; attention_operands.rs packs what it reads.
//!
//! Operands are made of 32-bit *words* kept in f32 memory. In most forms a word is one f32 (a bf16 is widened); in the
//! form with `vdpbf16ps` it is the bits of two bf16 that neighbour each other along the reduction.

use super::attention_amx::Amx;
use super::attention_rows;
use super::exp::exp;
use super::isa::{Isa, isa};
#[cfg(target_arch = "x86_64")]
use super::tile_f32::add_three_rows;
use crate::kernels::element::{Dtype, Float};

/// Positions of a block of keys or queries; blocks begin at multiples of it within their document.
pub const BLOCK: usize = 64;
/// Rows of the register tile.
pub const ROWS: usize = 8;
/// Columns of the register tile, and of a packed panel.
pub const COLUMNS: usize = 32;

/// One number for each position of a block.
pub type Row = [f32; BLOCK];

/// What the sums of a tile begin with.
#[derive(Clone, Copy)]
pub enum Start<'a> {
    Zero,
    /// The tile's present content.
    Keep,
    /// The tile's present content, row r times the r-th factor.
    Scaled(&'a [f32; ROWS]),
}

/// The left operand of a product: the word of row r at place k of the reduction is `words[r * row + k * STEP]`.
#[derive(Clone, Copy)]
pub struct Left<'a> {
    pub words: &'a [f32],
    pub row: usize,
}

/// One way to compute a tile. A value is proof that the processor has the instructions: only [`Choice::of`] makes one.
pub trait Form: Copy + Send + Sync {
    /// Whether a word holds two bf16.
    const PAIRS: bool;

    /// Words of a reduction that are multiplied together: walks begin and end at multiples of it, past what they need if they
    /// must, with zeros there in the left operand. Where it is above 1, the left operand has its words side by side.
    const GROUP: usize = 1;

    /// `c[r, j] = start + sum over k of a[r, k] * b[k * 32 + j]`, k ascending from 0 to `depth` words, for 8 rows r and 32
    /// columns j; row r of the tile is `c[r * stride..][..32]`.
    ///
    /// Each element is one chain, so the depth at which a caller cuts the walk in two, between groups, does not change a bit.
    fn multiply<const STEP: usize>(self, a: Left, b: &[f32], depth: usize, c: &mut [f32], stride: usize, start: Start);

    /// [`Self::multiply`] for `panels` neighbouring panels, `b_panel` words apart, whose columns are neighbours in `c`.
    #[inline(always)]
    #[allow(clippy::too_many_arguments, reason = "those of multiply, and the panels")]
    fn multiply_panels(self, a: Left, b: &[f32], b_panel: usize, panels: usize, depth: usize, c: &mut [f32], stride: usize, start: Start) {
        for panel in 0..panels {
            self.multiply::<1>(a, &b[panel * b_panel..], depth, &mut c[panel * COLUMNS..], stride, start);
        }
    }

    /// [`Self::multiply_panels`] for rows of which only the first `rows` matter: theirs have the same bits, and what the others
    /// have afterwards is not said.
    #[inline(always)]
    #[allow(clippy::too_many_arguments, reason = "those of multiply_panels, and the rows")]
    fn multiply_rows(
        self,
        rows: usize,
        a: Left,
        b: &[f32],
        b_panel: usize,
        panels: usize,
        depth: usize,
        c: &mut [f32],
        stride: usize,
        start: Start,
    ) {
        let _ = rows;
        self.multiply_panels(a, b, b_panel, panels, depth, c, stride, start);
    }

    /// The largest of a row's numbers.
    #[inline(always)]
    fn max(self, row: &Row) -> f32 {
        attention_rows::max(row)
    }

    /// Sets the first `walk` numbers x of a row, and those up to the next multiple of 16, to `exp(x * scale - shift)`, the same
    /// bits in every form, and the others to 0.
    #[inline(always)]
    fn exp(self, row: &mut Row, walk: usize, scale: f32, shift: f32) {
        let (live, dead) = row.split_at_mut(walk.next_multiple_of(16));
        live.iter_mut().for_each(|x| *x = exp(*x * scale - shift));
        dead.fill(0.0);
    }

    /// Rounds two rows to bf16 and puts them side by side: word j is `(first[j], second[j])`. For forms with pairs.
    #[inline(always)]
    fn pair_rows(self, first: &Row, second: &Row, words: &mut Row) {
        attention_rows::pair_rows(first, second, words);
    }

    /// Rounds a row to bf16: word j is `(row[2 * j], row[2 * j + 1])`. For forms with pairs.
    #[inline(always)]
    fn pair_columns(self, row: &Row, words: &mut [f32; BLOCK / 2]) {
        attention_rows::pair_columns(row, words);
    }

    /// Row r of the left operand that column `8 * tile + r` of `rows` makes, word by word. For forms with groups.
    #[inline(always)]
    fn turn(self, rows: &[Row], tile: usize, turned: &mut [[f32; BLOCK / 2]; ROWS]) {
        for (r, turned) in turned.iter_mut().enumerate() {
            turned.iter_mut().zip(rows).for_each(|(word, row)| *word = row[tile * ROWS + r]);
        }
    }

    /// Runs `work` compiled for this form's instructions, where `work` is inlined.
    fn enter(self, work: impl FnOnce());
}

/// f32 words on 512-bit registers, products fused with sums.
#[derive(Clone, Copy)]
pub struct Fused512(());
/// bf16 pairs on 512-bit registers. `vdpbf16ps` takes denormal numbers for zeros.
#[derive(Clone, Copy)]
pub struct Pairs512(());
/// f32 words on 256-bit registers, products fused with sums: the bits of [`Fused512`].
#[derive(Clone, Copy)]
pub struct Fused256(());
/// f32 words in plain Rust, each product rounded.
#[derive(Clone, Copy)]
pub struct Plain(());

/// The form for an element type and head_dim on this processor.
pub enum Choice {
    Amx(Amx),
    Fused512(Fused512),
    Pairs512(Pairs512),
    Fused256(Fused256),
    Plain(Plain),
}

impl Choice {
    pub fn of<E: Float>(head_dim: usize) -> Self {
        Self::at::<E>(isa(), head_dim)
    }

    /// The form for `isa`, which this processor must have.
    fn at<E: Float>(isa: Isa, head_dim: usize) -> Self {
        assert!(isa <= Isa::best());
        match isa {
            Isa::AmxBf16 if E::DTYPE == Dtype::Bf16 && head_dim.is_multiple_of(2 * Amx::GROUP) => Self::Amx(Amx::new(Pairs512(()))),
            Isa::AmxBf16 | Isa::Avx512Bf16 if E::DTYPE == Dtype::Bf16 => Self::Pairs512(Pairs512(())),
            Isa::AmxBf16 | Isa::Avx512Bf16 | Isa::Avx512 => Self::Fused512(Fused512(())),
            Isa::Avx2 => Self::Fused256(Fused256(())),
            Isa::Portable => Self::Plain(Plain(())),
        }
    }
}

/// Runs `$call` with `$form` bound to the form for `$element` and `$head_dim`.
macro_rules! with_form {
    ($element:ty, $head_dim:expr, |$form:ident| $call:expr) => {
        match $crate::kernels::cpu::attention_tile::Choice::of::<$element>($head_dim) {
            $crate::kernels::cpu::attention_tile::Choice::Amx($form) => $call,
            $crate::kernels::cpu::attention_tile::Choice::Fused512($form) => $call,
            $crate::kernels::cpu::attention_tile::Choice::Pairs512($form) => $call,
            $crate::kernels::cpu::attention_tile::Choice::Fused256($form) => $call,
            $crate::kernels::cpu::attention_tile::Choice::Plain($form) => $call,
        }
    };
}
pub(super) use with_form;

#[inline(always)]
pub(super) fn check<const STEP: usize>(a: Left, b: &[f32], depth: usize, c: &[f32], stride: usize) {
    assert!(depth == 0 || a.words.len() > (ROWS - 1) * a.row + (depth - 1) * STEP);
    assert!(b.len() >= depth * COLUMNS);
    assert!(c.len() >= (ROWS - 1) * stride + COLUMNS);
}

/// The tile as plain loops over parts small enough for 16 registers of 8 floats.
#[inline(always)]
fn multiply_plain<const STEP: usize>(a: Left, b: &[f32], depth: usize, c: &mut [f32], stride: usize, start: Start) {
    const PART_ROWS: usize = 4;
    const PART_COLUMNS: usize = 16;
    check::<STEP>(a, b, depth, c, stride);
    for row in (0..ROWS).step_by(PART_ROWS) {
        for column in (0..COLUMNS).step_by(PART_COLUMNS) {
            let mut sums = [[0.0f32; PART_COLUMNS]; PART_ROWS];
            for (r, sums) in sums.iter_mut().enumerate() {
                let c = &c[(row + r) * stride + column..][..PART_COLUMNS];
                match start {
                    Start::Zero => {}
                    Start::Keep => sums.copy_from_slice(c),
                    Start::Scaled(factors) => sums.iter_mut().zip(c).for_each(|(sum, c)| *sum = c * factors[row + r]),
                }
            }
            for k in 0..depth {
                let y: &[f32; PART_COLUMNS] = b[k * COLUMNS + column..][..PART_COLUMNS].try_into().expect("the slice has this length");
                for (r, sums) in sums.iter_mut().enumerate() {
                    let x = a.words[(row + r) * a.row + k * STEP];
                    for (sum, y) in sums.iter_mut().zip(y) {
                        *sum += x * y;
                    }
                }
            }
            for (r, sums) in sums.iter().enumerate() {
                c[(row + r) * stride + column..][..PART_COLUMNS].copy_from_slice(sums);
            }
        }
    }
}

impl Form for Plain {
    const PAIRS: bool = false;

    fn multiply<const STEP: usize>(self, a: Left, b: &[f32], depth: usize, c: &mut [f32], stride: usize, start: Start) {
        multiply_plain::<STEP>(a, b, depth, c, stride, start);
    }

    fn enter(self, work: impl FnOnce()) {
        work();
    }
}

/// Implements [`Form`] for a token by functions that name its instructions.
macro_rules! form {
    ($form:ty, $pairs:literal, $features:literal, |$a:ident, $b:ident, $depth:ident, $c:ident, $stride:ident, $start:ident| $body:block, { $($more:tt)* }) => {
        impl Form for $form {
            const PAIRS: bool = $pairs;
            $($more)*

            #[inline(always)]
            fn multiply<const STEP: usize>(self, a: Left, b: &[f32], depth: usize, c: &mut [f32], stride: usize, start: Start) {
                #[cfg(target_arch = "x86_64")]
                {
                    #[target_feature(enable = $features)]
                    fn tile<const STEP: usize>($a: Left, $b: &[f32], $depth: usize, $c: &mut [f32], $stride: usize, $start: Start) $body
                    // SAFETY: the token exists, so `Choice::at` saw a processor with these features.
                    unsafe { tile::<STEP>(a, b, depth, c, stride, start) }
                }
                #[cfg(not(target_arch = "x86_64"))]
                multiply_plain::<STEP>(a, b, depth, c, stride, start);
            }

            #[inline(always)]
            fn enter(self, work: impl FnOnce()) {
                #[cfg(target_arch = "x86_64")]
                {
                    #[target_feature(enable = $features)]
                    fn inside(work: impl FnOnce()) {
                        work();
                    }
                    // SAFETY: the token exists, so `Choice::at` saw a processor with these features.
                    unsafe { inside(work) }
                }
                #[cfg(not(target_arch = "x86_64"))]
                work();
            }
        }
    };
}

/// The row operations of the forms on 512-bit registers.
macro_rules! rows_512 {
    () => {
        #[cfg(target_arch = "x86_64")]
        #[inline(always)]
        fn max(self, row: &Row) -> f32 {
            // SAFETY: the token exists, so `Choice::at` saw a processor with AVX-512 F.
            unsafe { attention_rows::max_512(row) }
        }

        #[cfg(target_arch = "x86_64")]
        #[inline(always)]
        fn exp(self, row: &mut Row, walk: usize, scale: f32, shift: f32) {
            // SAFETY: the token exists, so `Choice::at` saw a processor with AVX-512 F.
            unsafe { attention_rows::exp_512(row, walk, scale, shift) }
        }
    };
}

/// The body of a 512-bit tile; `$step(x, y, sum)` adds the products of one word.
macro_rules! tile_512 {
    ($a:ident, $b:ident, $depth:ident, $c:ident, $stride:ident, $start:ident, $step:expr) => {{
        use std::arch::x86_64::*;
        check::<STEP>($a, $b, $depth, $c, $stride);
        let (a, row, b, c) = ($a.words.as_ptr(), $a.row, $b.as_ptr(), $c.as_mut_ptr());
        let mut sums = [[_mm512_setzero_ps(); 2]; ROWS];
        // SAFETY: `check` holds that rows 0..8 of `c`, each 32 wide and `stride` apart, words 0..depth of 8 rows of `a`
        // and `depth` rows of 32 of `b` lie within their slices; `c` is borrowed mutably and nothing else aliases it.
        unsafe {
            match $start {
                Start::Zero => {}
                Start::Keep => {
                    for (r, sums) in sums.iter_mut().enumerate() {
                        *sums = [_mm512_loadu_ps(c.add(r * $stride)), _mm512_loadu_ps(c.add(r * $stride + 16))];
                    }
                }
                Start::Scaled(factors) => {
                    for (r, sums) in sums.iter_mut().enumerate() {
                        let factor = _mm512_set1_ps(factors[r]);
                        *sums = [
                            _mm512_mul_ps(_mm512_loadu_ps(c.add(r * $stride)), factor),
                            _mm512_mul_ps(_mm512_loadu_ps(c.add(r * $stride + 16)), factor),
                        ];
                    }
                }
            }
            for k in 0..$depth {
                let y = [_mm512_loadu_ps(b.add(k * COLUMNS)), _mm512_loadu_ps(b.add(k * COLUMNS + 16))];
                for (r, sums) in sums.iter_mut().enumerate() {
                    let x = _mm512_set1_ps(*a.add(r * row + k * STEP));
                    *sums = [$step(x, y[0], sums[0]), $step(x, y[1], sums[1])];
                }
            }
            for (r, sums) in sums.iter().enumerate() {
                _mm512_storeu_ps(c.add(r * $stride), sums[0]);
                _mm512_storeu_ps(c.add(r * $stride + 16), sums[1]);
            }
        }
    }};
}

/// [`Form::multiply_rows`] on 512-bit registers: a few rows and two panels at a time, so that there are sums enough to hide how
/// long one takes. `$step` is that of [`tile_512`].
macro_rules! few_rows_512 {
    ($features:literal, $step:expr) => {
        #[cfg(target_arch = "x86_64")]
        #[inline(always)]
        fn multiply_rows(
            self,
            rows: usize,
            a: Left,
            b: &[f32],
            b_panel: usize,
            panels: usize,
            depth: usize,
            c: &mut [f32],
            stride: usize,
            start: Start,
        ) {
            #[target_feature(enable = $features)]
            #[allow(clippy::too_many_arguments, reason = "those of multiply_rows")]
            fn few<const FEW: usize>(
                a: Left,
                b: &[f32],
                b_panel: usize,
                panels: usize,
                depth: usize,
                c: &mut [f32],
                stride: usize,
                start: Start,
            ) {
                use std::arch::x86_64::*;
                assert!(panels > 0 && (depth == 0 || a.words.len() >= (FEW - 1) * a.row + depth));
                assert!(b.len() >= (panels - 1) * b_panel + depth * COLUMNS);
                assert!(c.len() >= (FEW - 1) * stride + panels * COLUMNS);
                for panel in (0..panels).step_by(2) {
                    // A last panel without a neighbour is multiplied twice and written twice.
                    let next = usize::from(panel + 1 < panels);
                    let columns = [0, 16, next * COLUMNS, next * COLUMNS + 16];
                    // SAFETY: the asserts hold that rows 0..FEW of `c`, `panels` panels wide and `stride` apart, words 0..depth of
                    // FEW rows of `a` and `depth` rows of `panels` panels of `b` lie within their slices; `c` is borrowed mutably
                    // and nothing else aliases it.
                    unsafe {
                        let (row, a, c) = (a.row, a.words.as_ptr(), c.as_mut_ptr().add(panel * COLUMNS));
                        let b = [b.as_ptr().add(panel * b_panel), b.as_ptr().add((panel + next) * b_panel)];
                        let mut sums = [[_mm512_setzero_ps(); 4]; FEW];
                        for (r, sums) in sums.iter_mut().enumerate() {
                            let present = || columns.map(|column| _mm512_loadu_ps(c.add(r * stride + column)));
                            match start {
                                Start::Zero => {}
                                Start::Keep => *sums = present(),
                                Start::Scaled(factors) => *sums = present().map(|sum| _mm512_mul_ps(sum, _mm512_set1_ps(factors[r]))),
                            }
                        }
                        for k in 0..depth {
                            let y = [0, 1, 2, 3].map(|part| _mm512_loadu_ps(b[part / 2].add(k * COLUMNS + part % 2 * 16)));
                            for (r, sums) in sums.iter_mut().enumerate() {
                                let x = _mm512_set1_ps(*a.add(r * row + k));
                                for (sum, y) in sums.iter_mut().zip(y) {
                                    *sum = $step(x, y, *sum);
                                }
                            }
                        }
                        for (r, sums) in sums.iter().enumerate() {
                            for (sum, column) in sums.iter().zip(columns) {
                                _mm512_storeu_ps(c.add(r * stride + column), *sum);
                            }
                        }
                    }
                }
            }
            // SAFETY: the token exists, so `Choice::at` saw a processor with these features.
            unsafe {
                match rows {
                    1 => few::<1>(a, b, b_panel, panels, depth, c, stride, start),
                    2 => few::<2>(a, b, b_panel, panels, depth, c, stride, start),
                    3 | 4 => few::<4>(a, b, b_panel, panels, depth, c, stride, start),
                    _ => self.multiply_panels(a, b, b_panel, panels, depth, c, stride, start),
                }
            }
        }
    };
}

form!(
    Fused512,
    false,
    "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma",
    |a, b, depth, c, stride, start| { tile_512!(a, b, depth, c, stride, start, |x, y, sum| _mm512_fmadd_ps(x, y, sum)) },
    {
        rows_512!();
        few_rows_512!("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma", |x, y, sum| _mm512_fmadd_ps(x, y, sum));
    }
);

form!(
    Pairs512,
    true,
    "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma",
    |a, b, depth, c, stride, start| {
        // A word's 32 bits are two bf16; the casts between the vector types move no bit.
        tile_512!(a, b, depth, c, stride, start, |x: __m512, y: __m512, sum| {
            _mm512_dpbf16_ps(sum, std::mem::transmute::<__m512, __m512bh>(x), std::mem::transmute::<__m512, __m512bh>(y))
        })
    },
    {
        rows_512!();
        few_rows_512!("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma", |x: __m512, y: __m512, sum| {
            _mm512_dpbf16_ps(sum, std::mem::transmute::<__m512, __m512bh>(x), std::mem::transmute::<__m512, __m512bh>(y))
        });

        #[cfg(target_arch = "x86_64")]
        #[inline(always)]
        fn pair_rows(self, first: &Row, second: &Row, words: &mut Row) {
            // SAFETY: the token exists, so `Choice::at` saw a processor with AVX-512 BW and BF16.
            unsafe { attention_rows::pair_rows_512(first, second, words) }
        }

        #[cfg(target_arch = "x86_64")]
        #[inline(always)]
        fn pair_columns(self, row: &Row, words: &mut [f32; BLOCK / 2]) {
            // SAFETY: the token exists, so `Choice::at` saw a processor with AVX-512 BF16.
            unsafe { attention_rows::pair_columns_512(row, words) }
        }
    }
);

form!(
    Fused256,
    false,
    "avx2,fma",
    |a, b, depth, c, stride, start| {
        check::<STEP>(a, b, depth, c, stride);
        // SAFETY: `check` holds that the tile's operands lie within their slices; these parts make up the tile.
        unsafe {
            part_256::<STEP, 3, 4>(a, b, depth, c, stride, start, 0, 0);
            part_256::<STEP, 3, 4>(a, b, depth, c, stride, start, 3, 0);
            part_256::<STEP, 2, 4>(a, b, depth, c, stride, start, 6, 0);
        }
    },
    {
        #[cfg(target_arch = "x86_64")]
        #[inline(always)]
        fn multiply_rows(
            self,
            rows: usize,
            a: Left,
            b: &[f32],
            b_panel: usize,
            panels: usize,
            depth: usize,
            c: &mut [f32],
            stride: usize,
            start: Start,
        ) {
            for panel in 0..panels {
                let (b, c) = (&b[panel * b_panel..], &mut c[panel * COLUMNS..]);
                check::<1>(a, b, depth, c, stride);
                // SAFETY: the token exists, so `Choice::at` saw a processor with AVX2 and FMA; `check` holds that the tile's
                // operands lie within their slices, and these are parts of the tile.
                unsafe {
                    match rows {
                        1 => part_256::<1, 1, 4>(a, b, depth, c, stride, start, 0, 0),
                        2 => part_256::<1, 2, 4>(a, b, depth, c, stride, start, 0, 0),
                        3 | 4 => {
                            part_256::<1, 4, 2>(a, b, depth, c, stride, start, 0, 0);
                            part_256::<1, 4, 2>(a, b, depth, c, stride, start, 0, 16);
                        }
                        _ => self.multiply::<1>(a, b, depth, c, stride, start),
                    };
                }
            }
        }
    }
);

/// Adds to `sums` the products of one word of each row, `row` words apart, and the columns at `b`.
///
/// # Safety
/// The processor has AVX2 and FMA, and the words and columns can be read.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
#[inline]
unsafe fn unit_256<const PART: usize, const VECTORS: usize>(
    sums: &mut [[std::arch::x86_64::__m256; VECTORS]; PART],
    a: *const f32,
    row: usize,
    b: *const f32,
) {
    use std::arch::x86_64::*;
    let mut y = [_mm256_setzero_ps(); VECTORS];
    // SAFETY: the caller's promise.
    y.iter_mut().enumerate().for_each(|(v, y)| *y = unsafe { _mm256_loadu_ps(b.add(v * 8)) });
    for (r, sums) in sums.iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        let x = unsafe { _mm256_broadcast_ss(&*a.add(r * row)) };
        for (sum, y) in sums.iter_mut().zip(y) {
            *sum = _mm256_fmadd_ps(x, y, *sum);
        }
    }
}

/// `PART` rows from `row` and `VECTORS` vectors of 8 columns from `column` of a tile: 8 sums hide how long one takes, 12
/// are what 16 registers have room for.
///
/// # Safety
/// The processor has AVX2 and FMA, and the rows and columns lie in the tile, whose operands are as [`check`] holds.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
#[allow(clippy::too_many_arguments, reason = "those of multiply, and the part")]
unsafe fn part_256<const STEP: usize, const PART: usize, const VECTORS: usize>(
    a: Left,
    b: &[f32],
    depth: usize,
    c: &mut [f32],
    stride: usize,
    start: Start,
    row: usize,
    column: usize,
) {
    use std::arch::x86_64::*;
    let (step, mut a) = (a.row, a.words.as_ptr().wrapping_add(row * a.row));
    let (mut b, c) = (b.as_ptr().wrapping_add(column), c.as_mut_ptr().wrapping_add(row * stride + column));
    let mut sums = [[_mm256_setzero_ps(); VECTORS]; PART];
    // SAFETY: the caller's promise; `c` is borrowed mutably and nothing else aliases it.
    unsafe {
        for (r, sums) in sums.iter_mut().enumerate() {
            for (v, sum) in sums.iter_mut().enumerate() {
                let present = || _mm256_loadu_ps(c.add(r * stride + v * 8));
                match start {
                    Start::Zero => {}
                    Start::Keep => *sum = present(),
                    Start::Scaled(factors) => *sum = _mm256_mul_ps(present(), _mm256_set1_ps(factors[row + r])),
                }
            }
        }
        let mut left = depth;
        while left >= 8 {
            if PART == 3 && VECTORS == 4 {
                add_three_rows!(sums, a, 4 * step, 4 * STEP, b, [0, 1, 2, 3, 4, 5, 6, 7]);
            } else {
                for k in 0..8 {
                    unit_256(&mut sums, a.wrapping_add(k * STEP), step, b.wrapping_add(k * COLUMNS));
                }
            }
            (a, b) = (a.wrapping_add(8 * STEP), b.wrapping_add(8 * COLUMNS));
            left -= 8;
        }
        for _ in 0..left {
            unit_256(&mut sums, a, step, b);
            (a, b) = (a.wrapping_add(STEP), b.wrapping_add(COLUMNS));
        }
        for (r, sums) in sums.iter().enumerate() {
            for (v, sum) in sums.iter().enumerate() {
                _mm256_storeu_ps(c.add(r * stride + v * 8), *sum);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::attention_operands::{HeadRows, Positions, padded, word, words};
    use super::*;
    use half::bf16;

    fn sample(i: usize) -> f32 {
        bf16::from_f32(((i * 7919) % 1013) as f32 / 500.0 - 1.0).to_f32()
    }

    /// Packs two small matrices for one form and compares their product with f64.
    fn check_product<F: Form, E: Float>(form: F) {
        for head_dim in [2, 16, 40, 64, 96].into_iter().filter(|head_dim| words::<F>(*head_dim).is_multiple_of(F::GROUP)) {
            for count in [1, 7, 33, 64] {
                let stride = head_dim + 3;
                let left: Vec<E> = (0..64 * stride).map(|i| E::from_f32(sample(i))).collect();
                let right: Vec<E> = (0..64 * stride).map(|i| E::from_f32(sample(i + 5000))).collect();
                let rows = Positions::first(count);
                let (a, b) = (HeadRows::new(&left, stride, rows, 3, head_dim), HeadRows::new(&right, stride, rows, 3, head_dim));
                let depth = words::<F>(head_dim);
                let mut tiles = vec![f32::NAN; BLOCK * depth];
                let mut keys = vec![f32::NAN; BLOCK * depth];
                a.pack_rows::<F>(&mut tiles);
                b.pack_transposed::<F>(&mut keys);
                let (tile, panel) = (count.div_ceil(ROWS) - 1, count.div_ceil(COLUMNS) - 1);
                let mut c = vec![f32::NAN; ROWS * 40];
                let queries = Left { words: &tiles[tile * depth * ROWS..], row: depth };
                form.multiply::<1>(queries, &keys[panel * depth * COLUMNS..], depth, &mut c, 40, Start::Zero);
                for r in 0..ROWS {
                    for j in 0..COLUMNS {
                        let (row, column) = (tile * ROWS + r, panel * COLUMNS + j);
                        let dot = |(x, y): (&E, &E)| f64::from(x.to_f32()) * f64::from(y.to_f32());
                        let want: f64 =
                            if row < count && column < count { a.row(row).iter().zip(b.row(column)).map(dot).sum() } else { 0.0 };
                        // 64 roundings at sums below 64.
                        assert!((f64::from(c[r * 40 + j]) - want).abs() < 2e-5, "{head_dim} {count}: [{row}, {column}]");
                    }
                }
                // A few rows alone have the same bits, whatever the number of panels.
                for few in 1..=ROWS {
                    for panels in 1..=2 {
                        let (mut all, mut some) = ([0.5; ROWS * BLOCK], [0.5; ROWS * BLOCK]);
                        let (factors, panel_words) = (std::array::from_fn(|r| r as f32 - 3.5), depth * COLUMNS);
                        for start in [Start::Zero, Start::Keep, Start::Scaled(&factors)] {
                            form.multiply_panels(queries, &keys, panel_words, panels, depth, &mut all, BLOCK, start);
                            form.multiply_rows(few, queries, &keys, panel_words, panels, depth, &mut some, BLOCK, start);
                            assert_eq!(all[..few * BLOCK], some[..few * BLOCK], "{head_dim} {count}: {few} rows, {panels} panels");
                        }
                    }
                }
                // The sum over rows: weights 1 for each row, kept sums doubled.
                let mut panels = vec![f32::NAN; words::<F>(BLOCK) * padded(head_dim)];
                b.pack_panels::<F>(&mut panels);
                let ones = vec![word::<F, E>(E::from_f32(1.0), E::from_f32(1.0)); ROWS * BLOCK];
                let ones = Left { words: &ones, row: BLOCK };
                let mut c = vec![3.0; ROWS * COLUMNS];
                form.multiply::<1>(ones, &panels, words::<F>(BLOCK), &mut c, COLUMNS, Start::Scaled(&[2.0; ROWS]));
                form.multiply::<1>(ones, &panels, 0, &mut c, COLUMNS, Start::Keep);
                // 64 words of which each row has its own, turned.
                let rows: Vec<Row> = (0..BLOCK / 2).map(|k| std::array::from_fn(|column| (k * BLOCK + column) as f32)).collect();
                let mut turned = [[f32::NAN; BLOCK / 2]; ROWS];
                form.turn(&rows, 3, &mut turned);
                assert!((0..ROWS * BLOCK / 2).all(|at| turned[at / 32][at % 32] == (at % 32 * BLOCK + 3 * ROWS + at / 32) as f32));
                for (j, got) in c[..COLUMNS].iter().enumerate() {
                    let column: f64 = if j < head_dim { (0..count).map(|i| f64::from(b.row(i)[j].to_f32())).sum() } else { 0.0 };
                    assert!((f64::from(*got) - column - 6.0).abs() < 2e-5, "{head_dim} {count}: column {j}");
                }
            }
        }
    }

    #[test]
    fn every_form_multiplies_what_was_packed() {
        for isa in Isa::ALL.into_iter().filter(|isa| *isa <= Isa::best()) {
            for choice in [Choice::at::<f32>(isa, 64), Choice::at::<bf16>(isa, 64), Choice::at::<bf16>(isa, 16)] {
                match choice {
                    Choice::Amx(form) => check_product::<_, bf16>(form),
                    Choice::Fused512(form) => check_product::<_, f32>(form),
                    Choice::Pairs512(form) => check_product::<_, bf16>(form),
                    Choice::Fused256(form) => check_product::<_, bf16>(form),
                    Choice::Plain(form) => check_product::<_, bf16>(form),
                }
            }
        }
    }
}
