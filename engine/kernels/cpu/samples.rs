//! Numbers for the tests of this folder: fixed pseudo-random rows, and comparison with f64 references.

use crate::kernels::element::Float;

/// `count` values spread over [-1, 1), the same for the same seed (splitmix64).
pub fn uniform(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (0..count)
        .map(|_| {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = state;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            ((z ^ (z >> 31)) >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

/// The values rounded to `E`.
pub fn cast<E: Float>(values: &[f32]) -> Vec<E> {
    values.iter().map(|v| E::from_f32(*v)).collect()
}

/// The values widened to f64.
pub fn wide<E: Float>(values: &[E]) -> Vec<f64> {
    values.iter().map(|v| f64::from(v.to_f32())).collect()
}

/// Asserts |got - want| <= absolute + relative * |want| for each value.
#[track_caller]
pub fn assert_near<E: Float>(what: &str, got: &[E], want: &[f64], relative: f64, absolute: f64) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (index, (got, want)) in wide(got).iter().zip(want).enumerate() {
        let allowed = absolute + relative * want.abs();
        assert!((got - want).abs() <= allowed, "{what}[{index}]: got {got}, want {want}, allowed {allowed}");
    }
}

/// Runs `compute` on one thread and on two and asserts that the results are the same.
#[track_caller]
pub fn assert_same_on_any_threads<T: PartialEq + std::fmt::Debug>(compute: impl Fn() -> T) {
    use super::threads::set_threads;
    set_threads(1);
    let one = compute();
    set_threads(2);
    assert!(one == compute(), "the result depends on the number of threads");
}
