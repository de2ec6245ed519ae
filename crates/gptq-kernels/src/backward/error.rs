//! The error of a block's output, and its gradient.
//!
//! Of a row `y` against its target `t`, both `[columns]`: `|y - t|^2 / mean(t^2)`. What follows a block norms each
//! row, so an error counts by its share of the row; and a few rows of most models are a hundred times as large as
//! the others (Sun et al. 2024, arXiv:2402.17762), whose squares would be all of a plain sum. Where the target
//! is all zero the row counts as it is.

use rayon::prelude::*;

use crate::real::Real;

fn square<R: Real>(x: R) -> f64 {
    let x: f64 = x.into();
    x * x
}

/// `1 / mean(target^2)`, or 1.
fn share<R: Real>(target: &[R]) -> f64 {
    let squares: f64 = target.iter().map(|&t| square(t)).sum();
    match squares > 0.0 {
        true => target.len() as f64 / squares,
        false => 1.0,
    }
}

/// The sum over the rows of `y` and `target`, both `[rows, columns]`, in f64 and in the order of the rows.
///
/// # Panics
/// If lengths differ.
pub fn output_error<R: Real>(y: &[R], target: &[R], columns: usize) -> f64 {
    assert_eq!(y.len(), target.len(), "an output for each target");
    let rows = y.par_chunks(columns).zip(target.par_chunks(columns));
    let of_row = |(y, target): (&[R], &[R])| {
        let squares = y.iter().zip(target).map(|(&y, &t)| square(y - t));
        share(target) * squares.sum::<f64>()
    };
    // Added after all are known, so that the order is the same for any number of threads.
    rows.map(of_row).collect::<Vec<f64>>().iter().sum()
}

/// Turns outputs into the gradient of `factor / 2` times their error.
///
/// # Panics
/// If lengths differ.
pub fn output_error_backward<R: Real>(y: &mut [R], target: &[R], columns: usize, factor: f32) {
    assert_eq!(y.len(), target.len(), "an output for each target");
    let rows = y.par_chunks_mut(columns).zip(target.par_chunks(columns));
    rows.for_each(|(y, target)| {
        let weight = R::of(f64::from(factor) * share(target));
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
    fn a_row_counts_by_its_share_and_a_zero_target_as_it_is() {
        let (y, target) = ([3.0f64, 4.0, 1.0, 2.0], [3.0, 2.0, 0.0, 0.0]);
        assert_eq!(output_error(&y, &target, 2), 4.0 / 6.5 + 5.0);
        let large = [300.0, 400.0, 1.0, 2.0];
        let so_large = [300.0, 200.0, 0.0, 0.0];
        assert_eq!(output_error(&large, &so_large, 2), 4.0 / 6.5 + 5.0);
    }

    #[test]
    fn the_gradient_is_that_of_differences_and_has_one_order() {
        let (rows, columns) = (33, 40);
        let (y, target) = (random(rows * columns, 1), random(rows * columns, 2));
        let mut gradient = y.clone();
        output_error_backward(&mut gradient, &target, columns, 0.75);
        for at in (0..y.len()).step_by(37) {
            let moved = |step: f64| {
                let mut y = y.clone();
                y[at] += step;
                0.375 * output_error(&y, &target, columns)
            };
            let want = (moved(1e-4) - moved(-1e-4)) / 2e-4;
            assert!((gradient[at] - want).abs() < 1e-8, "{at}: {want}");
        }
        let error = |threads| on_threads(threads, || output_error(&y, &target, columns).to_bits());
        assert_eq!(error(1), error(2));
    }
}
