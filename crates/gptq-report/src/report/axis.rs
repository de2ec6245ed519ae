//! Round ticks, and where a value lies between the ends.

/// Values further apart than this ratio are drawn on a logarithmic axis.
const LOGARITHMIC_FROM: f64 = 50.0;
/// Decades from which only powers of ten get a tick.
const WIDE_DECADES: f64 = 2.2;

/// One axis of a figure.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Axis {
    pub(super) low: f64,
    pub(super) high: f64,
    pub(super) ticks: Vec<f64>,
    logarithmic: bool,
}

impl Axis {
    /// Ends at round numbers around all values; `about` ticks.
    pub(super) fn around(low: f64, high: f64, about: usize) -> Self {
        let (low, high) = widened(low, high);
        let step = round_step((high - low) / about as f64);
        let (first, last) = ((low / step).floor(), (high / step).ceil());
        Axis::linear(first * step, last * step, step)
    }

    /// Close around all values, a tenth of their distance free on both sides.
    pub(super) fn around_with_room(values: impl Iterator<Item = f64>) -> Self {
        let (low, high) = ends(values);
        let room = 0.1 * (high - low);
        // Sizes are not negative, and an axis that begins below zero would look as if they were.
        Axis::around((low - room).max(0.0f64.min(low)), high + room, 5)
    }

    /// Ends exactly where given; ticks at round numbers between.
    pub(super) fn within(low: f64, high: f64, about: usize) -> Self {
        let (low, high) = widened(low, high);
        Axis::linear(low, high, round_step((high - low) / about as f64))
    }

    /// Blocks of a model, at whole numbers.
    pub(super) fn blocks(last: usize, about: usize) -> Self {
        let high = last.max(1) as f64;
        let step = round_step(high / about as f64).max(1.0);
        Axis::linear(0.0, high, step)
    }

    /// From zero up, or logarithmic where the values lie too far apart for that.
    pub(super) fn of(values: impl Iterator<Item = f64> + Clone, about: usize) -> Self {
        let (low, high) = ends(values);
        match low > 0.0 && high / low > LOGARITHMIC_FROM {
            true => Axis::logarithmic(low, high),
            false => Axis::around(0.0f64.min(low), high.max(f64::MIN_POSITIVE), about),
        }
    }

    /// Close around the values, or logarithmic where they lie too far apart for that.
    pub(super) fn near(values: impl Iterator<Item = f64> + Clone, about: usize) -> Self {
        let (low, high) = ends(values);
        match low > 0.0 && high / low > LOGARITHMIC_FROM {
            true => Axis::logarithmic(low, high),
            false => Axis::around(low, high, about),
        }
    }

    fn linear(low: f64, high: f64, step: f64) -> Self {
        // A share of a step forgives what rounding did to an end.
        let first = (low / step - 1e-6).ceil() as i64;
        let last = (high / step + 1e-6).floor() as i64;
        Axis {
            low,
            high,
            ticks: (first..=last).map(|tick| tick as f64 * step).collect(),
            logarithmic: false,
        }
    }

    fn logarithmic(low: f64, high: f64) -> Self {
        let (first, last) = (low.log10().floor() as i32, high.log10().ceil() as i32);
        let round: Vec<f64> = (first..=last)
            .flat_map(|decade| [1.0, 2.0, 5.0].map(|step| step * 10f64.powi(decade)))
            .collect();
        let below = round.iter().rposition(|&tick| tick <= low).unwrap_or(0);
        let above = (round.iter().position(|&tick| tick >= high)).unwrap_or(round.len() - 1);
        // Every third is a power of ten.
        let step = match high.log10() - low.log10() > WIDE_DECADES {
            true => 3,
            false => 1,
        };
        Axis {
            low: round[below],
            high: round[above],
            ticks: (below..=above)
                .filter(|index| index % step == 0)
                .map(|index| round[index])
                .collect(),
            logarithmic: true,
        }
    }

    /// 0 at the low end, 1 at the high one.
    pub(super) fn place(&self, value: f64) -> f64 {
        match self.logarithmic {
            true => (value / self.low).ln() / (self.high / self.low).ln(),
            false => (value - self.low) / (self.high - self.low),
        }
    }

