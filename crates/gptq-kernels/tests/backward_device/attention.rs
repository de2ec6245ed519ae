//! Gradients of attention inside windows of tokens.

use std::sync::Arc;

use gptq_kernels::cuda::{Buffer, DeviceMatrix, Gpu};
use gptq_kernels::{AttentionShape, causal_attention_backward};
use gptq_types::Dtype;

use super::common::{Random, gpu};
use super::{BOTH, Cases, columns, matrix, poisoned, tolerance, upload, values};

/// Caps and windows, of one key, less than a run of keys, more.
const VARIANTS: [(Option<f32>, Option<usize>); 6] = [
    (None, None),
    (Some(1.5), None),
    (None, Some(1)),
    (None, Some(5)),
    (Some(1.5), Some(33)),
    (None, Some(70)),
];

/// With scores large enough for the cap to be felt, and for single keys.
fn variant(
    shape: AttentionShape,
    (soft_cap, window): (Option<f32>, Option<usize>),
) -> AttentionShape {
    let more = if soft_cap.is_some() || window.is_some() {
        4.0
    } else {
        1.0
    };
    AttentionShape {
        scale: more * shape.scale,
        soft_cap,
        window,
        ..shape
    }
}

/// `d_out`, `q`, `k`, `v`.
fn inputs(random: &mut Random, dtype: Dtype, rows: usize, shape: AttentionShape) -> [Vec<f64>; 4] {
    [shape.heads, shape.heads, shape.kv_heads, shape.kv_heads]
        .map(|heads| values(random, dtype, rows * heads * shape.head_dim))
}

fn there<'a>(buffers: &'a [Buffer], dtype: Dtype, rows: usize) -> Vec<DeviceMatrix<'a>> {
    (buffers.iter())
        .map(|x| matrix(x, dtype, rows, x.bytes() / 2 / rows))
        .collect()
}

/// Queries, keys and values, or their gradients, in the rows of a fused linear.
fn parts(x: DeviceMatrix<'_>, shape: AttentionShape) -> [DeviceMatrix<'_>; 3] {
    let [heads, kv] = [shape.heads, shape.kv_heads].map(|heads| heads * shape.head_dim);
    [0..heads, heads..heads + kv, heads + kv..heads + 2 * kv].map(|range| x.column_range(range))
}

/// Gradients in memory of their own, on the host.
fn gradients(
    gpu: &Arc<Gpu>,
    inputs: &[DeviceMatrix],
    tokens: usize,
    shape: AttentionShape,
) -> Result<[Vec<f32>; 3], gptq_kernels::cuda::CudaError> {
    let [d_out, q, k, v] = [inputs[0], inputs[1], inputs[2], inputs[3]];
    let out = [q, k, v].map(|x| poisoned(gpu, x.elements()));
    let all = [0, 1, 2].map(|at| out[at].matrix([q.rows(), [q, k, v][at].columns()], q.dtype()));
    gpu.attend_backward(all, d_out, [q, k, v], tokens, shape)?;
    Ok(all.map(|x| gpu.download(x).unwrap()))
}

