//! Gradients of norms.

use pulp::Simd;
use rayon::prelude::*;

use crate::real::Real;
use crate::vector::{Kernel, dot, lane_sum, run_widest};

/// Runs handed to one task, whose gradients of weight and bias are one partial sum.
const RUNS_PER_TASK: usize = 64;

/// Where the gradients of a norm's parameters are added, `[weight.len()]` each; `None` for what is not
/// trained.
#[derive(Debug)]
pub struct NormGradients<'a, R> {
    /// Of the weight.
    pub weight: Option<&'a mut [R]>,
    /// Of the bias, which a layer norm may have.
    pub bias: Option<&'a mut [R]>,
}

impl<R> NormGradients<'_, R> {
    /// Nothing is trained.
    pub fn none() -> Self {
        NormGradients {
            weight: None,
            bias: None,
        }
    }
}

/// The gradient of [`rms_norm`](crate::rms_norm) with respect to `x`, from `dy` and its inputs, both as long
/// as `x`; runs of `weight.len()` elements are rows or heads. That of the weight is added to `d_weight`.
///
/// With `r = 1 / sqrt(mean(x^2) + eps)`, `n = x r` and `g = dy weight`: `dx = r (g - n mean(g n))` and
/// `d_weight = sum over runs of dy n` (the norm: Zhang and Sennrich 2019, eq. 4).
///
/// # Panics
/// If lengths do not agree.
pub fn rms_norm_backward<R: Real>(
    dy: &[R],
    x: &[R],
    weight: &[R],
    eps: R,
    d_weight: Option<&mut [R]>,
) -> Vec<R> {
    let gradients = NormGradients {
        weight: d_weight,
        bias: None,
    };
    backward(dy, x, weight, eps, false, gradients)
}

/// The same of [`layer_norm`](crate::layer_norm), whose output does not depend on the bias but by a sum:
/// with `n = (x - mean) r` and `r = 1 / sqrt(variance + eps)`, `dx = r (g - mean(g) - n mean(g n))`,
/// `d_weight = sum of dy n` and `d_bias = sum of dy` (the norm: Ba et al. 2016, eq. 3).
///
/// # Panics
/// If lengths do not agree.
pub fn layer_norm_backward<R: Real>(
    dy: &[R],
    x: &[R],
    weight: &[R],
    eps: R,
    gradients: NormGradients<'_, R>,
) -> Vec<R> {
    backward(dy, x, weight, eps, true, gradients)
}

fn backward<R: Real>(
    dy: &[R],
    x: &[R],
    weight: &[R],
    eps: R,
    is_centred: bool,
    gradients: NormGradients<'_, R>,
) -> Vec<R> {
    let width = weight.len();
    assert_eq!(dy.len(), x.len(), "an element of dy for each of x");
    assert_eq!(x.len() % width, 0, "whole runs");
    let mut dx = vec![R::ZERO; x.len()];
    let task = width * RUNS_PER_TASK;
    let partial: Vec<[Vec<R>; 2]> = (dx.par_chunks_mut(task))
        .zip(dy.par_chunks(task).zip(x.par_chunks(task)))
        .map(|(dx, (dy, x))| {
            run_widest(Runs {
                dx,
                dy,
                x,
                weight,
                eps,
                is_centred,
                is_summed: [&gradients.weight, &gradients.bias].map(Option::is_some),
            })
        })
        .collect();
    let NormGradients { weight, bias } = gradients;
    for (at, sum) in [weight, bias].into_iter().enumerate() {
        let Some(sum) = sum else { continue };
        assert_eq!(sum.len(), width, "a gradient for each parameter");
        for partial in &partial {
            add(sum, &partial[at]);
        }
    }
    dx
}

#[inline(always)]
fn add<R: Real>(sum: &mut [R], x: &[R]) {
    for (sum, &x) in sum.iter_mut().zip(x) {
        *sum += x;
    }
}

/// Some runs; gives the sums over them of `dy n` and of `dy`, empty where nobody wants them.
struct Runs<'a, R> {
    dx: &'a mut [R],
    dy: &'a [R],
    x: &'a [R],
    weight: &'a [R],
    eps: R,
    is_centred: bool,
    is_summed: [bool; 2],
}

