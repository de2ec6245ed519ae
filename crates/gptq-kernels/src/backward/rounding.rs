//! Straight-through rounding: weights on a grid, and gradients as if rounding were smooth.
//!
//! A latent is the real number behind a code. With `s` the scale, rounded to f16, `z` the zero and
//! `x = latent / s`, the code is `c = clamp(round(x) + z, 0, 2^bits - 1)`, half to even, and the weight
//! `w = (c - z) s`: the code that gptq-quantizer's grids give for the same latent, and what it dequantizes
//! to, bit for bit. The gradient of rounding is taken to be 1 (LSQ: Esser et al. 2020, eqs. 3 and 5):
//!
//! | | `dw / d latent` | `dw / d s` |
//! |---|---|---|
//! | `round(x) + z` is a code | 1 | `(c - z) - x` |
//! | it was clamped | 0 | `c - z` |
//!
//! So a latent counts as inside until it is half a step beyond the outermost weight; in the paper's own
//! rule it ends at that weight. The paper's factor for the gradient of a scale is left to the learning
//! rate.

use gptq_types::Bits;
use half::f16;
use rayon::prelude::*;

use crate::real::Real;
use crate::vector::vectorized;

/// Values from the border of a code to the first that is inside: a quotient that is rounded to the border
/// is at most half a unit in the last place away from it, so two would do.
const MOST_MOVES: usize = 4;
/// Outputs of one task where a sum runs over input channels.
const OUTPUTS: usize = 512;

/// The grids of a linear that is trained. Scales, zeros and latents lie as the solver's layer has them: the
/// latents `[in_features, out_features]`, so that the weights go into a product as they are, and each
/// input channel reads one row of scales and zeros.
#[derive(Clone, Copy, Debug)]
pub struct TrainedGrids<'a, R> {
    /// Width of a code.
    pub bits: Bits,
    /// Columns.
    pub out_features: usize,
    /// `[groups, out_features]`, as they are trained: rounded by [`stored_scale`] wherever they are used.
    /// They may be negative.
    pub scales: &'a [R],
    /// `[groups, out_features]`, whole numbers.
    pub zeros: &'a [R],
    /// `[in_features]`: the group of each input channel.
    pub g_idx: &'a [u32],
}

/// The nearest f16 that is neither zero nor subnormal, its sign kept: what a checkpoint stores for a
/// trained scale. Beyond f16 it is infinite, and no weight is finite.
#[inline(always)]
pub fn stored_scale<R: Real>(scale: R) -> R {
    let stored = scale.to_f16();
    let least = f16::MIN_POSITIVE;
    let stored = match stored.to_f32().abs() < least.to_f32() {
        true => least.to_f32().copysign(stored.to_f32()),
        false => stored.to_f32(),
    };
    R::from(stored)
}

/// Steps from the zero to the weight of `x = latent / scale`, and whether it is `x` rounded, not clamped.
#[inline(always)]
fn rounded<R: Real>(x: R, zero: R, max_code: R) -> (R, bool) {
    // Not `-zero`, which would be the other 0.
    let (low, high) = (R::ZERO - zero, max_code - zero);
    // A step beyond the codes, so that rounding by addition is right for any x.
    let (below, above) = (low - R::ONE, high + R::ONE);
    let x = if x < below { below } else { x };
    let x = if x > above { above } else { x };
    let steps = (x + R::ROUND) - R::ROUND;
    let is_inside = steps >= low && steps <= high;
    let steps = if steps < low { low } else { steps };
    let steps = if steps > high { high } else { steps };
    (steps, is_inside)
}

/// The number nearest to `latent` that rounds to `code` on the grid of a stored `scale`, `zero` and `bits`;
/// `latent` itself where it does. So a latent follows a code that was changed elsewhere.
///
/// # Panics
/// If no number does: the code has more bits, the zero is no code, or the scale, which may be a subnormal
/// f16, is 0 or not finite.
pub fn nearest_latent<R: Real>(latent: R, code: u8, scale: R, zero: R, bits: Bits) -> R {
    let max_code = R::of(f64::from(bits.max_code()));
    let steps = R::from(f32::from(code)) - zero;
    let rounds = |latent: R| rounded(latent / scale, zero, max_code).0 == steps;
    if rounds(latent) {
        return latent;
    }
    // Exact: a half of a whole number below 512 times eleven bits. A tie goes to the even side, so the
    // border itself may belong to the neighbour; and a quotient may be rounded to it.
    let half = R::of(0.5);
    let border = if latent / scale < steps { -half } else { half };
    let (mut nearest, middle) = ((steps + border) * scale, steps * scale);
    for _ in 0..MOST_MOVES {
        if rounds(nearest) {
            return nearest;
        }
        nearest = match nearest < middle {
            true => nearest.next_up(),
            false => nearest.next_down(),
        };
    }
    panic!("no number rounds to code {code} with scale {scale:?}, zero {zero:?} and {bits:?} bits");
}

