//! Which share of its weights' extent a grid should cover.
//!
//! A grid that reaches the largest weight spends its steps on a few; a smaller one clips those and
//! rounds all others finer. The authors' later solver (IST-DASLab/marlin, `gptq/quant.py`) tries
//! shrunk grids and keeps the one with the least error, measured with the whole factor of the
//! group. Here only the diagonal of the damped Hessian counts, so that one pass over the weights
//! measures a grid: `H_ii (w - q)^2`. Weighing by `1 / U_ii^2` instead, what the solver charges
//! once later channels have made up for the error, is as good in natural order and worse with
//! act-order (perplexity 27.4 against 25.5 on SmolLM2-135M, 4-bit g64).
//!
//! All arithmetic is f32 without fused operations, each sum over the rows in order: every device
//! that keeps to it finds the same grids.

use gptq_types::{Bits, QuantSpec};

use crate::grid::{Extent, Grid, GridRule, ScaleOverflow, steps};

/// Grids tried for every group and output.
const CANDIDATES: usize = 46;

/// The shares of the extent that are tried, falling from 1; only 1 without a search. The fewer
/// codes there are, the more there is to gain from clipping.
///
/// `1 - c (1 - least) / 45` in f32, from left to right.
pub fn shares(spec: &QuantSpec) -> Vec<f32> {
    let least = least_share(spec.bits);
    let tried = if spec.scale_search { CANDIDATES } else { 1 };
    (0..tried)
        .map(|c| 1.0 - c as f32 * (1.0 - least) / (CANDIDATES - 1) as f32)
        .collect()
}

/// The smallest share that is tried.
pub fn least_share(bits: Bits) -> f32 {
    match bits {
        Bits::Two => 0.30,
        Bits::Three => 0.45,
        Bits::Four | Bits::Eight => 0.55,
    }
}

/// One input channel of a group.
pub struct Row<'a> {
    /// `[outputs]`.
    pub weights: &'a [f32],
    /// `H_ii`, damped.
    pub importance: f32,
}

/// Columns measured together: their sums and grids stay in registers, their weights in the
/// first-level cache.
const LANES: usize = 16;

/// For each of `outputs` columns the first grid of `shares` with the least error over `rows`.
///
/// # Errors
/// Weights whose whole extent f16 cannot hold: a smaller share would clip the largest in silence. A
/// share that overflows, as v1's zero may make it, has an error that is not a number and is never
/// preferred.
#[inline(always)]
pub fn fit_best(
    rule: &GridRule,
    shares: &[f32],
    rows: &[Row<'_>],
    outputs: usize,
) -> Result<Grid, ScaleOverflow> {
    let extent = Extent::of(rows.iter().map(|row| row.weights), outputs);
    let mut best = rule.cover(&extent)?;
    if shares.len() > 1 {
        let search = Search {
            rule,
            shares,
            rows,
            extent,
        };
        let whole = outputs - outputs % LANES;
        for first in (0..whole).step_by(LANES) {
            search.improve::<LANES>(first, &mut best);
        }
        for first in whole..outputs {
            search.improve::<1>(first, &mut best);
        }
    }
    Ok(best)
}

struct Search<'a> {
    rule: &'a GridRule,
    shares: &'a [f32],
    rows: &'a [Row<'a>],
    extent: Extent,
}

impl Search<'_> {
    /// Puts the best grids of the columns from `first` on into `best`.
    #[inline(always)]
    fn improve<const L: usize>(&self, first: usize, best: &mut Grid) {
        let mut least = [f32::INFINITY; L];
        for &share in self.shares {
            let (mut scales, mut zeros) = ([0.0; L], [0.0; L]);
            for (lane, (scale, zero)) in scales.iter_mut().zip(&mut zeros).enumerate() {
                let (low, high) = self.extent.of_column(first + lane);
                let grid = self.rule.fit_range(low * share, high * share);
                (*scale, *zero) = grid.unwrap_or((f32::NAN, 0.0));
            }
            let errors = self.errors(first, &scales, &zeros);
            for lane in 0..L {
                if errors[lane] < least[lane] {
                    least[lane] = errors[lane];
                    best.scales[first + lane] = scales[lane];
                    best.zeros[first + lane] = zeros[lane];
                }
            }
        }
    }

    /// Sums over the rows, in order, of `importance * (w - q)^2`.
    #[inline(always)]
    fn errors<const L: usize>(
        &self,
        first: usize,
        scales: &[f32; L],
        zeros: &[f32; L],
    ) -> [f32; L] {
        let max_code = self.rule.max_code();
        let inverses = scales.map(|scale| 1.0 / scale);
        let mut errors = [0.0; L];
        for row in self.rows {
            let weights = &row.weights[first..first + L];
            for lane in 0..L {
                let w = weights[lane];
                let q = steps(w * inverses[lane], zeros[lane], max_code) * scales[lane];
                errors[lane] += row.importance * ((w - q) * (w - q));
            }
        }
        errors
    }
}
