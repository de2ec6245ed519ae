//! Matrix products through faer, on row-major slices.

use std::time::Instant;

use faer::{Accum, MatMut, MatRef, Par, linalg::matmul::matmul};
use rayon::prelude::*;

/// The threads of a product `[m, n]`. With one row or column it is a matrix times a vector, whose sum faer
/// splits over threads: its bits would depend on their number.
pub(crate) fn threads(m: usize, n: usize) -> Par {
    match m > 1 && n > 1 {
        true => Par::rayon(0),
        false => Par::Seq,
    }
}

/// `out [m, n] = a [m, k] * b [k, n]`, f32.
pub fn multiply(out: &mut [f32], a: &[f32], b: &[f32], m: usize, k: usize, n: usize) {
    let out = MatMut::from_row_major_slice_mut(out, m, n);
    let (a, b) = (
        MatRef::from_row_major_slice(a, m, k),
        MatRef::from_row_major_slice(b, k, n),
    );
    matmul(out, Accum::Replace, a, b, 1.0, threads(m, n));
}

/// `out [m, n] = a [m, k] * b^T` with `b [n, k]`, f32.
pub fn multiply_transposed(out: &mut [f32], a: &[f32], b: &[f32], m: usize, k: usize, n: usize) {
    let out = MatMut::from_row_major_slice_mut(out, m, n);
    let (a, b) = (
        MatRef::from_row_major_slice(a, m, k),
        MatRef::from_row_major_slice(b, n, k).transpose(),
    );
    matmul(out, Accum::Replace, a, b, 1.0, threads(m, n));
}

/// `out [m, n] += alpha * a^T * b` with `a [k, lda]`, of which the columns `first..first + m` are
/// taken, and `b [k, n]`: the trailing update of the solver. Stays on the calling thread, because
/// the solver runs one for each panel side by side.
#[allow(clippy::too_many_arguments)]
pub fn multiply_add(
    out: &mut [f32],
    alpha: f32,
    a: &[f32],
    lda: usize,
    first: usize,
    b: &[f32],
    m: usize,
    k: usize,
    n: usize,
) {
    let out = MatMut::from_row_major_slice_mut(out, m, n);
    let a = MatRef::from_row_major_slice(a, k, lda).subcols(first, m);
    let b = MatRef::from_row_major_slice(b, k, n);
    matmul(out, Accum::Add, a.transpose(), b, alpha, Par::Seq);
}

/// `a [m, k] * b [k, n]` in f64.
pub fn multiply_f64(a: &[f64], b: &[f64], m: usize, k: usize, n: usize) -> Vec<f64> {
    let mut out = vec![0.0; m * n];
    matmul(
        MatMut::from_row_major_slice_mut(&mut out, m, n),
        Accum::Replace,
        MatRef::from_row_major_slice(a, m, k),
        MatRef::from_row_major_slice(b, k, n),
        1.0,
        threads(m, n),
    );
    out
}

/// `[rows, cols]` to `[cols, rows]`, tile by tile through a buffer: rows a power of two apart
/// would push each other out of the cache.
pub fn transpose(x: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    const TILE: usize = 32;
    let mut out = vec![0.0f32; x.len()];
    out.par_chunks_mut(TILE * rows)
        .enumerate()
        .for_each(|(tile, out)| {
            let first = tile * TILE;
            let width = out.len() / rows;
            for top in (0..rows).step_by(TILE) {
                let height = TILE.min(rows - top);
                let mut buffer = [0.0f32; TILE * TILE];
                for r in 0..height {
                    let row = &x[(top + r) * cols + first..][..width];
                    for (c, &value) in row.iter().enumerate() {
                        buffer[c * TILE + r] = value;
                    }
                }
                for c in 0..width {
                    out[c * rows + top..][..height]
                        .copy_from_slice(&buffer[c * TILE..c * TILE + height]);
                }
            }
        });
    out
}

/// A running `X^T X`, of which only the tiles on and below the diagonal are computed, side by
/// side. Tiles depend on the width alone: the sums are the same for any number of threads.
pub struct Gram {
    features: usize,
    side: usize,
    tiles: Vec<Tile>,
}

/// Rows `row..` and columns `col..` of the sum, `[height, width]` row-major.
struct Tile {
    row: usize,
    col: usize,
    height: usize,
    width: usize,
    sum: Vec<f32>,
}

