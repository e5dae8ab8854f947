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
    // (e^r - 1 - r) / r^2 over [-ln 2 / 2, ln 2 / 2]: with its rounded coefficients 0.2 units in the last place.
    let tail = 0.001_393_373_4;
    let tail = tail * rest + 0.008_363_236;
    let tail = tail * rest + 0.041_666_463;
    let tail = tail * rest + 0.166_665_76;
    let tail = tail * rest + 0.5;
    let mantissa = (rest * rest) * tail + rest + 1.0;
    // 2^power in two factors, because power reaches -150 and 128 while one factor ends at -126 and 127.
    let power = (shifted.to_bits() as i32).wrapping_sub(ROUNDER.to_bits() as i32);
    let half = power >> 1;
    let first = f32::from_bits((half.wrapping_add(127) << 23) as u32);
    let second = f32::from_bits((power.wrapping_sub(half).wrapping_add(127) << 23) as u32);
    (mantissa * first) * second
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
