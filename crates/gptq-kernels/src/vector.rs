//! Run-time choice of the instruction set, and the scalar functions written so that the compiler
//! vectorizes them.

use crate::real::Real;

/// Runs `op` compiled for the widest vector instructions of this processor.
///
/// Only what is inlined into `op` profits: pass a closure around `#[inline(always)]` functions.
pub fn vectorized<R>(op: impl FnOnce() -> R) -> R {
    struct Op<F>(F);
    impl<R, F: FnOnce() -> R> pulp::NullaryFnOnce for Op<F> {
        type Output = R;
        #[inline(always)]
        fn call(self) -> R {
            (self.0)()
        }
    }
    pulp::Arch::new().dispatch(Op(op))
}

/// Work that is compiled once for each instruction set.
///
/// A large closure given to [`vectorized`] may be left out of line, where it is compiled for the
/// oldest processor (measured: a fifth of the speed). A method can say that it must not be.
pub(crate) trait Kernel {
    /// The result.
    type Output;

    /// To be `#[inline(always)]`.
    fn run<S: pulp::Simd>(self, simd: S) -> Self::Output;
}

/// Runs `kernel` compiled for the widest vector instructions of this processor.
pub(crate) fn run_widest<K: Kernel>(kernel: K) -> K::Output {
    struct Op<K>(K);
    impl<K: Kernel> pulp::WithSimd for Op<K> {
        type Output = K::Output;
        #[inline(always)]
        fn with_simd<S: pulp::Simd>(self, simd: S) -> K::Output {
            self.0.run(simd)
        }
    }
    #[cfg(test)]
    if PORTABLE.get() {
        return kernel.run(pulp::Scalar::new());
    }
    pulp::Arch::new().dispatch(Op(kernel))
}

#[cfg(test)]
thread_local! {
    /// Tests run what a processor without vectors would.
    pub(crate) static PORTABLE: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// `a * b + c`, rounded once where the processor does that as fast.
#[inline(always)]
pub(crate) fn multiply_sum<S: pulp::Simd>(a: f32, b: f32, c: f32) -> f32 {
    match S::IS_SCALAR {
        true => a * b + c,
        false => a.mul_add(b, c),
    }
}

/// `e^x` to 2 ulp for `x <= 88`, flushed to 0 below -87.
///
/// Range reduction by `ln 2` in two parts and a polynomial of degree 6 (Cephes `expf`), without
/// branches or calls, which is what lets the loop around it vectorize.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to the nearest integer
    let clamped = x.clamp(-87.0, 88.0);
    let n = (clamped * std::f32::consts::LOG2_E + ROUND) - ROUND;
    let r = clamped - n * 0.693_359_4 - n * -2.121_944_4e-4;
    let p = 1.987_569_1e-4_f32;
    let p = p * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 5.000_000_3e-1;
    let e = p * r * r + r + 1.0;
    let power = f32::from_bits((((n as i32) + 127) << 23) as u32);
    if x < -87.0 { 0.0 } else { e * power }
}

/// `tanh(x)` to 4 ulp, without branches or calls.
///
/// Near 0, where `1 - e^(-2 |x|)` would cancel, an odd polynomial (Cephes `tanhf`).
#[inline(always)]
pub(crate) fn tanh(x: f32) -> f32 {
    let square = x * x;
    let p = -5.704_988_7e-3_f32;
    let p = p * square + 2.063_908_8e-2;
    let p = p * square - 5.373_971_5e-2;
    let p = p * square + 1.333_144_2e-1;
    let p = p * square - 3.333_328e-1;
    let near = p * square * x + x;
    let e = exp(-2.0 * x.abs());
    let far = (1.0 - e) / (1.0 + e);
    let tanh = if x.abs() < 0.625 { near } else { far };
    tanh.copysign(x)
}

/// `cap * tanh(x / cap)`, element by element.
#[inline(always)]
pub(crate) fn cap_each(x: &mut [f32], cap: f32) {
    for x in x {
        *x = cap * tanh(*x / cap);
    }
}

/// `y += a * x`, element by element.
#[inline(always)]
pub fn axpy(y: &mut [f32], a: f32, x: &[f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y += a * x;
    }
}

const LANES: usize = 16;

