//! Time to solve one layer as a multiple of one f32 product of the same size, in one run.
//!
//! `cargo run --release -p gptq-quantizer --example solve_speed -- [K] [N]`
#![allow(clippy::print_stdout)]

use std::time::Instant;

use gptq_kernels::measure_sgemm;
use gptq_quantizer::{ActivationSink, Activations, Factor, HessianSum, solve};
use gptq_types::{ColumnOrder, QuantSpec};

fn main() {
    let mut sizes = std::env::args()
        .skip(1)
        .map(|arg| arg.parse().expect("a size"));
    let k: usize = sizes.next().unwrap_or(4096);
    let n: usize = sizes.next().unwrap_or(k);
    let mut state = 1u64;
    let mut random = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    let tokens = k + k / 2;
    let x: Vec<f32> = (0..tokens * k).map(|_| random()).collect();
    let weight: Vec<f32> = (0..k * n).map(|_| random()).collect();
    let mut sum = HessianSum::new(k);
    sum.observe(Activations::Host(&x), tokens, k);
    let hessian = sum.finish().expect("finite activations");

    let sgemm = 2.0 * (k as f64).powi(2) * n as f64 / measure_sgemm(k.min(4096));
    for order in [ColumnOrder::Natural, ColumnOrder::ActOrder] {
        let spec = QuantSpec {
            order,
            ..QuantSpec::published()
        };
        let start = Instant::now();
        let factor = Factor::new(&hessian, &spec).expect("a positive definite Hessian");
        let factored = start.elapsed().as_secs_f64();
        solve(&weight, n, &factor, &spec).expect("a solvable layer");
        let total = start.elapsed().as_secs_f64();
        println!(
            "K={k} N={n} {order:?}: factor {factored:.2} s, sweep {:.4} s, sgemm {sgemm:.2} s, ratio {:.2}",
            total - factored,
            total / sgemm
        );
    }
}
