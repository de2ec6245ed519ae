//! Norms, rotary embedding and activation, row by row, as Hugging Face transformers computes them.

use rayon::prelude::*;

use crate::vector::{exp, square_sum, vectorised};

/// Rows handed to one task: enough work to hide the cost of scheduling it.
const ROWS_PER_TASK: usize = 64;

/// Root-mean-square norm of each row of `x [rows, weight.len()]`:
/// `x * rsqrt(mean(x^2) + eps) * weight`, the mean in f32 (Zhang and Sennrich 2019, eq. 4).
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let width = weight.len();
    let mut out = vec![0.0f32; x.len()];
    out.par_chunks_mut(width * ROWS_PER_TASK)
        .zip(x.par_chunks(width * ROWS_PER_TASK))
        .for_each(|(out, x)| {
            vectorised(|| {
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

/// `silu(gate) * up`, element by element, into `gate` (Shazeer 2020, SwiGLU).
pub fn swiglu(gate: &mut [f32], up: &[f32]) {
    const CHUNK: usize = 1 << 15;
    gate.par_chunks_mut(CHUNK)
        .zip(up.par_chunks(CHUNK))
        .for_each(|(gate, up)| vectorised(|| gate_chunk(gate, up)));
}

#[inline(always)]
fn gate_chunk(gate: &mut [f32], up: &[f32]) {
    for (g, u) in gate.iter_mut().zip(up) {
        *g = *g / (1.0 + exp(-*g)) * u;
    }
}

/// Cosines and sines of the rotary embedding, `[positions, head_dim / 2]` each (Su et al. 2021),
/// in the rotate-half layout of Hugging Face checkpoints.
#[derive(Clone, Debug)]
pub struct Rotation {
    head_dim: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Rotation {
    /// Angles `position * inverse_frequency`, both factors in f32 as the reference has them;
    /// `scale` multiplies cosines and sines (the attention factor of yarn, else 1).
    pub fn new(inverse_frequencies: &[f32], positions: std::ops::Range<usize>, scale: f32) -> Self {
        let angles = || {
            positions.clone().flat_map(|position| {
                inverse_frequencies
                    .iter()
                    .map(move |frequency| position as f32 * frequency)
            })
        };
        Rotation {
            head_dim: inverse_frequencies.len() * 2,
            cos: angles().map(|a| a.cos() * scale).collect(),
            sin: angles().map(|a| a.sin() * scale).collect(),
        }
    }

    /// Width of the heads it turns.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Cosines and sines, `[positions, head_dim / 2]` each.
    pub fn tables(&self) -> (&[f32], &[f32]) {
        (&self.cos, &self.sin)
    }

    /// Rotates `x [windows * tokens, heads * head_dim]` in place; row `r` stands at position
    /// `r % tokens` of the table.
    pub fn apply(&self, x: &mut [f32], width: usize, tokens: usize) {
        self.apply_at(x, width, |row| row % tokens);
    }

    /// The same with row `r` at `position(r)` of the table.
    pub fn apply_at(&self, x: &mut [f32], width: usize, position: impl Fn(usize) -> usize + Sync) {
        let half = self.head_dim / 2;
        x.par_chunks_mut(width).enumerate().for_each(|(row, x)| {
            let position = position(row) * half;
            let cos = &self.cos[position..position + half];
            let sin = &self.sin[position..position + half];
            vectorised(|| {
                for head in x.chunks_exact_mut(self.head_dim) {
                    rotate_head(head, cos, sin);
                }
            });
        });
    }
}

#[inline(always)]
fn rotate_head(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (first, second) = head.split_at_mut(cos.len());
    for (((a, b), c), s) in first.iter_mut().zip(second).zip(cos).zip(sin) {
        (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn norm_of_a_known_row() {
        let got = rms_norm(&[3.0, 4.0], &[1.0, 2.0], 0.0);
        let rms = 12.5f32.sqrt();
        assert!((got[0] - 3.0 / rms).abs() < 1e-6);
        assert!((got[1] - 8.0 / rms).abs() < 1e-6);
    }

    #[test]
    fn rotation_turns_the_pair_half_a_head_apart() {
        let rotation = Rotation::new(&[1.0, 0.1], 0..4, 1.0);
        let mut x = vec![0.0; 2 * 4];
        x[4] = 1.0; // second row, first component
        rotation.apply(&mut x, 4, 2);
        assert!((x[4] - 1.0f32.cos()).abs() < 1e-6);
        assert!((x[6] - 1.0f32.sin()).abs() < 1e-6);
        assert_eq!(x[5], 0.0);
    }

    #[test]
    fn swiglu_of_known_values() {
        let mut gate = vec![0.0, 1.0, -30.0];
        swiglu(&mut gate, &[5.0, 2.0, 1.0]);
        assert_eq!(gate[0], 0.0);
        assert!((gate[1] - 2.0 / (1.0 + (-1.0f32).exp())).abs() < 1e-6);
        assert!(gate[2].abs() < 1e-10);
    }
}
