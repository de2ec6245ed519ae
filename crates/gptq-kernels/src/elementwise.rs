//! Norms and activations, row by row, as Hugging Face transformers computes them.

use pulp::Simd;
use rayon::prelude::*;

use crate::vector::{
    Kernel, axpy, cap_each, exp, run_widest, square_distance_sum, square_sum, sum, tanh, vectorized,
};

/// Rows handed to one task: enough work to hide the cost of scheduling it.
const ROWS_PER_TASK: usize = 64;
/// Elements handed to one task.
const CHUNK: usize = 1 << 15;

/// Root-mean-square norm of each row of `x [rows, weight.len()]`:
/// `x * rsqrt(mean(x^2) + eps) * weight`, the mean in f32 (Zhang and Sennrich 2019, eq. 4).
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let width = weight.len();
    let mut out = vec![0.0f32; x.len()];
    out.par_chunks_mut(width * ROWS_PER_TASK)
        .zip(x.par_chunks(width * ROWS_PER_TASK))
        .for_each(|(out, x)| {
            vectorized(|| {
                for (out, x) in out.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
                    norm_row(out, x, weight, eps);
                }
            });
        });
    out
}

#[inline(always)]
fn norm_row(out: &mut [f32], x: &[f32], weight: &[f32], eps: f32) {
    let scale = 1.0 / (square_sum(x) / x.len() as f32 + eps).sqrt();
    for ((out, x), w) in out.iter_mut().zip(x).zip(weight) {
        *out = x * scale * w;
    }
}

/// Layer norm of each run of `weight.len()` elements of `x`:
/// `(x - mean) * rsqrt(variance + eps) * weight + bias`, the biased variance in a second pass over the
/// run (Ba et al. 2016; torch `LayerNorm`).
pub fn layer_norm(x: &[f32], weight: &[f32], bias: Option<&[f32]>, eps: f32) -> Vec<f32> {
    let width = weight.len();
    let mut out = vec![0.0f32; x.len()];
    out.par_chunks_mut(width * ROWS_PER_TASK)
        .zip(x.par_chunks(width * ROWS_PER_TASK))
        .for_each(|(out, x)| {
            run_widest(LayerNorm {
                out,
                x,
                weight,
                bias,
                eps,
            });
        });
    out
}

struct LayerNorm<'a> {
    out: &'a mut [f32],
    x: &'a [f32],
    weight: &'a [f32],
    bias: Option<&'a [f32]>,
    eps: f32,
}

impl Kernel for LayerNorm<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let width = self.weight.len();
        let rows = self.out.chunks_exact_mut(width);
        for (out, x) in rows.zip(self.x.chunks_exact(width)) {
            let mean = sum(x) / width as f32;
            let variance = square_distance_sum(x, mean) / width as f32;
            let scale = 1.0 / (variance + self.eps).sqrt();
            for ((out, x), w) in out.iter_mut().zip(x).zip(self.weight) {
                *out = (x - mean) * scale * w;
            }
            if let Some(bias) = self.bias {
                axpy(out, 1.0, bias);
            }
        }
    }
}

/// The nonlinearity of a feed-forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(x)` (SwiGLU: Shazeer 2020).
    Silu,
    /// `0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))`: `gelu_pytorch_tanh`, `gelu_new` (Hendrycks and
    /// Gimpel 2016).
    GeluTanh,
}

#[inline(always)]
fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

#[inline(always)]
fn gelu_tanh(x: f32) -> f32 {
    const SQRT_2_BY_PI: f32 = 0.797_884_6;
    0.5 * x * (1.0 + tanh(SQRT_2_BY_PI * (x + 0.044_715 * x * x * x)))
}

/// `activation(gate) * up`, element by element, into `gate` (Shazeer 2020).
pub fn gated(gate: &mut [f32], up: &[f32], activation: Activation) {
    gate.par_chunks_mut(CHUNK)
        .zip(up.par_chunks(CHUNK))
        .for_each(|(gate, up)| {
            run_widest(Gated {
                gate,
                up,
                activation,
            });
        });
}

struct Gated<'a> {
    gate: &'a mut [f32],
    up: &'a [f32],
    activation: Activation,
}

impl Kernel for Gated<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let pairs = self.gate.iter_mut().zip(self.up);
        match self.activation {
            Activation::Silu => {
                for (gate, up) in pairs {
                    *gate = silu(*gate) * up;
                }
            }
            Activation::GeluTanh => {
                for (gate, up) in pairs {
                    *gate = gelu_tanh(*gate) * up;
                }
            }
        }
    }
}

/// `activation(x)`, element by element, in place.
pub fn activate(x: &mut [f32], activation: Activation) {
    x.par_chunks_mut(CHUNK)
        .for_each(|x| run_widest(Activated { x, activation }));
}

struct Activated<'a> {
    x: &'a mut [f32],
    activation: Activation,
}

impl Kernel for Activated<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        match self.activation {
            Activation::Silu => {
                for x in self.x {
                    *x = silu(*x);
                }
            }
            Activation::GeluTanh => {
                for x in self.x {
                    *x = gelu_tanh(*x);
                }
            }
        }
    }
}

/// `cap * tanh(x / cap)`, element by element, in place: the soft cap of logits (Gemma 2).
pub fn soft_cap(x: &mut [f32], cap: f32) {
    x.par_chunks_mut(CHUNK)
        .for_each(|x| run_widest(Capped { x, cap }));
}

struct Capped<'a> {
    x: &'a mut [f32],
    cap: f32,
}

impl Kernel for Capped<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        cap_each(self.x, self.cap);
    }
}

