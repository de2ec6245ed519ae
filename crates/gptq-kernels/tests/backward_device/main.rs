//! Gradients of a block's operations on the GPU against those of the processor in f64, and the training of latents
//! against the processor's in f32: norms, gates, RoPE, products, attention, the output error; rounding, steps of
//! latents and scales, and what the sweep keeps for them. Errors are printed (`--nocapture`), and every case of a
//! table is tried before the test fails. Skipped by name where there is no GPU.
#![cfg(feature = "cuda")]
#![allow(clippy::print_stderr)]

mod attention;
#[path = "../common/mod.rs"]
mod common;
mod latents;
#[path = "../common/operands.rs"]
mod operands;
mod refusals;
mod rows;
mod speed;
mod sweep;

use gptq_kernels::cuda::CudaError;
use gptq_types::Dtype;

use operands::{BOTH, matrix, poisoned, rounded, upload, values};

/// Of gradients that are rounded once, or whose factors are, relative to the largest element: some units.
fn tolerance(dtype: Dtype) -> f64 {
    match dtype {
        Dtype::BF16 => 1.5e-2,
        _ => 2e-3,
    }
}

/// A table of cases: what is wrong is collected, and said at the end.
struct Cases {
    name: &'static str,
    tried: usize,
    /// The largest error, as a share of what was allowed.
    worst: f64,
    failed: Vec<String>,
}

impl Cases {
    fn new(name: &'static str) -> Self {
        Cases {
            name,
            tried: 0,
            worst: 0.0,
            failed: Vec::new(),
        }
    }

    fn check(&mut self, holds: bool, what: &str) {
        self.tried += 1;
        eprintln!(
            "{} {}: {what}",
            if holds { "    " } else { "FAIL" },
            self.name
        );
        if !holds {
            self.failed.push(what.to_string());
        }
    }

    /// Wrong by no more than `tolerance` times the largest element that there should be.
    fn near(&mut self, got: &[f32], want: &[f64], tolerance: f64, what: &str) {
        let largest = want.iter().fold(0.0f64, |max, x| max.max(x.abs()));
        let (at, error) = (got.iter().zip(want))
            .map(|(got, want)| (f64::from(*got) - want).abs())
            .enumerate()
            .fold((0, 0.0f64), |max, (at, x)| {
                if x > max.1 || x.is_nan() {
                    (at, x)
                } else {
                    max
                }
            });
        let holds = got.len() == want.len() && error <= tolerance * largest;
        let relative = error / largest.max(f64::MIN_POSITIVE);
        self.worst = self.worst.max(relative / tolerance);
        let mut what =
            format!("{what}: error {relative:.2e} of {largest:.3e}, allowed {tolerance:.1e}");
        if !holds && got.len() == want.len() {
            what += &format!("; {} for {} at {at} of {}", got[at], want[at], got.len());
        } else if !holds {
            what += &format!("; {} elements for {}", got.len(), want.len());
        }
        self.check(holds, &what);
    }

    fn same<T: PartialEq + std::fmt::Debug>(&mut self, got: &[T], want: &[T], what: &str) {
        let other = got.iter().zip(want).filter(|(got, want)| got != want);
        let (count, first) = (other.clone().count(), other.clone().next());
        let holds = got.len() == want.len() && count == 0;
        let what = match (holds, first) {
            (true, _) => format!("{what}: the same {}", got.len()),
            (false, Some(pair)) => format!("{what}: {count} of {} differ, {pair:?}", got.len()),
            (false, None) => format!("{what}: {} for {}", got.len(), want.len()),
        };
        self.check(holds, &what);
    }

    /// What a call gave, or a failed case.
    fn ok<T>(&mut self, result: Result<T, CudaError>, what: &str) -> Option<T> {
        (result.map_err(|error| self.check(false, &format!("{what}: {error}")))).ok()
    }

    fn end(self) {
        eprintln!(
            "     {}: {} cases, errors at most {:.2} of what is allowed",
            self.name, self.tried, self.worst
        );
        let failed = self.failed;
        assert!(
            failed.is_empty(),
            "{} failed:\n{}",
            failed.len(),
            failed.join("\n")
        );
    }
}

/// Of columns of a matrix `[rows, pitch]`.
fn columns<T: Copy>(x: &[T], pitch: usize, range: std::ops::Range<usize>) -> Vec<T> {
    (x.chunks_exact(pitch))
        .flat_map(|row| row[range.clone()].to_vec())
        .collect()
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|x| f64::from(*x)).collect()
}