impl<R: Real> TrainedGrids<'_, R> {
    fn max_code(&self) -> R {
        R::of(f64::from(self.bits.max_code()))
    }

    fn stored(&self) -> Vec<R> {
        self.scales
            .iter()
            .map(|&scale| stored_scale(scale))
            .collect()
    }

    fn check(&self, elements: usize) {
        let n = self.out_features;
        assert_eq!(elements, self.g_idx.len() * n, "a latent for each weight");
        assert_eq!(self.scales.len(), self.zeros.len(), "a zero for each scale");
        assert_eq!(self.scales.len() % n, 0, "whole groups");
    }

    /// Scales and zeros of an input channel.
    fn row<'a>(&'a self, stored: &'a [R], channel: usize) -> (&'a [R], &'a [R]) {
        let n = self.out_features;
        let group = self.g_idx[channel] as usize * n;
        (&stored[group..group + n], &self.zeros[group..group + n])
    }

    /// Writes the weights of `latents` to `weights`, both `[in_features, out_features]`.
    ///
    /// # Panics
    /// If lengths do not agree, or a group has no scales.
    pub fn round(&self, weights: &mut [R], latents: &[R]) {
        self.check(latents.len());
        assert_eq!(weights.len(), latents.len(), "a weight for each latent");
        let (stored, max_code, n) = (self.stored(), self.max_code(), self.out_features);
        (weights
            .par_chunks_mut(n)
            .zip(latents.par_chunks(n))
            .enumerate())
        .for_each(|(channel, (weights, latents))| {
            let (scales, zeros) = self.row(&stored, channel);
            vectorized(|| {
                let grids = scales.iter().zip(zeros);
                for ((w, &latent), (&s, &z)) in weights.iter_mut().zip(latents).zip(grids) {
                    *w = rounded(latent / s, z, max_code).0 * s;
                }
            });
        });
    }

    /// The codes of `latents`, `[in_features, out_features]`.
    ///
    /// # Panics
    /// As [`TrainedGrids::round`].
    pub fn codes(&self, latents: &[R]) -> Vec<u8> {
        self.check(latents.len());
        let (stored, max_code, n) = (self.stored(), self.max_code(), self.out_features);
        let mut codes = vec![0; latents.len()];
        (codes
            .par_chunks_mut(n)
            .zip(latents.par_chunks(n))
            .enumerate())
        .for_each(|(channel, (codes, latents))| {
            let (scales, zeros) = self.row(&stored, channel);
            let grids = scales.iter().zip(zeros);
            for ((code, &latent), (&s, &z)) in codes.iter_mut().zip(latents).zip(grids) {
                *code = (rounded(latent / s, z, max_code).0 + z).to_code();
            }
        });
        codes
    }

    /// Turns `d_weights`, the gradients of the weights of `latents`, into those of the latents, both
    /// `[in_features, out_features]`, and adds those of the scales to `d_scales [groups, out_features]`, each
    /// in the order of the input channels.
    ///
    /// # Panics
    /// As [`TrainedGrids::round`].
    pub fn backward(&self, d_weights: &mut [R], latents: &[R], d_scales: &mut [R]) {
        self.check(latents.len());
        assert_eq!(d_weights.len(), latents.len(), "a gradient for each weight");
        assert_eq!(
            d_scales.len(),
            self.scales.len(),
            "a gradient for each scale"
        );
        let (stored, max_code, n) = (self.stored(), self.max_code(), self.out_features);
        let mut channels = vec![Vec::new(); self.scales.len() / n];
        for (channel, &group) in self.g_idx.iter().enumerate() {
            channels[group as usize].push(channel);
        }
        // One group may be all of the linear, so its outputs are split as well.
        (d_scales.par_chunks_mut(n).zip(&channels)).for_each(|(d_scales, channels)| {
            (d_scales.par_chunks_mut(OUTPUTS).enumerate()).for_each(|(task, d_scales)| {
                let outputs = task * OUTPUTS..task * OUTPUTS + d_scales.len();
                for &channel in channels {
                    let (scales, zeros) = self.row(&stored, channel);
                    let grids = scales[outputs.clone()].iter().zip(&zeros[outputs.clone()]);
                    let at = channel * n + outputs.start..channel * n + outputs.end;
                    let places = d_weights[at.clone()].iter().zip(&latents[at]);
                    vectorized(|| add_scales(d_scales, places.zip(grids), max_code));
                }
            });
        });
        (d_weights
            .par_chunks_mut(n)
            .zip(latents.par_chunks(n))
            .enumerate())
        .for_each(|(channel, (d_weights, latents))| {
            let (scales, zeros) = self.row(&stored, channel);
            vectorized(|| {
                let grids = scales.iter().zip(zeros);
                for ((d, &latent), (&s, &z)) in d_weights.iter_mut().zip(latents).zip(grids) {
                    let (_, is_inside) = rounded(latent / s, z, max_code);
                    *d = if is_inside { *d } else { R::ZERO };
                }
            });
        });
    }

    /// Moves each of `latents` to the nearest number that rounds to its code, both
    /// `[in_features, out_features]`: see [`nearest_latent`].
    ///
    /// # Panics
    /// As [`TrainedGrids::round`] and [`nearest_latent`].
    pub fn move_to_codes(&self, latents: &mut [R], codes: &[u8]) {
        self.check(latents.len());
        assert_eq!(codes.len(), latents.len(), "a code for each latent");
        let (stored, n) = (self.stored(), self.out_features);
        (latents
            .par_chunks_mut(n)
            .zip(codes.par_chunks(n))
            .enumerate())
        .for_each(|(channel, (latents, codes))| {
            let (scales, zeros) = self.row(&stored, channel);
            let grids = scales.iter().zip(zeros);
            for ((latent, &code), (&s, &z)) in latents.iter_mut().zip(codes).zip(grids) {
                *latent = nearest_latent(*latent, code, s, z, self.bits);
            }
        });
    }
}

/// Adds `dw dw/ds` of one input channel; `places` are `((dw, latent), (scale, zero))`.
#[inline(always)]
fn add_scales<'a, R: Real + 'a>(
    d_scales: &mut [R],
    places: impl Iterator<Item = ((&'a R, &'a R), (&'a R, &'a R))>,
    max_code: R,
) {
    for (sum, ((&dw, &latent), (&scale, &zero))) in d_scales.iter_mut().zip(places) {
        let x = latent / scale;
        let (steps, is_inside) = rounded(x, zero, max_code);
        *sum += dw * if is_inside { steps - x } else { steps };
    }
}

#[cfg(test)]
mod tests;
