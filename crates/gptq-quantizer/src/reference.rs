//! The algorithm once more, in f64, one column after the other: to be read, and to test against.

use gptq_types::{QuantSpec, SolvedLayer};
use half::f16;

use crate::Order;
use crate::grid::GridRule;
use crate::search::SearchRule;

/// Grids whose errors differ by less, relative to the best, are equally good: f32 cannot tell.
const EQUAL_GRIDS: f64 = 1e-5;
/// A weight this near to the middle between two codes, in steps, is rounded as well to either.
const EQUAL_CODES: f64 = 1e-4;

/// GPTQ of `w [K, N]` with the undamped Hessian `h [K, K]`, both row-major. No blocks, no threads,
/// no escalation: `None` where `h` plus damping has no Cholesky factor.
///
/// Where two grids or two codes are equally good, the one that `rival` took is taken: all later
/// codes of that output follow from it, and a comparison should not be one of which coin fell.
pub fn gptq(
    w: &[f64],
    h: &[f64],
    n: usize,
    spec: &QuantSpec,
    rival: Option<&SolvedLayer>,
) -> Option<SolvedLayer> {
    let k = w.len() / n;
    let diagonal: Vec<f32> = (0..k).map(|i| h[i * k + i] as f32).collect();
    let order = Order::new(spec.order, spec.group_size, &diagonal);
    let (rule, max_code) = (GridRule::new(spec), f64::from(spec.bits.max_code()));

    let mean = (0..k).map(|i| h[i * k + i]).sum::<f64>() / k as f64;
    let damped = |i: usize, j: usize| {
        let damp = if i == j {
            spec.damp_percent * mean
        } else {
            0.0
        };
        h[order.channels[i] * k + order.channels[j]] + damp
    };
    let u = cholesky(&inverse(&cholesky(&square(k, damped), k)?, k), k)?; // u[j][i] = U_ij

    let mut w: Vec<f64> = (order.channels.iter())
        .flat_map(|&c| w[c * n..(c + 1) * n].to_vec())
        .collect();
    let groups = spec.group_size.count(k);
    let mut grids = vec![(0.0f64, 0.0f64); groups * n];
    let mut codes = vec![0u8; k * n];
    let fit = |w: &[f64], rows: &[usize], group: usize, col: usize| {
        let taken = rival.map(|layer| {
            let at = group * n + col;
            (layer.scales[at].to_f64(), f64::from(layer.zeros[at]))
        });
        let column = || rows.iter().map(|&r| w[r * n + col] as f32);
        let (low, high) = (column().fold(0.0, f32::min), column().fold(0.0, f32::max));
        let mut best = (f64::INFINITY, (0.0, 0.0));
        let mut rivals = f64::INFINITY;
        for candidate in SearchRule::new(spec).candidates() {
            let Ok((scale, zero)) = candidate.fit(&rule, low, high) else {
                continue; // the solver reports it
            };
            let (scale, zero) = (f64::from(scale), f64::from(zero));
            let loss = |&r: &usize| {
                let value = w[r * n + col];
                let steps = (value / scale).round_ties_even();
                let q = scale * steps.clamp(-zero, max_code - zero);
                damped(r, r) * (value - q).powi(2)
            };
            let error = rows.iter().map(loss).sum();
            if error < best.0 {
                best = (error, (scale, zero));
            }
            if taken == Some((scale, zero)) {
                rivals = error;
            }
        }
        match taken {
            Some(grid) if rivals <= best.0 * (1.0 + EQUAL_GRIDS) => grid,
            _ => best.1,
        }
    };
    for i in 0..k {
        let group = order.groups[i] as usize;
        let starts = i == 0 || order.groups[i - 1] != order.groups[i];
        let due = match order.fixed_grids {
            true if i == 0 => 0..groups,
            false if starts => group..group + 1,
            _ => 0..0,
        };
        for g in due {
            let rows: Vec<usize> = (0..k).filter(|&r| order.groups[r] as usize == g).collect();
            for col in 0..n {
                grids[g * n + col] = fit(&w, &rows, g, col);
            }
        }
        for col in 0..n {
            let (scale, zero) = grids[group * n + col];
            let value = w[i * n + col];
            let at = order.channels[i] * n + col;
            let steps = value / scale + zero;
            let nearest = steps.round_ties_even().clamp(0.0, max_code);
            let code = match rival.map(|layer| f64::from(layer.codes[at])) {
                Some(code) if (code - steps).abs() < 0.5 + EQUAL_CODES => code,
                _ => nearest,
            };
            codes[at] = code as u8;
            let error = (value - scale * (code - zero)) / u[i * k + i];
            for j in i + 1..k {
                w[j * n + col] -= error * u[j * k + i];
            }
        }
    }
    Some(SolvedLayer {
        bits: spec.bits,
        in_features: k,
        out_features: n,
        codes,
        scales: grids.iter().map(|g| f16::from_f64(g.0)).collect(),
        zeros: grids.iter().map(|g| g.1 as u16).collect(),
        g_idx: order.g_idx(),
    })
}

/// `tr(E H E^T)` in f64, as [`crate::output_error`] but in plain loops.
pub fn output_error(w: &[f64], h: &[f64], layer: &SolvedLayer) -> f64 {
    let (k, n) = (layer.in_features, layer.out_features);
    let q = layer.dequantize();
    let e: Vec<f64> = w.iter().zip(&q).map(|(w, &q)| w - f64::from(q)).collect();
    let mut sum = 0.0;
    for i in 0..k {
        for j in 0..k {
            let dot: f64 = (0..n).map(|c| e[i * n + c] * e[j * n + c]).sum();
            sum += h[i * k + j] * dot;
        }
    }
    sum
}

fn square(k: usize, f: impl Fn(usize, usize) -> f64) -> Vec<f64> {
    (0..k * k).map(|at| f(at / k, at % k)).collect()
}

/// Lower `L` with `A = L L^T`.
fn cholesky(a: &[f64], k: usize) -> Option<Vec<f64>> {
    let mut l = vec![0.0; k * k];
    for i in 0..k {
        for j in 0..=i {
            let dot: f64 = (0..j).map(|p| l[i * k + p] * l[j * k + p]).sum();
            let rest = a[i * k + j] - dot;
            if i == j && rest <= 0.0 {
                return None;
            }
            l[i * k + j] = if i == j {
                rest.sqrt()
            } else {
                rest / l[j * k + j]
            };
        }
    }
    Some(l)
}

/// `(L L^T)^-1`.
fn inverse(l: &[f64], k: usize) -> Vec<f64> {
    let mut inv = vec![0.0; k * k]; // L^-1, lower
    for col in 0..k {
        for row in col..k {
            let dot: f64 = (col..row).map(|p| l[row * k + p] * inv[p * k + col]).sum();
            let one = if row == col { 1.0 } else { 0.0 };
            inv[row * k + col] = (one - dot) / l[row * k + row];
        }
    }
    square(k, |i, j| {
        (i.max(j)..k).map(|p| inv[p * k + i] * inv[p * k + j]).sum()
    })
}
