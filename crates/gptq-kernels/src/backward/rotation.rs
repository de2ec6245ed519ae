//! The gradient of RoPE.

use rayon::prelude::*;

use crate::real::Real;
use crate::rotation::{Pairing, Rotation};
use crate::vector::vectorized;

impl Rotation {
    /// Replaces `dy [windows * tokens, heads * head_dim]`, the gradient of what [`Rotation::apply`] gave, by
    /// that of what it took; row `r` stands at position `r % tokens` of the table.
    ///
    /// RoPE is linear, `y = A x` with `A = (c, -s; s, c)` for each pair (Su et al. 2021, eq. 34), so
    /// `dx = A^T dy`. Where the table is scaled (YaRN's attention factor, [`Rotation::scaled`]) this is the
    /// transpose still, no longer the inverse.
    ///
    /// # Panics
    /// If a row is no multiple of the head, or a position is not in the table.
    pub fn apply_transposed<R: Real>(&self, dy: &mut [R], width: usize, tokens: usize) {
        self.apply_transposed_at(dy, width, |row| row % tokens);
    }

    /// The same with row `r` at `position(r)` of the table.
    pub fn apply_transposed_at<R: Real>(
        &self,
        dy: &mut [R],
        width: usize,
        position: impl Fn(usize) -> usize + Sync,
    ) {
        assert_eq!(width % self.head_dim(), 0, "whole heads");
        let turning = self.rotary_dim();
        let half = turning / 2;
        let (cos, sin) = self.tables();
        dy.par_chunks_mut(width).enumerate().for_each(|(row, dy)| {
            let position = position(row) * half;
            let cos = &cos[position..position + half];
            let sin = &sin[position..position + half];
            vectorized(|| {
                for head in dy.chunks_exact_mut(self.head_dim()) {
                    match self.pairing() {
                        Pairing::Halves => turn_halves_back(&mut head[..turning], cos, sin),
                        Pairing::Interleaved => turn_pairs_back(&mut head[..turning], cos, sin),
                    }
                }
            });
        });
    }
}

#[inline(always)]
fn turn_back<R: Real>(a: R, b: R, c: f32, s: f32) -> (R, R) {
    let (c, s) = (R::from(c), R::from(s));
    (a * c + b * s, b * c - a * s)
}

#[inline(always)]
fn turn_halves_back<R: Real>(head: &mut [R], cos: &[f32], sin: &[f32]) {
    let (first, second) = head.split_at_mut(cos.len());
    for (((a, b), &c), &s) in first.iter_mut().zip(second).zip(cos).zip(sin) {
        (*a, *b) = turn_back(*a, *b, c, s);
    }
}

#[inline(always)]
fn turn_pairs_back<R: Real>(head: &mut [R], cos: &[f32], sin: &[f32]) {
    for ((pair, &c), &s) in head.chunks_exact_mut(2).zip(cos).zip(sin) {
        (pair[0], pair[1]) = turn_back(pair[0], pair[1], c, s);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backward::definition::{
        SINGLE, assert_derivative, assert_near, on_threads, random, rotate, single,
    };

    const TOKENS: usize = 21;
    const HEADS: usize = 3;
    const HEAD_DIM: usize = 24;
    const WIDTH: usize = HEADS * HEAD_DIM;

    /// Both pairings; whole heads, a part, nothing; plain, with a factor, with a factor for each position;
    /// from the first position on and from a later one.
    fn rotations() -> Vec<Rotation> {
        let mut all = Vec::new();
        for pairing in [Pairing::Halves, Pairing::Interleaved] {
            for pairs in [HEAD_DIM / 2, 5, 0] {
                let frequencies: Vec<f32> = (0..pairs).map(|i| 0.7f32.powi(i as i32)).collect();
                for (first, scale) in [(0, 1.0), (100, 1.27)] {
                    let positions = first..first + TOKENS;
                    let plain = Rotation::new(&frequencies, positions, scale, HEAD_DIM, pairing);
                    if pairs > 0 {
                        let factors: Vec<f32> = (0..TOKENS).map(|t| 1.0 + 0.1 * t as f32).collect();
                        all.push(plain.clone().scaled(&factors));
                    }
                    all.push(plain);
                }
            }
        }
        all
    }

    #[test]
    fn the_gradient_of_every_rotation_is_its_derivative() {
        let (x, dy) = (random(2 * TOKENS * WIDTH, 1), random(2 * TOKENS * WIDTH, 2));
        for rotation in rotations() {
            let mut y = single(&x);
            rotation.apply(&mut y, WIDTH, TOKENS);
            let want = rotate(&x, &rotation, WIDTH, TOKENS);
            assert_near(&y, &want, 1e-5, "the forward pass");
            let mut dx = dy.clone();
            rotation.apply_transposed(&mut dx, WIDTH, TOKENS);
            let forward = |x: &[f64]| rotate(x, &rotation, WIDTH, TOKENS);
            assert_derivative(forward, &x, &dy, &dx, "rotation");
            let run = |threads| {
                on_threads(threads, || {
                    let mut dx = single(&dy);
                    rotation.apply_transposed(&mut dx, WIDTH, TOKENS);
                    dx
                })
            };
            let one = run(1);
            assert_near(&one, &dx, SINGLE, "rotation in f32");
            assert_eq!(one, run(2));
            let mut turned = single(&dy);
            (rotation.clone().transposed()).apply(&mut turned, WIDTH, TOKENS);
            assert_near(&turned, &dx, SINGLE, "the transposed table");
        }
    }

    #[test]
    fn rows_may_stand_at_any_position() {
        let rotation = &rotations()[0];
        let dy = random(TOKENS * WIDTH, 3);
        let mut all = dy.clone();
        rotation.apply_transposed(&mut all, WIDTH, TOKENS);
        let mut last = dy[(TOKENS - 1) * WIDTH..].to_vec();
        rotation.apply_transposed_at(&mut last, WIDTH, |_| TOKENS - 1);
        assert_eq!(last, all[(TOKENS - 1) * WIDTH..]);
    }
}
