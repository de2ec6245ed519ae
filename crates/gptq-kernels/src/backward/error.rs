//! The error of a block's output, and its gradient.
//!
//! The squared error of a row `y` against its target `t`, both `[columns]`, is divided by
//! `(mean(t^2) + SPREAD typical) / (1 + SPREAD)`, where `typical` is the median of `mean(t^2)` over the rows. So
//! rows as large as most count alike, and those that are a hundred times as large (massive activations, Sun et
//! al. 2024, arXiv:2402.17762), whose squares would be all of a plain sum, count by their share: what follows a
//! block norms each row.

use rayon::prelude::*;

use crate::real::Real;

/// How many typical rows a row must outweigh before it counts by its share.
const SPREAD: f64 = 4.0;

/// What the squares of rows are divided by, from a typical mean square; `RowScale` in `kernels/backward.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RowScale {
    /// Beside the mean square of the row.
    pub floor: f64,
    /// Of both together.
    pub share: f64,
}

impl RowScale {
    /// From the mean squares of rows, of which there is at least one.
    pub fn of(mut squares: Vec<f64>) -> Self {
        let middle = (squares.len() - 1) / 2;
        let (_, typical, _) = squares.select_nth_unstable_by(middle, f64::total_cmp);
        RowScale {
            floor: SPREAD * *typical,
            share: 1.0 / (1.0 + SPREAD),
        }
    }

    /// What the squares of a row's error are multiplied with; 1 where nothing says how large rows are.
    fn weight(self, square: f64) -> f64 {
        let scale = self.share * (square + self.floor);
        match scale > 0.0 {
            true => 1.0 / scale,
            false => 1.0,
        }
    }
}

fn square<R: Real>(x: R) -> f64 {
    let x: f64 = x.into();
    x * x
}

/// The mean square of each row of `x [rows, columns]`.
pub fn row_squares<R: Real>(x: &[R], columns: usize) -> Vec<f64> {
    let rows = x.par_chunks(columns);
    rows.map(|row| mean_square(row)).collect()
}

fn mean_square<R: Real>(row: &[R]) -> f64 {
    row.iter().map(|&x| square(x)).sum::<f64>() / row.len() as f64
}

/// The sum over the rows of `y` and `target`, both `[rows, columns]`, in f64 and in the order of the rows.
///
/// # Panics
/// If lengths differ.
pub fn output_error<R: Real>(y: &[R], target: &[R], columns: usize, scale: RowScale) -> f64 {
    assert_eq!(y.len(), target.len(), "an output for each target");
    let rows = y.par_chunks(columns).zip(target.par_chunks(columns));
    let of_row = |(y, target): (&[R], &[R])| {
        let squares = y.iter().zip(target).map(|(&y, &t)| square(y - t));
        scale.weight(mean_square(target)) * squares.sum::<f64>()
    };
    // Added after all are known, so that the order is the same for any number of threads.
    rows.map(of_row).collect::<Vec<f64>>().iter().sum()
}

/// Turns outputs into the gradient of `factor / 2` times their error.
///
/// # Panics
/// If lengths differ.
pub fn output_error_backward<R: Real>(
    y: &mut [R],
    target: &[R],
    columns: usize,
    scale: RowScale,
    factor: f32,
) {
    assert_eq!(y.len(), target.len(), "an output for each target");
    let rows = y.par_chunks_mut(columns).zip(target.par_chunks(columns));
    rows.for_each(|(y, target)| {
        let weight = R::of(f64::from(factor) * scale.weight(mean_square(target)));
        for (y, &t) in y.iter_mut().zip(target) {
            *y = weight * (*y - t);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backward::definition::{on_threads, random};

    #[test]
    fn rows_as_large_as_most_count_alike_and_larger_ones_by_their_share() {
        let scale = RowScale::of(vec![1.0, 1e8, 1.0, 0.5, 1.0]);
        let near = |got: f64, want: f64| assert!((got - want).abs() < 1e-6 * want, "{got}, {want}");
        near(scale.weight(1.0), 1.0);
        near(scale.weight(0.5), 5.0 / 4.5);
        near(scale.weight(1e8), 5.0 / (1e8 + 4.0));
        let nothing = RowScale::of(vec![0.0; 3]);
        assert_eq!(nothing.weight(0.0), 1.0);
        let (y, target) = ([3.0f64, 4.0, 1.0, 2.0], [3.0, 2.0, 0.0, 0.0]);
        assert_eq!(row_squares(&target, 2), [6.5, 0.0]);
        let scale = RowScale::of(vec![2.0]);
        near(
            output_error(&y, &target, 2, scale),
            20.0 / 14.5 + 25.0 / 8.0,
        );
    }

    #[test]
    fn the_gradient_is_that_of_differences_and_has_one_order() {
        let (rows, columns) = (33, 40);
        let (y, target) = (random(rows * columns, 1), random(rows * columns, 2));
        let scale = RowScale::of(row_squares(&target, columns));
        let mut gradient = y.clone();
        output_error_backward(&mut gradient, &target, columns, scale, 0.75);
        for at in (0..y.len()).step_by(37) {
            let moved = |step: f64| {
                let mut y = y.clone();
                y[at] += step;
                0.375 * output_error(&y, &target, columns, scale)
            };
            let want = (moved(1e-4) - moved(-1e-4)) / 2e-4;
            assert!((gradient[at] - want).abs() < 1e-8, "{at}: {want}");
        }
        let error = |threads| {
            on_threads(threads, || {
                output_error(&y, &target, columns, scale).to_bits()
            })
        };
        assert_eq!(error(1), error(2));
    }
}