impl<R: Real> Kernel for Runs<'_, R> {
    type Output = [Vec<R>; 2];

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> [Vec<R>; 2] {
        let width = self.weight.len();
        let count = R::of(width as f64);
        let [mut d_weight, mut d_bias] =
            (self.is_summed).map(|wanted| vec![R::ZERO; if wanted { width } else { 0 }]);
        let mut normed = vec![R::ZERO; width];
        let inputs = self.dy.chunks_exact(width).zip(self.x.chunks_exact(width));
        for (dx, (dy, x)) in self.dx.chunks_exact_mut(width).zip(inputs) {
            let mean = match self.is_centred {
                true => lane_sum(x, |x| x) / count,
                false => R::ZERO,
            };
            let square = lane_sum(x, |x| (x - mean) * (x - mean)) / count;
            let scale = R::ONE / (square + self.eps).sqrt();
            for (n, &x) in normed.iter_mut().zip(x) {
                *n = (x - mean) * scale;
            }
            for ((dx, &dy), &w) in dx.iter_mut().zip(dy).zip(self.weight) {
                *dx = dy * w;
            }
            let shift = match self.is_centred {
                true => lane_sum(dx, |g| g) / count,
                false => R::ZERO,
            };
            let along = dot(dx, &normed) / count;
            for (dx, &n) in dx.iter_mut().zip(&normed) {
                *dx = scale * (*dx - shift - n * along);
            }
            for ((sum, &dy), &n) in d_weight.iter_mut().zip(dy).zip(&normed) {
                *sum += dy * n;
            }
            add(&mut d_bias, dy);
        }
        [d_weight, d_bias]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backward::definition::{
        SINGLE, assert_derivative, assert_near, layer_norm, on_threads, random, rms_norm, single,
    };

    /// More than a task of runs.
    const RUNS: usize = RUNS_PER_TASK + 9;
    /// Heads, a width that is no multiple of the lanes, a row.
    const WIDTHS: [usize; 3] = [16, 37, 576];
    const EPS: f64 = 0.01;

    #[test]
    fn gradients_of_the_rms_norm_are_its_derivatives() {
        for width in WIDTHS {
            let (x, weight) = (random(RUNS * width, 1), random(width, 2));
            let dy = random(x.len(), 3);
            let y = crate::rms_norm(&single(&x), &single(&weight), EPS as f32);
            assert_near(&y, &rms_norm(&x, &weight, EPS), 1e-5, "the forward pass");
            let mut d_weight = vec![0.0; width];
            let dx = rms_norm_backward(&dy, &x, &weight, EPS, Some(&mut d_weight));
            assert_derivative(|x| rms_norm(x, &weight, EPS), &x, &dy, &dx, "x");
            assert_derivative(|w| rms_norm(&x, w, EPS), &weight, &dy, &d_weight, "weight");

            let mut d_single = vec![0.0f32; width];
            let inputs = [&dy, &x, &weight].map(|x| single(x));
            let [dy, x, weight] = &inputs;
            let got = rms_norm_backward(dy, x, weight, EPS as f32, Some(&mut d_single));
            assert_near(&got, &dx, SINGLE, "x in f32");
            assert_near(&d_single, &d_weight, SINGLE, "weight in f32");
            let got_alone = rms_norm_backward(dy, x, weight, EPS as f32, None);
            assert_eq!(got, got_alone);
        }
    }

    #[test]
    fn gradients_of_the_layer_norm_are_its_derivatives() {
        for width in WIDTHS {
            let x: Vec<f64> = random(RUNS * width, 4).iter().map(|x| x + 3.0).collect();
            let (weight, bias) = (random(width, 5), random(width, 6));
            let dy = random(x.len(), 7);
            let y = crate::layer_norm(
                &single(&x),
                &single(&weight),
                Some(&single(&bias)),
                EPS as f32,
            );
            let want = layer_norm(&x, &weight, &bias, EPS);
            assert_near(&y, &want, 1e-5, "the forward pass");
            let mut sums = [vec![0.0; width], vec![0.0; width]];
            let [d_weight, d_bias] = &mut sums;
            let gradients = NormGradients {
                weight: Some(d_weight),
                bias: Some(d_bias),
            };
            let dx = layer_norm_backward(&dy, &x, &weight, EPS, gradients);
            let [d_weight, d_bias] = &sums;
            let forward = |x: &[f64], w: &[f64], b: &[f64]| layer_norm(x, w, b, EPS);
            assert_derivative(|x| forward(x, &weight, &bias), &x, &dy, &dx, "x");
            assert_derivative(|w| forward(&x, w, &bias), &weight, &dy, d_weight, "weight");
            assert_derivative(|b| forward(&x, &weight, b), &bias, &dy, d_bias, "bias");

            let [dy, x, weight] = &[&dy, &x, &weight].map(|x| single(x));
            let mut singles = [vec![0.0f32; width], vec![0.0f32; width]];
            let [of_weight, of_bias] = &mut singles;
            let gradients = NormGradients {
                weight: Some(of_weight),
                bias: Some(of_bias),
            };
            let got = layer_norm_backward(dy, x, weight, EPS as f32, gradients);
            assert_near(&got, &dx, SINGLE, "x in f32");
            assert_near(&singles[0], d_weight, SINGLE, "weight in f32");
            assert_near(&singles[1], d_bias, SINGLE, "bias in f32");
            let nothing = NormGradients::none();
            assert_eq!(got, layer_norm_backward(dy, x, weight, EPS as f32, nothing));
        }
    }

    #[test]
    fn sums_are_added_to_and_the_same_for_any_thread_count() {
        let width = 37;
        let (x, dy) = (
            single(&random(500 * width, 8)),
            single(&random(500 * width, 9)),
        );
        let weight = single(&random(width, 10));
        let run = |threads, before: f32| {
            on_threads(threads, || {
                let mut d_weight = vec![before; width];
                let dx = rms_norm_backward(&dy, &x, &weight, 1e-5, Some(&mut d_weight));
                (dx, d_weight)
            })
        };
        let one = run(1, 0.0);
        assert_eq!(one, run(2, 0.0));
        assert_eq!(one, run(3, 0.0));
        let (_, more) = run(2, 1000.0);
        for (more, less) in more.iter().zip(&one.1) {
            assert!((more - less - 1000.0).abs() < 1e-2);
        }
    }
}
