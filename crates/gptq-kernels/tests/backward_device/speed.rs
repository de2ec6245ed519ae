//! Times of what a step of a 7B block is made of; nothing is held against anything.

use std::sync::Arc;

use gptq_kernels::cuda::{Buffer, CudaError, DeviceLatents, DeviceNorm, Gpu};
use gptq_kernels::{
    Activation, AttentionShape, LatentShape, LearningRates, RowScale, attention_backward_bytes,
};
use gptq_types::{Bits, Dtype, SolvedLayer};
use half::f16;

use super::common::{Random, gpu};
use super::matrix;

const ROWS: usize = 8192;
const TOKENS: usize = 2048;

/// Milliseconds of the fastest of some runs.
fn time(gpu: &Arc<Gpu>, name: &str, mut run: impl FnMut() -> Result<(), CudaError>) {
    let mut best = f64::INFINITY;
    for _ in 0..4 {
        let before = gpu.mark().unwrap();
        run().unwrap();
        best = best.min(before.seconds_to(&gpu.mark().unwrap()).unwrap());
    }
    eprintln!("     {name}: {:.3} ms", best * 1e3);
}

/// Random f16 from -1/8 to 1/8.
fn filled(gpu: &Arc<Gpu>, count: usize) -> Buffer {
    let mut random = Random(count as u64);
    let some: Vec<f16> = (0..1 << 16)
        .map(|_| f16::from_f32(0.125 * random.uniform()))
        .collect();
    let all: Vec<u16> = (0..count)
        .map(|at| some[at * 40_503 % (1 << 16)].to_bits())
        .collect();
    Buffer::from_host(gpu, &all).unwrap()
}

#[test]
fn times_of_a_step() {
    let Some(gpu) = gpu() else { return };
    let dtype = Dtype::F16;
    let buffers = [(); 4].map(|()| filled(&gpu, ROWS * 11008));
    let rows = |at: usize, width: usize| matrix(&buffers[at], dtype, ROWS, width);
    for (k, n) in [(4096, 4096), (4096, 11008), (11008, 4096)] {
        let groups = k / 128;
        let layer = SolvedLayer {
            bits: Bits::Four,
            in_features: k,
            out_features: n,
            codes: vec![0; k * n],
            scales: vec![f16::from_f32(0.01); groups * n],
            zeros: vec![8; groups * n],
            g_idx: (0..k).map(|channel| (channel / 128) as u32).collect(),
        };
        let latents: Vec<f32> = (0..k * n)
            .map(|at| (at % 199) as f32 * 1e-3 - 0.1)
            .collect();
        let mut there = DeviceLatents::new(&gpu, &layer, &latents).unwrap();
        let (x, dy) = (rows(1, k), rows(2, n));
        let rates = LearningRates {
            latents: 1e-4,
            scales: 1e-5,
        };
        let mut step = 0;
        time(&gpu, &format!("step of {k} x {n}, {ROWS} rows"), || {
            step += 1;
            there.step(&[(x, dy)], rates, step - 1)
        });
        time(
            &gpu,
            &format!("step of {k} x {n}, 16 rows: all but the product"),
            || {
                step += 1;
                there.step(
                    &[(x.row_range(0..16), dy.row_range(0..16))],
                    rates,
                    step - 1,
                )
            },
        );
        let weight = Buffer::new(&gpu, 2 * k * n).unwrap();
        let weight = matrix(&weight, dtype, n, k);
        time(&gpu, &format!("round {k} x {n}"), || {
            there.round_into(weight)
        });
        time(&gpu, &format!("product of {k} x {n}, forward"), || {
            gpu.project(dy, x, weight)
        });
        time(
            &gpu,
            &format!("product of {k} x {n}, gradient of inputs"),
            || gpu.project_backward(x, dy, weight, false),
        );
        let shape = LatentShape {
            features: k,
            outputs: n,
            groups,
        };
        let bytes = shape.latent_bytes() + shape.moment_bytes();
        eprintln!("     {k} x {n}: {} MB in training", bytes >> 20);
    }
    let shape = AttentionShape::new(32, 32, 128);
    let (q, k, v, d_out) = (rows(1, 4096), rows(2, 4096), rows(3, 4096), rows(0, 4096));
    let gradients = [(); 3].map(|()| Buffer::new(&gpu, 2 * ROWS * 4096).unwrap());
    let [dq, dk, dv] = [0, 1, 2].map(|at| matrix(&gradients[at], dtype, ROWS, 4096));
    time(&gpu, "attention, 4 x 2048 tokens, 32 heads of 128", || {
        gpu.attend(dq, q, k, v, TOKENS, shape)
    });
    time(&gpu, "its gradient", || {
        gpu.attend_backward([dq, dk, dv], d_out, [q, k, v], TOKENS, shape)
    });
    let shared = AttentionShape::new(32, 8, 128);
    let [few_k, few_v] = [k, v].map(|x| x.row_range(0..ROWS / 4).reshaped([ROWS, 1024]));
    let [few_dk, few_dv] = [dk, dv].map(|x| x.row_range(0..ROWS / 4).reshaped([ROWS, 1024]));
    time(&gpu, "the same with 8 heads of keys", || {
        gpu.attend_backward(
            [dq, few_dk, few_dv],
            d_out,
            [q, few_k, few_v],
            TOKENS,
            shared,
        )
    });
    let bytes = attention_backward_bytes(TOKENS, shape);
    eprintln!("     attention works in {} MB", bytes >> 20);
    let norm = DeviceNorm::rms(&gpu, &vec![1.0; 4096], 1e-5).unwrap();
    time(&gpu, "gradient of a norm, 8192 x 4096", || {
        gpu.norm_backward(dq, d_out, q, &norm)
    });
    time(&gpu, "gradient of a gate, 8192 x 11008", || {
        gpu.gate_backward(
            rows(0, 11008),
            rows(1, 11008),
            rows(2, 11008),
            Activation::Silu,
        )
    });
    let scale = RowScale::of(vec![1.0]);
    time(&gpu, "output error, 8192 x 4096", || {
        gpu.output_error(q, d_out, scale).map(|_| ())
    });
    time(&gpu, "its gradient", || {
        gpu.error_gradient(dq, q, d_out, scale, 1.0)
    });
    time(&gpu, "sum, 8192 x 4096", || gpu.add(dq, q));
}
