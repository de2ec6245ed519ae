//! What tests of gradients share: the forward operations in f64, and differences of them.

use crate::Real;
pub use crate::definition::*;

/// Between a gradient in f64 and central differences along a direction, relative.
pub const DERIVATIVE: f64 = 1e-6;
/// Between a gradient in f32 and in f64, relative to the largest element.
pub const SINGLE: f64 = 1e-4;

/// Uniform in -1..1.
pub fn random(len: usize, seed: u64) -> Vec<f64> {
    let mut state = seed;
    let mut next = || {
        // SplitMix64
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

pub fn single(x: &[f64]) -> Vec<f32> {
    x.iter().map(|&x| x as f32).collect()
}

pub fn on_threads<T: Send>(threads: usize, run: impl FnOnce() -> T + Send) -> T {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
    pool.build().unwrap().install(run)
}

/// The largest difference, relative to the largest element that there should be.
pub fn assert_near<R: Copy + Into<f64>>(got: &[R], want: &[f64], tolerance: f64, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    let largest = want.iter().fold(0.0f64, |max, x| max.max(x.abs()));
    let error = (got.iter().zip(want))
        .map(|(&got, want)| (got.into() - want).abs())
        .fold(0.0f64, |max, x| if x > max || x.is_nan() { x } else { max });
    assert!(
        error <= tolerance * largest,
        "{what}: {error} beside {largest}"
    );
}

fn inner(x: &[f64], y: &[f64]) -> f64 {
    x.iter().zip(y).map(|(x, y)| x * y).sum()
}

/// Holds `gradient`, that of `sum(dy * forward(x))`, against central differences along some directions.
pub fn assert_derivative(
    forward: impl Fn(&[f64]) -> Vec<f64>,
    x: &[f64],
    dy: &[f64],
    gradient: &[f64],
    what: &str,
) {
    const STEP: f64 = 1e-5;
    for seed in [71, 72] {
        let direction = random(x.len(), seed);
        let moved = |by: f64| -> Vec<f64> {
            let places = x.iter().zip(&direction);
            forward(&places.map(|(x, u)| x + by * u).collect::<Vec<_>>())
        };
        // The difference before the sum: sums of their own would cancel.
        let (above, below) = (moved(STEP), moved(-STEP));
        let change: Vec<f64> = above.iter().zip(&below).map(|(a, b)| a - b).collect();
        let want = inner(&change, dy) / (2.0 * STEP);
        let got = inner(gradient, &direction);
        let error = (got - want).abs() / want.abs();
        assert!(error <= DERIVATIVE, "{what}: {got} against {want}");
    }
}

/// Both precisions are there, and round as they should.
#[test]
fn whole_numbers_are_rounded_half_to_even_in_both_precisions() {
    fn rounded<R: Real>(x: f64) -> R {
        (R::of(x) + R::ROUND) - R::ROUND
    }
    for x in [0.0, 0.5, 1.5, 2.5, 2.499, -0.5, -1.5, -7.51, 255.5, -256.5] {
        assert_eq!(f64::from(rounded::<f32>(x)), x.round_ties_even());
        assert_eq!(rounded::<f64>(x), x.round_ties_even());
    }
}
