//! The upper Cholesky factor of an inverse.

use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt::factor::{LltError, cholesky_in_place, cholesky_in_place_scratch};
use faer::linalg::triangular_inverse::invert_lower_triangular;
use faer::{Mat, Par};
use rayon::prelude::*;

/// The matrix has no Cholesky factor.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("pivot {pivot} of the Cholesky factorization is not positive")]
pub struct FactorError {
    /// Row and column in the caller's numbering.
    pub pivot: usize,
}

/// `U`, upper triangular with `H^-1 = U^T U`, for a symmetric positive definite `h [n, n]`.
///
/// One factorization and one triangular inverse instead of the textbook's three steps: with `J` the reversal of
/// rows and columns and `J H J = L L^T`, `U = J L^-1 J`. Everything in f64, which on CPUs costs no more than
/// the f32 products around it. `h(i, j)` is read along `j`. Returns `U` row-major in f32.
pub fn inverse_cholesky(
    n: usize,
    h: impl Fn(usize, usize) -> f64 + Sync,
) -> Result<Vec<f32>, FactorError> {
    let par = Par::rayon(0);
    let mut l = Mat::<f64>::zeros(n, n);
    l.par_col_iter_mut()
        .enumerate()
        .for_each(|(col, mut column)| {
            for row in col..n {
                column[row] = h(n - 1 - col, n - 1 - row);
            }
        });
    let scratch = cholesky_in_place_scratch::<f64>(n, par, Default::default());
    cholesky_in_place(
        l.as_mut(),
        Default::default(),
        par,
        MemStack::new(&mut MemBuffer::new(scratch)),
        Default::default(),
    )
    .map_err(|LltError::NonPositivePivot { index }| FactorError {
        pivot: n - 1 - index,
    })?;
    let mut inverse = Mat::<f64>::zeros(n, n);
    invert_lower_triangular(inverse.as_mut(), l.as_ref(), par);
    Ok(reversed_transpose(&inverse))
}

/// `U[row, col] = inverse[n-1-row, n-1-col]` above the diagonal. The factor is stored by columns
/// and `U` by rows: each tile goes through a buffer of its own, because the rows of `U` lie a
/// power of two apart for common widths and would push each other out of the cache.
fn reversed_transpose(inverse: &Mat<f64>) -> Vec<f32> {
    const TILE: usize = 64;
    let n = inverse.nrows();
    let mut u = vec![0.0f32; n * n];
    u.par_chunks_mut(TILE * n)
        .enumerate()
        .for_each(|(tile, u)| {
            let first = tile * TILE;
            let rows = u.len() / n;
            for left in (first..n).step_by(TILE) {
                let columns = TILE.min(n - left);
                let mut buffer = [0.0f32; TILE * TILE];
                for col in 0..columns {
                    let column = inverse.col(n - 1 - left - col);
                    for row in 0..rows.min(left + col + 1 - first) {
                        buffer[row * TILE + col] = column[n - 1 - first - row] as f32;
                    }
                }
                for row in 0..rows {
                    u[row * n + left..][..columns]
                        .copy_from_slice(&buffer[row * TILE..row * TILE + columns]);
                }
            }
        });
    u
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn u_transposed_u_is_the_inverse() {
        let n = 40;
        let h = |i: usize, j: usize| {
            let off = 1.0 / (1.0 + (i as f64 - j as f64).abs());
            if i == j {
                2.0 + i as f64 * 0.1
            } else {
                off * 0.3
            }
        };
        let u = inverse_cholesky(n, h).unwrap();
        for i in 0..n {
            for j in 0..n {
                let product: f64 = (0..n)
                    .map(|l| {
                        let inverse: f64 = (0..=i.min(l))
                            .map(|p| f64::from(u[p * n + i]) * f64::from(u[p * n + l]))
                            .sum();
                        inverse * h(l, j)
                    })
                    .sum();
                let want = if i == j { 1.0 } else { 0.0 };
                assert!((product - want).abs() < 1e-5, "[{i}, {j}] = {product}");
            }
        }
    }

    #[test]
    fn the_failing_pivot_is_named() {
        let h = |i: usize, j: usize| match (i, j) {
            (1, 1) => -1.0,
            (i, j) if i == j => 1.0,
            _ => 0.0,
        };
        assert_eq!(inverse_cholesky(4, h), Err(FactorError { pivot: 1 }));
    }
}
