//! Gradients of a linear, `y = x W + bias`, with `W [in_features, out_features]` as
//! [`multiply`](crate::multiply) takes it.

use faer::{Accum, MatMut, MatRef};
use rayon::prelude::*;

use crate::product::threads;
use crate::real::Real;
use crate::vector::vectorized;

/// Columns of a task.
const COLUMNS: usize = 256;

/// Adds `dy W^T` to `dx [rows, in_features]`, the gradient of the input of a linear with `weight
/// [in_features, out_features]`, from `dy [rows, out_features]`. Linears that read the same input add to
/// the same `dx`.
///
/// # Panics
/// If lengths do not agree.
pub fn product_input_backward<R: Real>(
    dx: &mut [R],
    dy: &[R],
    weight: &[R],
    rows: usize,
    in_features: usize,
    out_features: usize,
) {
    let dx = MatMut::from_row_major_slice_mut(dx, rows, in_features);
    let dy = MatRef::from_row_major_slice(dy, rows, out_features);
    let weight = MatRef::from_row_major_slice(weight, in_features, out_features);
    add_product(dx, dy, weight.transpose());
}

/// Adds `x^T dy` to `d_weight [in_features, out_features]`, the gradient of the weight, from
/// `dy [rows, out_features]` and `x [rows, in_features]`.
///
/// # Panics
/// If lengths do not agree.
pub fn product_weight_backward<R: Real>(
    d_weight: &mut [R],
    dy: &[R],
    x: &[R],
    rows: usize,
    in_features: usize,
    out_features: usize,
) {
    let d_weight = MatMut::from_row_major_slice_mut(d_weight, in_features, out_features);
    let dy = MatRef::from_row_major_slice(dy, rows, out_features);
    let x = MatRef::from_row_major_slice(x, rows, in_features);
    add_product(d_weight, x.transpose(), dy);
}

/// Adds the sums of the columns of `dy [rows, d_bias.len()]` to `d_bias`, the gradient of the bias; each in
/// the order of the rows.
///
/// # Panics
/// If `dy` is not whole rows.
pub fn bias_backward<R: Real>(d_bias: &mut [R], dy: &[R]) {
    let width = d_bias.len();
    assert_eq!(dy.len() % width, 0, "whole rows");
    (d_bias.par_chunks_mut(COLUMNS).enumerate()).for_each(|(task, sum)| {
        let columns = task * COLUMNS..task * COLUMNS + sum.len();
        vectorized(|| {
            for row in dy.chunks_exact(width) {
                for (sum, &dy) in sum.iter_mut().zip(&row[columns.clone()]) {
                    *sum += dy;
                }
            }
        });
    });
}

/// `out += a b`.
fn add_product<R: Real>(out: MatMut<'_, R>, a: MatRef<'_, R>, b: MatRef<'_, R>) {
    let par = threads(out.nrows(), out.ncols());
    R::multiply_into(out, Accum::Add, R::ONE, a, b, par);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backward::definition::{
        SINGLE, assert_derivative, assert_near, on_threads, project, random, single,
    };

    /// Rows, inputs, outputs: one of each, odd ones, more than the tiles of a product.
    const SIZES: [[usize; 3]; 6] = [
        [1, 5, 3],
        [7, 1, 9],
        [9, 13, 1],
        [70, 37, 53],
        [130, 64, 300],
        [200, 300, 64],
    ];

    #[test]
    fn gradients_of_a_linear_are_its_derivatives() {
        for [rows, k, n] in SIZES {
            let (x, weight, bias) = (random(rows * k, 1), random(k * n, 2), random(n, 3));
            let dy = random(rows * n, 4);
            let mut y = vec![0.0f32; rows * n];
            crate::multiply(&mut y, &single(&x), &single(&weight), rows, k, n);
            let want = project(&x, &weight, &vec![0.0; n], k);
            assert_near(&y, &want, 1e-5, "the forward pass");

            let (mut dx, mut d_weight, mut d_bias) =
                (vec![0.0; x.len()], vec![0.0; k * n], vec![0.0; n]);
            product_input_backward(&mut dx, &dy, &weight, rows, k, n);
            product_weight_backward(&mut d_weight, &dy, &x, rows, k, n);
            bias_backward(&mut d_bias, &dy);
            let name = format!("{rows} x {k} x {n}");
            let of_x = |x: &[f64]| project(x, &weight, &bias, k);
            assert_derivative(of_x, &x, &dy, &dx, &format!("x, {name}"));
            let of_weight = |weight: &[f64]| project(&x, weight, &bias, k);
            assert_derivative(
                of_weight,
                &weight,
                &dy,
                &d_weight,
                &format!("weight, {name}"),
            );
            let of_bias = |bias: &[f64]| project(&x, &weight, bias, k);
            assert_derivative(of_bias, &bias, &dy, &d_bias, &format!("bias, {name}"));

            let [x, weight, dy] = &[&x, &weight, &dy].map(|x| single(x));
            let (mut x32, mut w32, mut b32) = (vec![0.0; rows * k], vec![0.0; k * n], vec![0.0; n]);
            product_input_backward(&mut x32, dy, weight, rows, k, n);
            product_weight_backward(&mut w32, dy, x, rows, k, n);
            bias_backward(&mut b32, dy);
            assert_near(&x32, &dx, SINGLE, &format!("x in f32, {name}"));
            assert_near(&w32, &d_weight, SINGLE, &format!("weight in f32, {name}"));
            assert_near(&b32, &d_bias, SINGLE, &format!("bias in f32, {name}"));
        }
    }

    #[test]
    fn gradients_of_several_batches_add_up() {
        let (rows, k, n) = (20, 6, 5);
        let (x, dy) = (random(rows * k, 5), random(rows * n, 6));
        let (mut once, mut twice) = (vec![0.0; k * n], vec![0.0; k * n]);
        product_weight_backward(&mut once, &dy, &x, rows, k, n);
        let half = rows / 2;
        for batch in [0, half] {
            let (x, dy) = (&x[batch * k..][..half * k], &dy[batch * n..][..half * n]);
            product_weight_backward(&mut twice, dy, x, half, k, n);
        }
        assert_near(&twice, &once, 1e-12, "in two batches");
    }

    /// With one row or column faer's product differs from one thread to two.
    #[test]
    fn products_are_the_same_for_any_thread_count() {
        let long = [[1, 300, 500], [500, 300, 1], [500, 1, 300], [700, 96, 576]];
        for [rows, k, n] in SIZES.into_iter().chain(long) {
            let (x, weight) = (single(&random(rows * k, 1)), single(&random(k * n, 2)));
            let dy = single(&random(rows * n, 4));
            let run = |threads| {
                on_threads(threads, || {
                    let (mut dx, mut d_weight, mut d_bias) =
                        (vec![0.5f32; rows * k], vec![0.5f32; k * n], vec![0.5f32; n]);
                    product_input_backward(&mut dx, &dy, &weight, rows, k, n);
                    product_weight_backward(&mut d_weight, &dy, &x, rows, k, n);
                    bias_backward(&mut d_bias, &dy);
                    (dx, d_weight, d_bias)
                })
            };
            let one = run(1);
            assert!(one == run(2) && one == run(3), "{rows} x {k} x {n}");
        }
    }
}
