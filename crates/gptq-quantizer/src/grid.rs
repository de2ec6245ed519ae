//! The stored grid: a scale rounded to f16 and an integer zero, fixed before any code is chosen.

use gptq_types::QuantSpec;
use half::f16;

/// Scales and zeros of one group for some outputs.
#[derive(Clone, Debug, Default)]
pub struct Grid {
    /// `[outputs]`, exactly representable in f16.
    pub scales: Vec<f32>,
    /// `[outputs]`, whole numbers.
    pub zeros: Vec<f32>,
}

/// A scale that f16 cannot hold: the range of the weights cannot be stored.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ScaleOverflow(pub f32);

/// The rules by which a grid is chosen, from a [`QuantSpec`], in the types of the inner loop.
#[derive(Clone, Copy, Debug)]
pub struct GridRule {
    max_code: f32,
    min_zero: f32,
    sym: bool,
    full_range: bool,
}

impl GridRule {
    /// The rule of `spec`.
    pub fn new(spec: &QuantSpec) -> Self {
        GridRule {
            full_range: spec.full_range,
            ..Self::plain(spec)
        }
    }

    /// The rule of rounding to nearest: no scale is negative, no zero is searched.
    pub fn plain(spec: &QuantSpec) -> Self {
        GridRule {
            max_code: spec.bits.max_code() as f32,
            min_zero: spec.min_zero() as f32,
            sym: spec.sym,
            full_range: false,
        }
    }

    /// Whether every zero is the middle code.
    #[inline(always)]
    pub fn is_symmetric(&self) -> bool {
        self.sym
    }

    /// Largest code.
    pub fn max_code(&self) -> f32 {
        self.max_code
    }

    /// Grids of `outputs` columns from `weights`, rows of a group one after the other.
    #[inline(always)]
    pub fn fit<'a>(
        &self,
        weights: impl Iterator<Item = &'a [f32]>,
        outputs: usize,
    ) -> Result<Grid, ScaleOverflow> {
        self.cover(&Extent::of(weights, outputs))
    }

    /// Grids that cover every column's extent.
    #[inline(always)]
    pub fn cover(&self, extent: &Extent) -> Result<Grid, ScaleOverflow> {
        let mut grid = Grid::of(extent.low.len());
        let columns = extent.low.iter().zip(&extent.high);
        let grids = grid.scales.iter_mut().zip(&mut grid.zeros);
        for ((low, high), (scale, zero)) in columns.zip(grids) {
            (*scale, *zero) = self.fit_range(*low, *high)?;
        }
        Ok(grid)
    }

    /// Scale and zero for weights in `low..=high`, with `low <= 0 <= high`.
    ///
    /// Symmetric: `scale = 2 max|w| / max_code`, also where all weights have one sign; the original code then
    /// halves the range. Codes reach one step further below the zero than above it: with `full_range` the scale
    /// is negative where the largest weight is positive. Asymmetric: `scale = (high - low) / max_code` and
    /// `zero = -low / scale`, at least what the format can store.
    ///
    /// # Errors
    /// A scale beyond f16, refused before a zero is computed with it: that zero would be 0 and would lead to
    /// another scale, which hides the overflow.
    #[inline(always)]
    pub fn fit_range(&self, low: f32, high: f32) -> Result<(f32, f32), ScaleOverflow> {
        if self.sym {
            let reach = high.max(-low);
            let zero = (self.max_code + 1.0) / 2.0;
            let scale = storable(2.0 * reach / self.max_code)?;
            let is_above = self.full_range && high > -low;
            return Ok((if is_above { -scale } else { scale }, zero));
        }
        if low == 0.0 && high == 0.0 {
            return Ok((1.0, self.min_zero.max(1.0)));
        }
        let scale = storable((high - low) / self.max_code)?;
        let zero = (-low / scale).round().clamp(0.0, self.max_code);
        if zero >= self.min_zero {
            return Ok((scale, zero));
        }
        let scale = storable(high / (self.max_code - self.min_zero))?;
        Ok((scale, self.min_zero))
    }

    /// A zero `shift` steps away, as far as the format can store it.
    #[inline(always)]
    pub fn shifted(&self, zero: f32, shift: f32) -> f32 {
        let moved = zero + shift;
        let moved = if moved < self.min_zero {
            self.min_zero
        } else {
            moved
        };
        if moved > self.max_code {
            self.max_code
        } else {
            moved
        }
    }
}

/// The nearest f16 that is neither zero nor subnormal; 1 for the scale of an all-zero group.
#[inline(always)]
fn storable(scale: f32) -> Result<f32, ScaleOverflow> {
    if scale == 0.0 {
        return Ok(1.0);
    }
    let stored = f16::from_f32(scale.max(f16::MIN_POSITIVE.to_f32())).to_f32();
    match stored.is_finite() {
        true => Ok(stored),
        false => Err(ScaleOverflow(scale)),
    }
}

/// Least and largest weight of each column, with 0 between them.
pub struct Extent {
    low: Vec<f32>,
    high: Vec<f32>,
}

impl Extent {
    /// The extents of `outputs` columns of `weights`, row by row.
    #[inline(always)]
    pub fn of<'a>(weights: impl Iterator<Item = &'a [f32]>, outputs: usize) -> Self {
        let mut low = vec![0.0f32; outputs];
        let mut high = vec![0.0f32; outputs];
        for row in weights {
            for ((low, high), &w) in low.iter_mut().zip(&mut high).zip(row) {
                *low = if w < *low { w } else { *low };
                *high = if w > *high { w } else { *high };
            }
        }
        Extent { low, high }
    }

    /// Least and largest weight of one column.
    #[inline(always)]
    pub fn of_column(&self, column: usize) -> (f32, f32) {
        (self.low[column], self.high[column])
    }
}