/// `x += factor * y`, element by element; with a factor of 1 exactly `x + y`.
pub fn add_scaled(x: &mut [f32], y: &[f32], factor: f32) {
    x.par_chunks_mut(CHUNK)
        .zip(y.par_chunks(CHUNK))
        .for_each(|(x, y)| vectorized(|| axpy(x, factor, y)));
}

/// `x *= factor`, element by element.
pub fn scale(x: &mut [f32], factor: f32) {
    x.par_chunks_mut(CHUNK).for_each(|x| {
        vectorized(|| {
            for x in x {
                *x *= factor;
            }
        });
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two tasks of elements or more, the last one short.
    const LONG: usize = 2 * CHUNK + 77;

    fn wave(len: usize, step: f32, height: f32) -> Vec<f32> {
        (0..len).map(|i| (i as f32 * step).sin() * height).collect()
    }

    fn close(got: &[f32], want: impl IntoIterator<Item = f64>, tolerance: f64) {
        let mut count = 0;
        for (got, want) in got.iter().zip(want) {
            let error = (f64::from(*got) - want).abs();
            assert!(
                error <= tolerance * want.abs().max(1.0),
                "{got} against {want}"
            );
            count += 1;
        }
        assert_eq!(count, got.len());
    }

    #[test]
    fn norm_of_a_known_row() {
        let got = rms_norm(&[3.0, 4.0], &[1.0, 2.0], 0.0);
        let rms = 12.5f32.sqrt();
        assert!((got[0] - 3.0 / rms).abs() < 1e-6);
        assert!((got[1] - 8.0 / rms).abs() < 1e-6);
    }

    /// Rows far from 0 beside their spread, which a variance from one pass would lose.
    #[test]
    fn layer_norm_agrees_with_the_definition() {
        let (width, eps) = (37, 0.01);
        let mut x = wave((ROWS_PER_TASK + 5) * width, 0.37, 2.0);
        x.iter_mut().for_each(|x| *x += 1000.0);
        let (weight, bias) = (wave(width, 0.9, 1.0), wave(width, 0.7, 3.0));
        let want = |at: usize, bias: f64| {
            let row = x[at / width * width..][..width]
                .iter()
                .map(|&x| f64::from(x));
            let mean = row.clone().sum::<f64>() / width as f64;
            let variance = row.map(|x| (x - mean).powi(2)).sum::<f64>() / width as f64;
            let normed = (f64::from(x[at]) - mean) / (variance + eps).sqrt();
            normed * f64::from(weight[at % width]) + bias
        };
        let plain = layer_norm(&x, &weight, None, eps as f32);
        close(&plain, (0..x.len()).map(|at| want(at, 0.0)), 2e-4);
        let shifted = layer_norm(&x, &weight, Some(&bias), eps as f32);
        let want = (0..x.len()).map(|at| want(at, f64::from(bias[at % width])));
        close(&shifted, want, 2e-4);
    }

    fn in_f64(activation: Activation, x: f32) -> f64 {
        let x = f64::from(x);
        let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3));
        match activation {
            Activation::Silu => x / (1.0 + (-x).exp()),
            Activation::GeluTanh => 0.5 * x * (1.0 + inner.tanh()),
        }
    }

    #[test]
    fn activations_agree_with_their_definitions() {
        let up = wave(LONG, 0.11, 2.0);
        let mut inputs = wave(LONG, 0.37, 12.0);
        inputs[..7].copy_from_slice(&[0.0, 1e-6, -1e-6, 1e4, -1e4, 1e10, -1e10]);
        for activation in [Activation::Silu, Activation::GeluTanh] {
            let want = || inputs.iter().map(|&x| in_f64(activation, x));
            let mut alone = inputs.clone();
            activate(&mut alone, activation);
            close(&alone, want(), 1e-6);
            let mut gate = inputs.clone();
            gated(&mut gate, &up, activation);
            let want = want().zip(&up).map(|(x, &up)| x * f64::from(up));
            close(&gate, want, 2e-6);
        }
    }

    #[test]
    fn gate_of_known_values() {
        let mut gate = vec![0.0, 1.0, -30.0];
        gated(&mut gate, &[5.0, 2.0, 1.0], Activation::Silu);
        assert_eq!(gate[0], 0.0);
        assert!((gate[1] - 2.0 / (1.0 + (-1.0f32).exp())).abs() < 1e-6);
        assert!(gate[2].abs() < 1e-10);
    }

    #[test]
    fn caps_sums_and_factors_agree_with_their_definitions() {
        let (x, y) = (wave(LONG, 0.37, 80.0), wave(LONG, 0.11, 3.0));
        let pairs = || {
            x.iter()
                .zip(&y)
                .map(|(&x, &y)| (f64::from(x), f64::from(y)))
        };
        let mut got = x.clone();
        soft_cap(&mut got, 30.0);
        close(&got, pairs().map(|(x, _)| 30.0 * (x / 30.0).tanh()), 1e-6);
        let mut got = x.clone();
        scale(&mut got, -0.3);
        close(&got, pairs().map(|(x, _)| x * f64::from(-0.3f32)), 1e-6);
        let mut got = x.clone();
        add_scaled(&mut got, &y, 0.22);
        close(&got, pairs().map(|(x, y)| x + 0.22 * y), 1e-6);
        let mut got = x.clone();
        add_scaled(&mut got, &y, 1.0);
        assert!(
            got.iter()
                .zip(x.iter().zip(&y))
                .all(|(got, (x, y))| *got == x + y)
        );
    }
}
