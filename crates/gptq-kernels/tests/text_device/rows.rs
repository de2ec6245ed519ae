//! Norms, activations and copies of rows in the order of the next linear, and widened weights.

use std::sync::Arc;

use gptq_kernels::Activation;
use gptq_kernels::cuda::{Buffer, DeviceMatrix, DeviceNorm, Gpu, PackedLinear, RowOrder};
use gptq_types::{Bits, Dtype, SolvedLayer};
use half::f16;

use super::common::{Random, gpu};
use super::{BOTH, layer, matrix, near, poisoned, rms, rounded, upload, values, weights};

const OUTPUTS: usize = 32;

/// A linear with sorted channels, some places empty where K is no multiple of 128.
fn act_order(gpu: &Arc<Gpu>, k: usize, dtype: Dtype) -> PackedLinear {
    let mut random = Random(k as u64);
    let layer = SolvedLayer {
        bits: Bits::Four,
        in_features: k,
        out_features: OUTPUTS,
        codes: (0..k * OUTPUTS)
            .map(|_| (random.next() % 16) as u8)
            .collect(),
        scales: vec![f16::from_f32(0.01); k.div_ceil(64) * OUTPUTS],
        zeros: vec![8; k.div_ceil(64) * OUTPUTS],
        g_idx: (0..k)
            .map(|channel| (channel * 7 % k / 64) as u32)
            .collect(),
    };
    PackedLinear::new(gpu, &layer, None, dtype).unwrap()
}

/// Writes rows in an order.
type Write<'a> = &'a dyn Fn(DeviceMatrix<'_>, RowOrder<'_>);

/// Rows in their natural order are `want`, and a linear makes the same of them as of rows in its own.
fn check_rows(
    gpu: &Arc<Gpu>,
    linear: &PackedLinear,
    dtype: Dtype,
    want: &[f64],
    what: &str,
    write: Write,
) {
    let k = linear.features();
    let rows = want.len() / k;
    let out = poisoned(gpu, rows * k);
    let natural = matrix(&out, dtype, rows, k);
    write(natural, RowOrder::natural(k));
    near(&gpu.download(natural).unwrap(), want, dtype, 0.01, what);
    let order = linear.order();
    let ordered = poisoned(gpu, rows * order.width());
    let ordered = matrix(&ordered, dtype, rows, order.width());
    write(ordered, order);
    let products = [(); 2].map(|()| Buffer::new(gpu, rows * OUTPUTS * 2).unwrap());
    let [first, second] = [0, 1].map(|at| matrix(&products[at], dtype, rows, OUTPUTS));
    linear.multiply(first, natural, false).unwrap();
    linear.multiply_ordered(second, ordered, false).unwrap();
    let [natural, ordered] = products.map(|out| out.to_host::<u16>(rows * OUTPUTS).unwrap());
    assert!(natural == ordered, "{what}, {dtype}, in order");
}

fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

fn gelu(x: f64) -> f64 {
    0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())
}

type Function = fn(f64) -> f64;

const ACTIVATIONS: [(Activation, Function); 2] =
    [(Activation::Silu, silu), (Activation::GeluTanh, gelu)];

#[test]
fn rows_are_written_in_the_order_of_the_next_linear() {
    let Some(gpu) = gpu() else { return };
    // By ones and by eights; what a thread takes at a time is all, or not all of a row; empty places or none.
    for dtype in BOTH {
        for k in [100, 172, 1096, 4096, 11008] {
            let linear = act_order(&gpu, k, dtype);
            for rows in [1, 3, 40, 300] {
                let mut random = Random((k + rows) as u64);
                norms(&gpu, &linear, dtype, rows, &mut random);
                activations(&gpu, &linear, dtype, rows, &mut random);
            }
        }
    }
}

fn norms(gpu: &Arc<Gpu>, linear: &PackedLinear, dtype: Dtype, rows: usize, random: &mut Random) {
    let k = linear.features();
    let what = |kind: &str| format!("{kind}, {rows} rows of {k}");
    // With a mean that a layer norm has to take away.
    let x: Vec<f64> = (values(random, dtype, rows * k).iter())
        .map(|x| rounded(dtype, 2.0 * x + 0.75))
        .collect();
    let (weight, bias) = (weights(random, k), weights(random, k));
    let there = upload(gpu, dtype, &x);
    let check = |want: Vec<Vec<f64>>, norm: DeviceNorm, kind: &str| {
        assert_eq!(norm.width(), k);
        check_rows(
            gpu,
            linear,
            dtype,
            &want.concat(),
            &what(kind),
            &|out, order| {
                let x = matrix(&there, dtype, rows, k);
                gpu.norm_rows(out, order, x, &norm).unwrap();
            },
        );
    };
    let all = |of: &dyn Fn(&[f64]) -> Vec<f64>| x.chunks(k).map(of).collect::<Vec<_>>();
    check(
        all(&|row| rms(dtype, row, &weight, 1e-5)),
        DeviceNorm::rms(gpu, &weight, 1e-5).unwrap(),
        "root mean square",
    );
    for bias in [None, Some(&bias[..])] {
        check(
            all(&|row| layer(dtype, row, &weight, bias, 1e-5)),
            DeviceNorm::layer(gpu, &weight, bias, 1e-5).unwrap(),
            "layer norm",
        );
    }
}

