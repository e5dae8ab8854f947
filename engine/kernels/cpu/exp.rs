//! The exponential function of every softmax, loss and gate: plain multiplications and additions, without branches or
//! tables, so that a loop over it becomes vector code and every form of a kernel gets the same bits.
//! Not `f32::exp`, whose call keeps a loop scalar and whose last bit belongs to the platform.
//! Source: Cody and Waite, Software Manual for the Elementary Functions (1980), chapter 6; the polynomial is our own
//! Chebyshev fit.

/// Below this, e^x rounds to zero even as a denormal number.
const LOWEST: f32 = -104.0;
/// Above this, e^x is beyond the largest f32.
const HIGHEST: f32 = 89.0;
/// 1.5 * 2^23: adding it rounds to an integer, which is then in the low bits of the sum.
const ROUNDER: f32 = 12_582_912.0;
/// ln 2 in two parts; the first has 15 bits, so that its product with any exponent is exact.
const LN_2_HIGH: f32 = 0.693_145_75;
const LN_2_LOW: f32 = 1.428_606_8e-6;

/// (e^r - 1 - r) / r^2 over [-ln 2 / 2, ln 2 / 2], highest power first: with its rounded coefficients the result is
/// within 0.2 units in the last place.
const TAIL: [f32; 5] = [0.001_393_373_4, 0.008_363_236, 0.041_666_463, 0.166_665_76, 0.5];

/// e^x, within 1.5 units in the last place; `exp(0)` is 1, `exp(-inf)` is 0, a NaN stays a NaN.
///
/// Multiplications and additions are never fused, so the result is the same on every processor.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // `clamp` lets a NaN through, unlike `max` and `min`.
    let x = x.clamp(LOWEST, HIGHEST);
    let shifted = x * std::f32::consts::LOG2_E + ROUNDER;
    let power = shifted - ROUNDER;
    let rest = (x - power * LN_2_HIGH) - power * LN_2_LOW;
    let tail = TAIL[1..].iter().fold(TAIL[0], |tail, term| tail * rest + term);
    let mantissa = (rest * rest) * tail + rest + 1.0;
    // 2^power in two factors, because power reaches -150 and 128 while one factor ends at -126 and 127.
    let power = (shifted.to_bits() as i32).wrapping_sub(ROUNDER.to_bits() as i32);
    let half = power >> 1;
    let first = f32::from_bits((half.wrapping_add(127) << 23) as u32);
    let second = f32::from_bits((power.wrapping_sub(half).wrapping_add(127) << 23) as u32);
    (mantissa * first) * second
}

/// [`exp`] of 16 numbers, the same bits: AVX-512 has an instruction for the last step, which the compiler does not find.
///
/// # Safety
/// The processor has AVX-512 F.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
#[inline]
pub fn exp_512(x: std::arch::x86_64::__m512) -> std::arch::x86_64::__m512 {
    use std::arch::x86_64::*;
    let all = |value| _mm512_set1_ps(value);
    // The second operand wins where one is a NaN.
    let x = _mm512_min_ps(all(HIGHEST), _mm512_max_ps(all(LOWEST), x));
    let power = _mm512_sub_ps(_mm512_add_ps(_mm512_mul_ps(x, all(std::f32::consts::LOG2_E)), all(ROUNDER)), all(ROUNDER));
    let rest = _mm512_sub_ps(x, _mm512_mul_ps(power, all(LN_2_HIGH)));
    let rest = _mm512_sub_ps(rest, _mm512_mul_ps(power, all(LN_2_LOW)));
    let tail = TAIL[1..].iter().fold(all(TAIL[0]), |tail, term| _mm512_add_ps(_mm512_mul_ps(tail, rest), all(*term)));
    let mantissa = _mm512_add_ps(_mm512_add_ps(_mm512_mul_ps(_mm512_mul_ps(rest, rest), tail), rest), all(1.0));
    // One rounding, as in `exp`, whose first factor never leaves the normal numbers.
    _mm512_scalef_ps(mantissa, power)
}

#[cfg(test)]
mod tests {
    use super::exp;

    crate::vectorised! {
        fn exp_all(x: &mut [f32]) {
            for v in x { *v = exp(*v); }
        }
    }

    #[test]
    fn exp_is_within_one_and_a_half_units_of_the_f64_function() {
        let mut worst = 0.0f64;
        for step in 0..2_000_003 {
            let x = -87.0 + 175.7 * (step as f32 / 2_000_003.0);
            let want = f64::from(x).exp();
            let unit = f64::from(f32::from_bits((want as f32).to_bits() + 1) - want as f32);
            worst = worst.max((f64::from(exp(x)) - want).abs() / unit);
        }
        assert!(worst < 1.5, "{worst} units in the last place");
    }

    #[test]
    fn exp_has_exact_ends() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY).to_bits(), 0);
        assert_eq!(exp(-1e30).to_bits(), 0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp(88.73), f32::INFINITY);
        assert!(exp(f32::NAN).is_nan());
        let denormal = exp(-100.0);
        assert!(denormal > 0.0 && (f64::from(denormal) - (-100f64).exp()).abs() < 1.5e-45);
    }

    #[test]
    fn every_form_gives_the_same_bits() {
        let x: Vec<f32> = (0..4_099).map(|i| (i as f32 - 2_100.0) * 0.0437).collect();
        let mut got = x.clone();
        exp_all(&mut got);
        assert!(x.iter().zip(&got).all(|(x, got)| std::hint::black_box(exp(*x)).to_bits() == got.to_bits()));
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn sixteen_at_once_have_the_same_bits() {
        if crate::kernels::cpu::isa::Isa::best() < crate::kernels::cpu::isa::Isa::Avx512 {
            return;
        }
        let bounds = [f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 0.0, -0.0, 88.73, 88.72, -103.98, -103.97, -87.4, -104.5];
        let x: Vec<f32> = bounds.into_iter().chain((0..1_000_005).map(|i| (i as f32 - 540_000.0) * 1.953_1e-4)).collect();
        for x in x.chunks_exact(16) {
            let mut got = [0.0f32; 16];
            // SAFETY: the processor has AVX-512 F; 16 numbers are read and written.
            unsafe {
                use std::arch::x86_64::*;
                _mm512_storeu_ps(got.as_mut_ptr(), super::exp_512(_mm512_loadu_ps(x.as_ptr())));
            }
            for (x, got) in x.iter().zip(got) {
                let want = exp(*x);
                assert!(want.to_bits() == got.to_bits() || (want.is_nan() && got.is_nan()), "exp({x}): {want} and {got}");
            }
        }
    }

    #[test]
    #[ignore = "a measurement"]
    fn exp_throughput() {
        let mut x = vec![-0.5f32; 8192];
        let mut best = f64::MAX;
        for _ in 0..2000 {
            x.fill(-0.5);
            let start = std::time::Instant::now();
            exp_all(&mut x);
            best = best.min(start.elapsed().as_secs_f64());
        }
        println!("exp: {:.2} ns for 16 values", best / 512.0 * 1e9);
    }
}