    /// The tick as text, with as many decimals as all of them need.
    pub(super) fn label(&self, tick: f64) -> String {
        if self.logarithmic {
            return match (1e-3..1e5).contains(&tick) {
                true => trimmed(format!("{tick:.3}")),
                false => format!("{tick:.0e}"),
            };
        }
        let step = self.ticks.windows(2).map(|pair| pair[1] - pair[0]).next();
        let decimals = step.map_or(0.0, |step| (-step.log10() - 1e-6).ceil().max(0.0));
        // A zero of rounding errors has no sign.
        let tick = if tick.abs() < 1e-12 { 0.0 } else { tick };
        match self.high.abs() < 1e5 && decimals < 5.0 {
            true => format!("{tick:.*}", decimals as usize).replace('-', "\u{2212}"),
            false => format!("{tick:.1e}").replace('-', "\u{2212}"),
        }
    }
}

fn trimmed(text: String) -> String {
    text.trim_end_matches('0').trim_end_matches('.').to_string()
}

fn ends(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let first = (f64::INFINITY, f64::NEG_INFINITY);
    let (low, high) = values
        .filter(|value| value.is_finite())
        .fold(first, |(low, high), v| (low.min(v), high.max(v)));
    match low <= high {
        true => (low, high),
        false => (0.0, 1.0),
    }
}

/// Ends that differ.
fn widened(low: f64, high: f64) -> (f64, f64) {
    match high - low > 1e-9 * high.abs() {
        true => (low, high),
        false if low == 0.0 => (0.0, 1.0),
        false => (low - 0.05 * low.abs(), high + 0.05 * high.abs()),
    }
}

/// The next 1, 2 or 5 times a power of ten.
fn round_step(step: f64) -> f64 {
    let power = 10f64.powf(step.log10().floor());
    let rounded = [1.0, 2.0, 5.0, 10.0].into_iter();
    power
        * rounded
            .into_iter()
            .find(|round| round * power >= step * (1.0 - 1e-9))
            .unwrap_or(10.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(axis: &Axis) -> Vec<String> {
        axis.ticks.iter().map(|&tick| axis.label(tick)).collect()
    }

    #[test]
    fn ends_are_round_and_around_the_values() {
        // A fifth of 9.4 is 1.88: steps of 2.
        let axis = Axis::around(0.3, 9.7, 5);
        assert_eq!((axis.low, axis.high), (0.0, 10.0));
        assert_eq!(labels(&axis), ["0", "2", "4", "6", "8", "10"]);
        assert_eq!(axis.place(2.5), 0.25);
        // A quarter of 10.85 is 2.71: steps of 5.
        let axis = Axis::near([21.77, 32.62].into_iter(), 4);
        assert_eq!(labels(&axis), ["20", "25", "30", "35"]);
        let axis = Axis::of([0.031, 0.044].into_iter(), 4);
        assert_eq!(labels(&axis), ["0.00", "0.02", "0.04", "0.06"]);
    }

    #[test]
    fn given_ends_stay() {
        let axis = Axis::within(0.0, 2048.0, 4);
        assert_eq!((axis.low, axis.high), (0.0, 2048.0));
        assert_eq!(labels(&axis), ["0", "1000", "2000"]);
        assert_eq!(axis.place(1024.0), 0.5);
        assert_eq!(labels(&Axis::blocks(29, 5)), ["0", "10", "20"]);
        assert_eq!(labels(&Axis::blocks(4, 5)), ["0", "1", "2", "3", "4"]);
        assert_eq!(labels(&Axis::blocks(0, 5)), ["0", "1"]);
    }

    #[test]
    fn values_far_apart_are_logarithmic() {
        let axis = Axis::of([0.003, 0.4].into_iter(), 4);
        let ticks = [
            "0.002", "0.005", "0.01", "0.02", "0.05", "0.1", "0.2", "0.5",
        ];
        assert_eq!(labels(&axis), ticks);
        // Equal ratios are equal distances: from 0.002 to 0.5 a hundredfold is ln 10 / ln 250.
        let place = axis.place(0.02);
        assert!((place - 10f64.ln() / 250f64.ln()).abs() < 1e-12);
        let axis = Axis::near([20.0, 90_000.0].into_iter(), 4);
        assert_eq!((axis.low, axis.high), (20.0, 100_000.0));
        assert_eq!(labels(&axis), ["100", "1000", "10000", "1e5"]);
    }

    #[test]
    fn one_value_or_none_still_makes_an_axis() {
        let axis = Axis::near([5.0].into_iter(), 4);
        assert!(axis.low < 5.0 && axis.high > 5.0, "{axis:?}");
        let axis = Axis::of([0.0, 0.0].into_iter(), 4);
        assert_eq!(axis.low, 0.0);
        assert!(axis.high > 0.0 && axis.place(0.0) == 0.0, "{axis:?}");
        let axis = Axis::of(std::iter::empty(), 4);
        assert_eq!((axis.low, axis.high), (0.0, 1.0));
    }
}