impl Gram {
    /// All zero, `[features, features]`.
    ///
    /// Eight tiles a side compute an eighth more than the triangle and feed many threads; below
    /// 64 columns a product no longer reaches the machine's rate.
    pub fn new(features: usize) -> Self {
        let side = features.div_ceil(8).max(64);
        let starts = || (0..features).step_by(side);
        let tiles = starts()
            .flat_map(|row| {
                starts()
                    .take_while(move |&col| col <= row)
                    .map(move |col| (row, col))
            })
            .map(|(row, col)| {
                let (height, width) = (side.min(features - row), side.min(features - col));
                Tile {
                    row,
                    col,
                    height,
                    width,
                    sum: vec![0.0; height * width],
                }
            })
            .collect();
        Gram {
            features,
            side,
            tiles,
        }
    }

    /// Adds `x^T x` for `x [rows, features]` row-major.
    pub fn add(&mut self, x: &[f32], rows: usize) {
        let x = MatRef::from_row_major_slice(x, rows, self.features);
        self.tiles.par_iter_mut().for_each(|tile| {
            let sum = MatMut::from_row_major_slice_mut(&mut tile.sum, tile.height, tile.width);
            let left = x.subcols(tile.row, tile.height).transpose();
            let right = x.subcols(tile.col, tile.width);
            matmul(sum, Accum::Add, left, right, 1.0, Par::Seq);
        });
    }

    /// The full symmetric matrix times `scale`, `[features, features]` row-major.
    pub fn finish(self, scale: f32) -> Vec<f32> {
        let k = self.features;
        let mut full = vec![0.0; k * k];
        full.par_chunks_mut(self.side * k)
            .enumerate()
            .for_each(|(band, rows)| {
                let top = band * self.side;
                for tile in self.tiles.iter().filter(|tile| tile.row == top) {
                    for (r, values) in tile.sum.chunks_exact(tile.width).enumerate() {
                        let out = &mut rows[r * k + tile.col..][..tile.width];
                        out.iter_mut().zip(values).for_each(|(o, v)| *o = v * scale);
                    }
                }
                for tile in self.tiles.iter().filter(|tile| tile.col == top) {
                    for (r, values) in tile.sum.chunks_exact(tile.width).enumerate() {
                        for (c, v) in values.iter().enumerate() {
                            rows[c * k + tile.row + r] = v * scale;
                        }
                    }
                }
            });
        full
    }
}

/// `out [m, n] = a^T * b` with `a [k, m]` and `b [k, n]`, f32.
pub fn multiply_left_transposed(
    out: &mut [f32],
    a: &[f32],
    b: &[f32],
    m: usize,
    k: usize,
    n: usize,
) {
    let out = MatMut::from_row_major_slice_mut(out, m, n);
    let a = MatRef::from_row_major_slice(a, k, m);
    let b = MatRef::from_row_major_slice(b, k, n);
    matmul(out, Accum::Replace, a.transpose(), b, 1.0, threads(m, n));
}

/// A running `A^T B`, in bands of rows side by side: the sums are the same for any number of threads.
pub struct Cross {
    features: usize,
    bands: Vec<Vec<f32>>, // [side, features], the last one shorter
}

impl Cross {
    /// All zero, `[features, features]`.
    pub fn new(features: usize) -> Self {
        let side = features.div_ceil(8).max(64);
        let bands = (0..features).step_by(side);
        Cross {
            features,
            bands: bands
                .map(|first| vec![0.0; side.min(features - first) * features])
                .collect(),
        }
    }

    /// Adds `a^T b` for `a` and `b`, both `[rows, features]` row-major.
    pub fn add(&mut self, a: &[f32], b: &[f32], rows: usize) {
        let k = self.features;
        let a = MatRef::from_row_major_slice(a, rows, k);
        let b = MatRef::from_row_major_slice(b, rows, k);
        let side = self.bands[0].len() / k;
        self.bands
            .par_iter_mut()
            .enumerate()
            .for_each(|(band, sum)| {
                let height = sum.len() / k;
                let sum = MatMut::from_row_major_slice_mut(sum, height, k);
                let left = a.subcols(band * side, height).transpose();
                matmul(sum, Accum::Add, left, b, 1.0, Par::Seq);
            });
    }

    /// The matrix times `scale`, `[features, features]` row-major.
    pub fn finish(self, scale: f32) -> Vec<f32> {
        let mut full = self.bands.concat();
        full.iter_mut().for_each(|value| *value *= scale);
        full
    }
}

