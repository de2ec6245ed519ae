//! Search for the share of its weights' range that a grid should cover.
//!
//! A grid that reaches the largest weight spends its steps on outliers; a smaller one clips those and
//! rounds all others finer. The authors' later solver (IST-DASLab/marlin, `gptq/quant.py`) tries
//! shrunk grids and keeps the one with the least error, measured with the whole factor of the
//! group. Here only the diagonal of the damped Hessian is used, so that one pass over the weights
//! measures a grid: `H_ii (w - q)^2`. Weights of `1 / U_ii^2`, the solver's cost after later channels
//! have compensated the error, are as good in natural order and worse with act-order (perplexity 27.4
//! against 25.5 on SmolLM2-135M, 4-bit g64).
//!
//! All arithmetic is f32 without fused operations, each sum over the rows in order: every device
//! that keeps to it finds the same grids.

use gptq_types::{Bits, GroupSize, QuantSpec};

use crate::grid::{Extent, Grid, GridRule, ScaleOverflow, steps};

/// Shares tried for every group and output.
const SHARES: usize = 46;
/// Shares of the range that are tried with `full_range`; a multiple of the eight lanes that divide the search
/// on a GPU.
const SHARES_OF_FULL_RANGE: usize = 48;
/// Offsets of the zero points that are tried, from the one that follows from the scale.
const SHIFTS: [f32; 5] = [0.0, -1.0, 1.0, -2.0, 2.0];

/// A grid that is tried; the first of equals is kept.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// Share of the group's range that the grid spans.
    pub share: f32,
    /// Variant of the grid. 0: the grid that follows from the share. Others: of a symmetric grid the one with
    /// the opposite sign, of an asymmetric grid those with neighbouring zero points.
    pub way: usize,
}

impl Candidate {
    /// The grid for weights in `low..=high`.
    ///
    /// # Errors
    /// As [`GridRule::fit_range`].
    #[inline(always)]
    pub fn fit(&self, rule: &GridRule, low: f32, high: f32) -> Result<(f32, f32), ScaleOverflow> {
        let (scale, zero) = rule.fit_range(low * self.share, high * self.share)?;
        Ok(match (self.way, rule.is_symmetric()) {
            (0, _) => (scale, zero),
            (_, true) => (-scale, zero),
            (way, false) => (scale, rule.shifted(zero, SHIFTS[way])),
        })
    }
}

/// The number of grids that a search tries, and their range.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SearchRule {
    /// Shares from 1 down to `least`, evenly.
    pub shares: usize,
    /// The smallest share.
    pub least: f32,
    /// Grids of each share.
    pub ways: usize,
}

impl SearchRule {
    /// The fewer codes there are, the more there is to gain from clipping.
    ///
    /// With `full_range` shares fall to `p = 0.5` of the scale `max|w| / 2^(bits - 1)`, which spends
    /// every code (to 0.25 at 2 bits, and below 8 where one group spans the row and so has outliers); a share
    /// of 1 is `p = 2^bits / (2^bits - 1)`, the grid of the published checkpoints.
    pub fn new(spec: &QuantSpec) -> Self {
        if !spec.full_range {
            return SearchRule {
                shares: if spec.scale_search { SHARES } else { 1 },
                least: least_share(spec.bits),
                ways: 1,
            };
        }
        let least = match (spec.bits, spec.group_size) {
            (Bits::Eight, _) => 0.5,
            (Bits::Two, _) | (_, GroupSize::None) => 0.25,
            _ => 0.5,
        };
        let max_code = spec.bits.max_code() as f32;
        SearchRule {
            shares: SHARES_OF_FULL_RANGE,
            least: match spec.sym {
                true => least * max_code / (max_code + 1.0),
                false => least,
            },
            ways: match (spec.sym, spec.bits) {
                (false, _) => SHIFTS.len(),
                (true, Bits::Two | Bits::Three) => 2,
                (true, _) => 1,
            },
        }
    }

    /// All candidates; the full range comes first.
    ///
    /// `share = 1 - c (1 - least) / (shares - 1)` in f32, from left to right.
    pub fn candidates(&self) -> Vec<Candidate> {
        let last = self.shares.saturating_sub(1).max(1) as f32;
        (0..self.shares * self.ways)
            .map(|at| Candidate {
                share: 1.0 - (at / self.ways) as f32 * (1.0 - self.least) / last,
                way: at % self.ways,
            })
            .collect()
    }
}

/// The smallest share that is tried where scales are positive.
fn least_share(bits: Bits) -> f32 {
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

/// For each of `outputs` columns the first grid of `candidates` with the least error over `rows`.
///
/// # Errors
/// Weights whose whole extent f16 cannot hold: a smaller share would clip the largest in silence. A
/// share that overflows, as v1's zero may make it, has an error that is not a number and is never
/// preferred.
#[inline(always)]
pub fn fit_best(
    rule: &GridRule,
    candidates: &[Candidate],
    rows: &[Row<'_>],
    outputs: usize,
) -> Result<Grid, ScaleOverflow> {
    let extent = Extent::of(rows.iter().map(|row| row.weights), outputs);
    let mut best = rule.cover(&extent)?;
    if candidates.len() > 1 {
        let search = Search {
            rule,
            candidates,
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
    candidates: &'a [Candidate],
    rows: &'a [Row<'a>],
    extent: Extent,
}

impl Search<'_> {
    /// Puts the best grids of the columns from `first` on into `best`.
    #[inline(always)]
    fn improve<const L: usize>(&self, first: usize, best: &mut Grid) {
        let mut least = [f32::INFINITY; L];
        for candidate in self.candidates {
            let (mut scales, mut zeros) = ([0.0; L], [0.0; L]);
            for (lane, (scale, zero)) in scales.iter_mut().zip(&mut zeros).enumerate() {
                let (low, high) = self.extent.of_column(first + lane);
                let grid = candidate.fit(self.rule, low, high);
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
