//! Rotary position embedding (RoPE; Su et al. 2021) of queries and keys.

use rayon::prelude::*;

use crate::vector::vectorized;

/// The components of a head that are rotated together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pairing {
    /// `i` and `i + rotary_dim / 2`, as Hugging Face stores Llama.
    Halves,
    /// `2 i` and `2 i + 1` (GLM-4, Cohere).
    Interleaved,
}

/// Cosines and sines `[positions, rotary_dim / 2]` each. The first `rotary_dim` components of a head are
/// rotated, the others pass.
#[derive(Clone, Debug)]
pub struct Rotation {
    head_dim: usize,
    pairing: Pairing,
    cos: Vec<f32>,
    sin: Vec<f32>,
    half: usize, // rotary_dim / 2
}

impl Rotation {
    /// Angles `position * inverse_frequency`, both factors in f32 as the reference has them; `scale`
    /// multiplies cosines and sines (the attention factor of YaRN, else 1). A frequency for each pair.
    ///
    /// # Panics
    /// If there are more pairs than a head has.
    pub fn new(
        inverse_frequencies: &[f32],
        positions: std::ops::Range<usize>,
        scale: f32,
        head_dim: usize,
        pairing: Pairing,
    ) -> Self {
        let half = inverse_frequencies.len();
        assert!(2 * half <= head_dim, "a head has room for its pairs");
        let angles = || {
            positions.clone().flat_map(|position| {
                inverse_frequencies
                    .iter()
                    .map(move |frequency| position as f32 * frequency)
            })
        };
        Rotation {
            head_dim,
            pairing,
            cos: angles().map(|a| a.cos() * scale).collect(),
            sin: angles().map(|a| a.sin() * scale).collect(),
            half,
        }
    }

    /// Multiplies the cosines and sines of each position by a factor, which scales the rotated components.
    pub fn scaled(mut self, factors: &[f32]) -> Self {
        for table in [&mut self.cos, &mut self.sin] {
            for (row, factor) in table.chunks_exact_mut(self.half).zip(factors) {
                row.iter_mut().for_each(|value| *value *= factor);
            }
        }
        self
    }

    /// The transpose, of which the gradient of the rotation is made: sines have the other sign, so each pair
    /// `(c, -s; s, c)` becomes `(c, s; -s, c)`. Where the table is scaled it is not the inverse.
    pub fn transposed(mut self) -> Self {
        self.sin.iter_mut().for_each(|sine| *sine = -*sine);
        self
    }

    /// Width of the heads that it rotates.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Components of a head that are rotated.
    pub fn rotary_dim(&self) -> usize {
        2 * self.half
    }

    /// The components that are rotated together.
    pub fn pairing(&self) -> Pairing {
        self.pairing
    }

    /// Cosines and sines, `[positions, rotary_dim / 2]` each.
    pub fn tables(&self) -> (&[f32], &[f32]) {
        (&self.cos, &self.sin)
    }

    /// Rotates `x [windows * tokens, heads * head_dim]` in place; row `r` stands at position
    /// `r % tokens` of the table.
    pub fn apply(&self, x: &mut [f32], width: usize, tokens: usize) {
        self.apply_at(x, width, |row| row % tokens);
    }

    /// Applies the rotation with row `r` at `position(r)` of the table.
    pub fn apply_at(&self, x: &mut [f32], width: usize, position: impl Fn(usize) -> usize + Sync) {
        let half = self.half;
        x.par_chunks_mut(width).enumerate().for_each(|(row, x)| {
            let position = position(row) * half;
            let cos = &self.cos[position..position + half];
            let sin = &self.sin[position..position + half];
            vectorized(|| {
                for head in x.chunks_exact_mut(self.head_dim) {
                    match self.pairing {
                        Pairing::Halves => rotate_halves(&mut head[..2 * half], cos, sin),
                        Pairing::Interleaved => rotate_pairs(&mut head[..2 * half], cos, sin),
                    }
                }
            });
        });
    }
}

#[inline(always)]
fn rotate_halves(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (first, second) = head.split_at_mut(cos.len());
    for (((a, b), c), s) in first.iter_mut().zip(second).zip(cos).zip(sin) {
        (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
    }
}

#[inline(always)]
fn rotate_pairs(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    for ((pair, c), s) in head.chunks_exact_mut(2).zip(cos).zip(sin) {
        (pair[0], pair[1]) = (pair[0] * c - pair[1] * s, pair[1] * c + pair[0] * s);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rotation_turns_the_pair_half_a_head_apart() {
        let rotation = Rotation::new(&[1.0, 0.1], 0..4, 1.0, 4, Pairing::Halves);
        let mut x = vec![0.0; 2 * 4];
        x[4] = 1.0; // second row, first component
        rotation.apply(&mut x, 4, 2);
        assert!((x[4] - 1.0f32.cos()).abs() < 1e-6);
        assert!((x[6] - 1.0f32.sin()).abs() < 1e-6);
        assert_eq!(x[5], 0.0);
    }

    #[test]
    fn what_lies_beyond_the_turning_part_passes() {
        let rotation = Rotation::new(&[1.0], 1..2, 1.0, 4, Pairing::Interleaved).scaled(&[2.0]);
        let mut x = vec![1.0, 0.0, 3.0, 4.0];
        rotation.apply(&mut x, 4, 1);
        let want = [2.0 * 1.0f32.cos(), 2.0 * 1.0f32.sin(), 3.0, 4.0];
        for (got, want) in x.iter().zip(want) {
            assert!((got - want).abs() < 1e-6, "{x:?}");
        }
    }
}