#[test]
fn gradients_of_attention() {
    let Some(gpu) = gpu() else { return };
    let mut cases = Cases::new("attention");
    // Windows, tokens, heads, key heads, width of a head: no multiple of 32 tokens, several windows, more
    // queries than at a time, heads that share keys, widths of all kinds.
    let sizes = [
        [2, 100, 4, 4, 64],
        [2, 75, 4, 2, 64],
        [1, 75, 6, 1, 32],
        [3, 33, 8, 2, 80],
        [1, 130, 3, 3, 128],
        [1, 64, 2, 1, 256],
        [2, 21, 4, 2, 7],
        [1, 50, 2, 2, 20],
        [1, 700, 4, 2, 64],
        [1, 1, 2, 1, 16],
    ];
    for dtype in BOTH {
        for [windows, tokens, heads, kv_heads, head_dim] in sizes {
            let plain = AttentionShape::new(heads, kv_heads, head_dim);
            let mut random = Random((tokens * head_dim) as u64);
            let host = inputs(&mut random, dtype, windows * tokens, plain);
            let buffers = host.each_ref().map(|x| upload(&gpu, dtype, x));
            let device = there(&buffers, dtype, windows * tokens);
            let [d_out, q, k, v] = &host;
            for of in VARIANTS {
                let shape = variant(plain, of);
                let what = format!(
                    "{dtype}, {windows} x {tokens} tokens, {heads} of {kv_heads} heads of {head_dim}, {of:?}"
                );
                let Some(got) = cases.ok(gradients(&gpu, &device, tokens, shape), &what) else {
                    continue;
                };
                let want = causal_attention_backward(d_out, q, k, v, tokens, shape);
                for ((got, want), name) in
                    (got.iter().zip([&want.q, &want.k, &want.v])).zip(["dq", "dk", "dv"])
                {
                    cases.near(got, want, tolerance(dtype), &format!("{name}, {what}"));
                }
            }
        }
    }
    cases.end();
}

/// Two runs give the same, so do columns of wider matrices, and gradients in the place of inputs.
#[test]
fn gradients_of_attention_lie_anywhere() {
    let Some(gpu) = gpu() else { return };
    let mut cases = Cases::new("attention, anywhere");
    for dtype in BOTH {
        for (tokens, heads, kv_heads, head_dim) in [(600, 4, 2, 64), (90, 2, 2, 128)] {
            let rows = 2 * tokens;
            let shape = variant(
                AttentionShape::new(heads, kv_heads, head_dim),
                (Some(2.0), Some(64)),
            );
            let what =
                format!("{dtype}, {tokens} tokens, {heads} of {kv_heads} heads of {head_dim}");
            let mut random = Random(head_dim as u64);
            let host = inputs(&mut random, dtype, rows, shape);
            let buffers = host.each_ref().map(|x| upload(&gpu, dtype, x));
            let device = there(&buffers, dtype, rows);
            let Some(want) = cases.ok(gradients(&gpu, &device, tokens, shape), &what) else {
                continue;
            };
            if let Some(again) = cases.ok(gradients(&gpu, &device, tokens, shape), &what) {
                for (got, want) in again.iter().zip(&want) {
                    cases.same(got, want, &format!("again, {what}"));
                }
            }
            // Queries, keys and values as a fused linear leaves them, and their gradients as it takes them.
            let widths = [heads, kv_heads, kv_heads].map(|heads| heads * head_dim);
            let pitch: usize = widths.iter().sum();
            let mut fused = Vec::new();
            for row in 0..rows {
                for (x, width) in host[1..].iter().zip(widths) {
                    fused.extend(&x[row * width..][..width]);
                }
            }
            let starts = [0, widths[0], widths[0] + widths[1]];
            let of_inputs = upload(&gpu, dtype, &fused);
            let of_gradients = poisoned(&gpu, rows * pitch);
            let (from, to) = (
                matrix(&of_inputs, dtype, rows, pitch),
                matrix(&of_gradients, dtype, rows, pitch),
            );
            // Over what is read, afterwards.
            for (to, name) in [(to, "of wider matrices"), (from, "in place")] {
                let run = gpu.attend_backward(
                    parts(to, shape),
                    device[0],
                    parts(from, shape),
                    tokens,
                    shape,
                );
                if cases.ok(run, &what).is_none() {
                    continue;
                }
                let got = gpu.download(to).unwrap();
                for (at, want) in want.iter().enumerate() {
                    let got = columns(&got, pitch, starts[at]..starts[at] + widths[at]);
                    // cuBLAS may choose another kernel where rows are another distance apart.
                    let want: Vec<f64> = want.iter().map(|x| f64::from(*x)).collect();
                    cases.near(&got, &want, tolerance(dtype), &format!("{name}, {what}"));
                }
            }
        }
    }
    cases.end();
}