impl Grid {
    /// All zeros, to be set.
    pub(crate) fn of(outputs: usize) -> Self {
        Grid {
            scales: vec![0.0; outputs],
            zeros: vec![0.0; outputs],
        }
    }
}

/// Steps from the zero to the grid point nearest to `w`, half to even as torch rounds.
#[inline(always)]
pub fn nearest(w: f32, scale: f32, zero: f32, max_code: f32) -> f32 {
    steps(w / scale, zero, max_code)
}

/// `x`, in steps from the zero, rounded half to even within the codes there are.
#[inline(always)]
pub fn steps(x: f32, zero: f32, max_code: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23
    let (low, high) = (-zero, max_code - zero);
    let x = if x < low { low } else { x };
    let x = if x > high { high } else { x };
    (x + ROUND) - ROUND
}

#[cfg(test)]
mod tests {
    use gptq_types::{Bits, CheckpointFormat};

    use super::*;

    fn rule(sym: bool, format: CheckpointFormat) -> GridRule {
        GridRule::new(&QuantSpec {
            bits: Bits::Four,
            sym,
            format,
            ..QuantSpec::published()
        })
    }

    #[test]
    fn a_one_sided_symmetric_group_keeps_its_full_range() {
        let (scale, zero) = rule(true, CheckpointFormat::Gptq)
            .fit_range(0.0, 7.5)
            .unwrap();
        assert_eq!((scale, zero), (1.0, 8.0));
    }

    #[test]
    fn v1_never_stores_a_zero_of_zero() {
        let (scale, zero) = rule(false, CheckpointFormat::Gptq)
            .fit_range(0.0, 14.0)
            .unwrap();
        assert_eq!((scale, zero), (1.0, 1.0));
        let (scale, zero) = rule(false, CheckpointFormat::GptqV2)
            .fit_range(0.0, 15.0)
            .unwrap();
        assert_eq!((scale, zero), (1.0, 0.0));
    }

    #[test]
    fn the_larger_side_gets_the_extra_code() {
        let rule = GridRule {
            full_range: true,
            ..rule(true, CheckpointFormat::Gptq)
        };
        assert_eq!(rule.fit_range(-3.0, 7.5), Ok((-1.0, 8.0)));
        assert_eq!(rule.fit_range(-7.5, 3.0), Ok((1.0, 8.0)));
        assert_eq!(rule.fit_range(-7.5, 7.5), Ok((1.0, 8.0)));
        assert_eq!(nearest(7.9, -1.0, 8.0, 15.0), -8.0);
        assert_eq!(nearest(-7.9, -1.0, 8.0, 15.0), 7.0);
        assert!(rule.fit_range(-1.0, 2e6).is_err());
    }

    #[test]
    fn a_shifted_zero_stays_where_the_format_can_store_it() {
        let v1 = rule(false, CheckpointFormat::Gptq);
        let v2 = rule(false, CheckpointFormat::GptqV2);
        assert_eq!((v1.shifted(2.0, -2.0), v2.shifted(2.0, -2.0)), (1.0, 0.0));
        assert_eq!((v1.shifted(14.0, 2.0), v1.shifted(7.0, 1.0)), (15.0, 8.0));
    }

    #[test]
    fn scales_are_f16_values_and_never_zero() {
        let (scale, _) = rule(true, CheckpointFormat::Gptq)
            .fit_range(-0.1234, 0.1)
            .unwrap();
        assert_eq!(scale, f16::from_f32(scale).to_f32());
        let (tiny, _) = rule(true, CheckpointFormat::Gptq)
            .fit_range(-1e-12, 0.0)
            .unwrap();
        assert!(tiny > 0.0);
        assert_eq!(
            rule(true, CheckpointFormat::Gptq).fit_range(0.0, 0.0),
            Ok((1.0, 8.0))
        );
    }

    #[test]
    fn rounding_is_half_to_even_and_clamped() {
        assert_eq!(nearest(2.5, 1.0, 8.0, 15.0), 2.0);
        assert_eq!(nearest(3.5, 1.0, 8.0, 15.0), 4.0);
        assert_eq!(nearest(99.0, 1.0, 8.0, 15.0), 7.0);
        assert_eq!(nearest(-99.0, 1.0, 8.0, 15.0), -8.0);
    }

    /// v1 asymmetric: the zero of an infinite scale is 0, which v1 cannot store, and the scale that
    /// took its place fitted the other side alone: a weight of -2e6 became -0.009.
    #[test]
    fn a_range_beyond_f16_is_an_error_on_every_grid() {
        for (sym, format) in [
            (true, CheckpointFormat::Gptq),
            (true, CheckpointFormat::GptqV2),
            (false, CheckpointFormat::Gptq),
            (false, CheckpointFormat::GptqV2),
        ] {
            let rule = rule(sym, format);
            for (low, high) in [
                (-2e6, 0.125),
                (-0.125, 2e6),
                (-2e6, 2e6),
                (-2e6, 0.0),
                (0.0, 2e6),
                (f32::MIN, f32::MAX),
                (f32::NEG_INFINITY, 0.0),
            ] {
                let fitted = rule.fit_range(low, high);
                assert!(fitted.is_err(), "{sym} {format:?} {low} {high}: {fitted:?}");
            }
            let (scale, _) = rule.fit_range(-4e5, 4e5).unwrap();
            assert!(scale.is_finite());
        }
        // The range fits, but not with the zero that v1 asks for.
        let v1 = rule(false, CheckpointFormat::Gptq);
        assert_eq!(v1.fit_range(0.0, 982_560.0), Err(ScaleOverflow(70182.86)));
    }
}