fn activations(
    gpu: &Arc<Gpu>,
    linear: &PackedLinear,
    dtype: Dtype,
    rows: usize,
    random: &mut Random,
) {
    let k = linear.features();
    // Gates beside other columns, ups by themselves: rows lie differently far apart.
    let pitch = k + 8;
    let gates: Vec<f64> = (values(random, dtype, rows * pitch).iter())
        .map(|x| rounded(dtype, 6.0 * x))
        .collect();
    let ups = values(random, dtype, rows * k);
    let (of_gates, of_ups) = (upload(gpu, dtype, &gates), upload(gpu, dtype, &ups));
    let gate = matrix(&of_gates, dtype, rows, pitch).column_range(0..k);
    let up = matrix(&of_ups, dtype, rows, k);
    let gates: Vec<f64> = gates
        .chunks(pitch)
        .flat_map(|row| &row[..k])
        .copied()
        .collect();
    for (activation, of) in ACTIVATIONS {
        let what = format!("{activation:?}, {rows} rows of {k}");
        let activated: Vec<f64> = gates.iter().map(|x| rounded(dtype, of(*x))).collect();
        let gated: Vec<f64> = (activated.iter().zip(&ups)).map(|(x, y)| x * y).collect();
        check_rows(
            gpu,
            linear,
            dtype,
            &gated,
            &format!("gate, {what}"),
            &|out, order| {
                gpu.gate_rows(out, order, [gate, up], activation).unwrap();
            },
        );
        check_rows(gpu, linear, dtype, &activated, &what, &|out, order| {
            gpu.activate_rows(out, order, gate, activation).unwrap();
        });
    }
    check_rows(
        gpu,
        linear,
        dtype,
        &ups,
        &format!("copy of {rows} rows of {k}"),
        &|out, order| {
            gpu.gather_rows(out, order, up).unwrap();
        },
    );
}

/// As many as a window of a long context has, and more than a grid's second dimension.
#[test]
fn rows_of_long_windows_are_gated() {
    let Some(gpu) = gpu() else { return };
    let (rows, k, dtype) = (65_537, 8, Dtype::F16);
    let mut random = Random(5);
    let both = [(); 2].map(|()| values(&mut random, dtype, rows * k));
    for (activation, of) in ACTIVATIONS {
        let there = [0, 1].map(|at| upload(&gpu, dtype, &both[at]));
        let [gate, up] = [0, 1].map(|at| matrix(&there[at], dtype, rows, k));
        let alone = poisoned(&gpu, rows * k);
        let alone = matrix(&alone, dtype, rows, k);
        let order = RowOrder::natural(k);
        gpu.activate_rows(alone, order, gate, activation).unwrap();
        gpu.gate(gate, up, activation).unwrap();
        let activated: Vec<f64> = both[0].iter().map(|x| rounded(dtype, of(*x))).collect();
        let want: Vec<f64> = (activated.iter().zip(&both[1]))
            .map(|(x, y)| x * y)
            .collect();
        let got = gpu.download(gate).unwrap();
        near(&got, &want, dtype, 1e-3, "gates of a long window");
        let got = gpu.download(alone).unwrap();
        near(&got, &activated, dtype, 1e-3, "rows of a long window");
    }
}

#[test]
fn dequantized_weights_are_those_of_the_processor() {
    let Some(gpu) = gpu() else { return };
    for (bits, k, n) in [
        (Bits::Two, 64usize, 40usize),
        (Bits::Four, 200, 136),
        (Bits::Eight, 129, 65),
    ] {
        let groups = k.div_ceil(32);
        let mut random = Random(k as u64);
        let mut whole = |count: usize, below: usize| -> Vec<usize> {
            (0..count).map(|_| random.next() as usize % below).collect()
        };
        let max = bits.max_code() as usize + 1;
        let layer = SolvedLayer {
            bits,
            in_features: k,
            out_features: n,
            codes: whole(k * n, max).iter().map(|&code| code as u8).collect(),
            zeros: whole(groups * n, max)
                .iter()
                .map(|&zero| zero as u16)
                .collect(),
            scales: (whole(groups * n, 900).iter())
                .map(|&scale| f16::from_f32(scale as f32 * 1e-4))
                .collect(),
            g_idx: whole(k, groups).iter().map(|&group| group as u32).collect(),
        };
        let out = Buffer::new(&gpu, k * n * 2).unwrap();
        let place = matrix(&out, Dtype::F16, n, k);
        gpu.dequantize(place, &layer).unwrap();
        let got = gpu.download(place).unwrap();
        let want = layer.dequantize();
        for output in 0..n {
            for channel in 0..k {
                let want = f16::from_f32(want[channel * n + output]).to_f32();
                assert_eq!(got[output * k + channel], want, "{bits} bits");
            }
        }
    }
}