/// Sum over `f(x)` in sixteen interleaved partial sums: one order for every instruction set.
#[inline(always)]
pub(crate) fn lane_sum<R: Real>(x: &[R], f: impl Fn(R) -> R) -> R {
    let mut lanes = [R::ZERO; LANES];
    let chunks = x.chunks_exact(LANES);
    let tail: R = chunks.remainder().iter().map(|&x| f(x)).sum();
    for chunk in chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane += f(x);
        }
    }
    lanes.into_iter().sum::<R>() + tail
}

#[inline(always)]
fn lane_max<R: Real>(x: &[R]) -> R {
    let mut lanes = [R::NEG_INFINITY; LANES];
    let chunks = x.chunks_exact(LANES);
    let tail = chunks
        .remainder()
        .iter()
        .copied()
        .fold(R::NEG_INFINITY, R::max);
    for chunk in chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane = if x > *lane { x } else { *lane };
        }
    }
    lanes.into_iter().fold(tail, R::max)
}

#[inline(always)]
pub(crate) fn sum(x: &[f32]) -> f32 {
    lane_sum(x, |x| x)
}

/// Sum of squared distances from `mean`.
#[inline(always)]
pub(crate) fn square_distance_sum(x: &[f32], mean: f32) -> f32 {
    lane_sum(x, |x| (x - mean) * (x - mean))
}

/// Sum of squares.
#[inline(always)]
pub(crate) fn square_sum(x: &[f32]) -> f32 {
    lane_sum(x, |x| x * x)
}

/// Inner product of two equally long slices.
#[inline(always)]
pub fn dot<R: Real>(x: &[R], y: &[R]) -> R {
    let mut lanes = [R::ZERO; LANES];
    let (xs, ys) = (x.chunks_exact(LANES), y.chunks_exact(LANES));
    let tail: R = (xs.remainder().iter())
        .zip(ys.remainder())
        .map(|(&x, &y)| x * y)
        .sum();
    for (xs, ys) in xs.zip(ys) {
        for ((lane, &x), &y) in lanes.iter_mut().zip(xs).zip(ys) {
            *lane += x * y;
        }
    }
    lanes.into_iter().sum::<R>() + tail
}

/// Replaces `row` by its softmax and returns nothing; an empty row stays empty.
#[inline(always)]
pub fn softmax<R: Real>(row: &mut [R]) {
    let max = lane_max(row);
    for x in row.iter_mut() {
        *x = (*x - max).exp();
    }
    let scale = R::ONE / lane_sum(row, |x| x);
    for x in row.iter_mut() {
        *x *= scale;
    }
}

/// `sum e^(x - max)`, the partition sum of a row relative to `max`.
#[inline(always)]
pub fn exp_sum(row: &[f32], max: f32) -> f32 {
    lane_sum(row, |x| exp(x - max))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_ulp() {
        for i in -8700..8800 {
            let x = i as f32 / 100.0 + 0.0037;
            let want = f64::from(x).exp();
            let got = f64::from(vectorized(|| exp(x)));
            assert!((got - want).abs() <= want * 2.4e-7, "exp({x}) = {got}");
        }
        assert_eq!(exp(-1000.0), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(0.0), 1.0);
    }

    #[test]
    fn tanh_is_within_four_ulp_and_saturates() {
        let ends = [1e-30, 1e-8, 0.624_999_9, 0.625, 9.0, 44.0, 1e5, f32::MAX];
        let steps = (1..20_000).map(|i| i as f32 * 6.1e-4);
        for x in ends.into_iter().chain(steps).flat_map(|x| [x, -x]) {
            let want = f64::from(x).tanh();
            let got = f64::from(vectorized(|| tanh(x)));
            assert!(
                (got - want).abs() <= want.abs() * 4.8e-7,
                "tanh({x}) = {got}"
            );
        }
        assert_eq!(tanh(f32::INFINITY), 1.0);
        assert_eq!(tanh(f32::NEG_INFINITY), -1.0);
        assert_eq!(tanh(-0.0).to_bits(), (-0.0f32).to_bits());
        assert!(tanh(f32::NAN).is_nan());
    }

    #[test]
    fn softmax_sums_to_one_and_ignores_minus_infinity() {
        let mut row: Vec<f32> = (0..37).map(|i| (i as f32 * 0.7).sin() * 4.0).collect();
        row[5] = f32::NEG_INFINITY;
        softmax(&mut row);
        assert_eq!(row[5], 0.0);
        assert!((row.iter().sum::<f32>() - 1.0).abs() < 1e-6);
    }
}
