//! Operands of other shapes and types, which every operation refuses before it queues anything.

use std::panic::{AssertUnwindSafe, catch_unwind};

use gptq_kernels::cuda::{Buffer, CudaError, DeviceLatents, DeviceNorm};
use gptq_kernels::{Activation, AttentionShape};
use gptq_kernels::{LearningRates, RowScale};
use gptq_types::{Bits, Dtype, SolvedLayer};
use half::f16;

use super::common::gpu;
use super::{Cases, matrix, poisoned};

fn refused(cases: &mut Cases, why: &str, run: impl FnOnce() -> Result<(), CudaError>) {
    let said = match catch_unwind(AssertUnwindSafe(run)) {
        Ok(_) => "accepted".to_string(),
        Err(panic) => (panic.downcast_ref::<String>().cloned())
            .or_else(|| panic.downcast_ref::<&str>().map(|text| text.to_string()))
            .unwrap_or_default(),
    };
    cases.check(
        said.contains(why),
        &format!("{why}: {}", said.replace('\n', " ")),
    );
}

#[test]
fn other_shapes_and_types_are_refused() {
    let Some(gpu) = gpu() else { return };
    let mut cases = Cases::new("refusals");
    let all = poisoned(&gpu, 100 * 100);
    let (x, other) = (
        matrix(&all, Dtype::F16, 24, 64),
        matrix(&all, Dtype::F16, 24, 56),
    );
    let brain = matrix(&all, Dtype::BF16, 24, 64);
    let gaps = matrix(&all, Dtype::F16, 24, 72).column_range(0..64);
    let norm = DeviceNorm::rms(&gpu, &[1.0; 64], 1e-5).unwrap();
    let wide_norm = DeviceNorm::rms(&gpu, &[1.0; 48], 1e-5).unwrap();
    let silu = Activation::Silu;
    let c = &mut cases;
    refused(c, "rows of gradients", || {
        gpu.norm_backward(other, x, x, &norm)
    });
    refused(c, "type of both", || gpu.norm_backward(x, brain, x, &norm));
    refused(c, "gaps", || gpu.norm_backward(x, gaps, x, &norm));
    refused(c, "whole runs", || gpu.norm_backward(x, x, x, &wide_norm));
    refused(c, "rows of gradients", || {
        gpu.gate_backward(x, x, other, silu)
    });
    refused(c, "type of both", || gpu.gate_backward(x, brain, x, silu));
    refused(c, "rows of gradients", || {
        gpu.activate_backward(x, other, silu)
    });
    let weight = matrix(&all, Dtype::F16, 64, 56);
    refused(c, "outputs of the weight", || {
        gpu.project_backward(other, other, weight, true)
    });
    refused(c, "rows of the product", || {
        gpu.project_backward(x, x, weight, true)
    });
    refused(c, "type of both", || {
        gpu.project_backward(other, brain, weight, true)
    });
    refused(c, "rows of the target", || {
        gpu.output_error(x, other, RowScale::of(vec![1.0]))
            .map(|_| ())
    });
    refused(c, "rows of the gradient", || {
        gpu.error_gradient(other, x, x, RowScale::of(vec![1.0]), 1.0)
    });
    refused(c, "gaps", || gpu.place_columns(x, gaps));
    let shape = AttentionShape::new(4, 2, 16);
    let kv = matrix(&all, Dtype::F16, 24, 32);
    let attend = |d: [_; 3], d_out, inputs: [_; 3], tokens| {
        gpu.attend_backward(d, d_out, inputs, tokens, shape)
    };
    refused(c, "heads of queries", || {
        attend([x, kv, kv], other, [x, kv, kv], 12)
    });
    refused(c, "heads of queries", || {
        attend([other, kv, kv], x, [x, kv, kv], 12)
    });
    refused(c, "heads of keys", || {
        attend([x, x, kv], x, [x, kv, kv], 12)
    });
    refused(c, "heads of keys", || {
        attend([x, kv, kv], x, [x, kv, x], 12)
    });
    refused(c, "whole windows", || {
        attend([x, kv, kv], x, [x, kv, kv], 13)
    });
    let (k, n) = (64, 56);
    let layer = SolvedLayer {
        bits: Bits::Four,
        in_features: k,
        out_features: n,
        codes: vec![0; k * n],
        scales: vec![f16::ONE; n],
        zeros: vec![8; n],
        g_idx: vec![0; k],
    };
    let latents = vec![0.0; k * n];
    refused(c, "a latent for each weight", || {
        DeviceLatents::new(&gpu, &layer, &latents[1..]).map(|_| ())
    });
    let mut there = DeviceLatents::new(&gpu, &layer, &latents).unwrap();
    refused(c, "rows are outputs", || there.round_into(weight));
    refused(c, "a snapshot", || there.restore());
    let codes = Buffer::new(&gpu, k * n - 1).unwrap();
    refused(c, "a code for each latent", || there.move_to_codes(&codes));
    let rates = LearningRates {
        latents: 0.0,
        scales: 0.0,
    };
    refused(c, "rows to learn from", || there.step(&[], rates, 0));
    refused(c, "inputs of the linear", || {
        there.step(&[(other, other)], rates, 0)
    });
    refused(c, "gradients of its outputs", || {
        there.step(&[(x, x)], rates, 0)
    });
    refused(c, "type of both", || {
        there.step(&[(brain, other)], rates, 0)
    });
    cases.end();
}