/// The f32 product rate of this machine in FLOP/s: the best of five `n^3` products.
pub fn measure_sgemm(n: usize) -> f64 {
    let a: Vec<f32> = (0..n * n).map(|i| (i % 13) as f32 - 6.0).collect();
    let b: Vec<f32> = (0..n * n).map(|i| (i % 7) as f32 - 3.0).collect();
    let mut c = vec![0.0; n * n];
    let seconds = (0..5)
        .map(|_| {
            let start = Instant::now();
            multiply(&mut c, &a, &b, n, n, n);
            start.elapsed().as_secs_f64()
        })
        .fold(f64::INFINITY, f64::min);
    2.0 * (n as f64).powi(3) / seconds
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(len: usize, seed: u64) -> Vec<f32> {
        let mut state = seed;
        (0..len)
            .map(|_| {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
            })
            .collect()
    }

    /// Of one row faer gave 1962 of 2048 other outputs with two threads.
    #[test]
    fn the_number_of_threads_changes_no_bit_of_a_product() {
        let k = 2048;
        for (m, n) in [(1, 2048), (2048, 1), (2, 2048), (33, 257)] {
            let (a, b) = (random(m * k, 1), random(k * n, 2));
            let products = |threads: usize| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
                pool.build().unwrap().install(|| {
                    let mut outs = [(); 3].map(|()| vec![0.0; m * n]);
                    let [plain, transposed, left] = &mut outs;
                    multiply(plain, &a, &b, m, k, n);
                    multiply_transposed(transposed, &a, &b, m, k, n);
                    multiply_left_transposed(left, &a, &b, m, k, n);
                    outs
                })
            };
            assert!(products(1) == products(2), "{m} rows, {n} columns");
        }
    }

    #[test]
    fn products_agree_with_the_definition() {
        let (m, k, n) = (7, 13, 5);
        let (a, b) = (random(m * k, 1), random(k * n, 2));
        let mut c = vec![0.0; m * n];
        multiply(&mut c, &a, &b, m, k, n);
        let mut ct = vec![0.0; m * n];
        multiply_transposed(&mut ct, &a, &transpose(&b, k, n), m, k, n);
        for i in 0..m {
            for j in 0..n {
                let want: f32 = (0..k).map(|l| a[i * k + l] * b[l * n + j]).sum();
                assert!((c[i * n + j] - want).abs() < 1e-5);
                assert!((ct[i * n + j] - want).abs() < 1e-5);
            }
        }
    }

    #[test]
    fn trailing_update_takes_the_named_columns() {
        let (m, k, n, lda, first) = (4, 3, 6, 11, 5);
        let (a, b) = (random(k * lda, 3), random(k * n, 4));
        let mut out = vec![1.0; m * n];
        multiply_add(&mut out, -1.0, &a, lda, first, &b, m, k, n);
        let want: f32 = 1.0
            - (0..k)
                .map(|l| a[l * lda + first + 2] * b[l * n + 3])
                .sum::<f32>();
        assert!((out[2 * n + 3] - want).abs() < 1e-6);
    }

    #[test]
    fn cross_is_the_product_of_both_for_any_thread_count() {
        let (rows, k) = (70, 130);
        let (a, b) = (random(rows * k, 6), random(rows * k, 7));
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
            pool.build().unwrap().install(|| {
                let mut cross = Cross::new(k);
                cross.add(&a, &b, rows);
                cross.add(&a, &b, rows);
                cross.finish(0.5)
            })
        };
        let one = run(1);
        assert_eq!(one, run(3));
        let mut once = vec![0.0; k * k];
        multiply_left_transposed(&mut once, &a, &b, k, rows, k);
        for (i, j) in [(3, 99), (99, 3), (129, 0), (64, 128)] {
            let want: f32 = (0..rows).map(|r| a[r * k + i] * b[r * k + j]).sum();
            assert!((one[i * k + j] - want).abs() < 1e-3);
            assert!((once[i * k + j] - want).abs() < 1e-3);
        }
    }

    #[test]
    fn gram_is_symmetric_and_the_same_for_any_thread_count() {
        let (rows, k) = (300, 130);
        let x = random(rows * k, 5);
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            pool.install(|| {
                let mut gram = Gram::new(k);
                gram.add(&x, rows);
                gram.add(&x, rows);
                gram.finish(0.5)
            })
        };
        let one = run(1);
        assert_eq!(one, run(2));
        assert_eq!(one, run(3));
        let want: f32 = (0..rows).map(|r| x[r * k + 3] * x[r * k + 99]).sum();
        assert!((one[3 * k + 99] - want).abs() < 1e-3);
        assert_eq!(one[3 * k + 99], one[99 * k + 3]);
    }
}
