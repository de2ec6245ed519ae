//! Norms, gates and widened weights against the processor.

use std::sync::Arc;

use gptq_kernels::cuda::{Buffer, Gpu, Output, PackedLinear, RowOrder};
use gptq_types::{Bits, Dtype, SolvedLayer};
use half::f16;

use super::common::{Random, gpu};
use super::{close, matrix, values};

/// A linear with sorted channels, some places empty where K is no multiple of 128.
fn act_order(gpu: &Arc<Gpu>, k: usize) -> PackedLinear {
    let n = 32;
    let mut random = Random(k as u64);
    let layer = SolvedLayer {
        bits: Bits::Four,
        in_features: k,
        out_features: n,
        codes: (values(&mut random, k * n).iter())
            .map(|value| ((value.to_f32() + 1.0) * 7.5) as u8)
            .collect(),
        scales: vec![f16::from_f32(0.01); k.div_ceil(64) * n],
        zeros: vec![8; k.div_ceil(64) * n],
        g_idx: (0..k)
            .map(|channel| (channel * 7 % k / 64) as u32)
            .collect(),
    };
    PackedLinear::new(gpu, &layer, None, Dtype::F16).unwrap()
}

/// Rows in their natural order are `want`, and a linear makes the same of them as of rows in its own.
fn check_rows(
    gpu: &Arc<Gpu>,
    want: &[f64],
    rows: usize,
    what: &str,
    write: impl Fn(u64, RowOrder),
) {
    let k = want.len() / rows;
    let linear = act_order(gpu, k);
    let natural = Buffer::new(gpu, rows * k * 2).unwrap();
    write(natural.address(), RowOrder::natural(k));
    let natural = matrix(&natural, rows, k);
    close(&gpu.download(natural).unwrap(), want, what);
    let width = linear.order().width;
    let ordered = Buffer::from_host(gpu, &vec![f16::NAN; rows * width]).unwrap();
    write(ordered.address(), linear.order());
    let products = [(); 2].map(|()| Buffer::new(gpu, rows * 32 * 2).unwrap());
    linear
        .multiply(products[0].address(), natural, false)
        .unwrap();
    linear
        .multiply_ordered(products[1].address(), matrix(&ordered, rows, width), false)
        .unwrap();
    let [natural, ordered] = products.map(|out| out.to_host::<u16>(rows * 32).unwrap());
    assert!(natural == ordered, "{what}, in order");
}

#[test]
fn norms_and_gates_are_written_in_the_order_of_the_next_linear() {
    let Some(gpu) = gpu() else { return };
    // By ones and by eights; what a thread takes at a time is all, or not all of a row.
    for k in [100, 172, 4096, 11008] {
        for rows in [1, 3, 40] {
            let what = format!("{rows} rows of {k}");
            let mut random = Random((k + rows) as u64);
            let x = values(&mut random, rows * k);
            let weight: Vec<f32> = values(&mut random, k).iter().map(|w| w.to_f32()).collect();
            let normed: Vec<f64> = (x.chunks(k))
                .flat_map(|row| {
                    let squares: f64 = row.iter().map(|x| x.to_f64().powi(2)).sum();
                    let scale = 1.0 / (squares / k as f64 + 1e-5).sqrt();
                    let rounded = |x: &f16| f16::from_f64(x.to_f64() * scale).to_f64();
                    let scaled = |(x, w): (&f16, &f32)| rounded(x) * f64::from(*w);
                    row.iter().zip(&weight).map(scaled).collect::<Vec<f64>>()
                })
                .collect();
            let there = Buffer::from_host(&gpu, &x).unwrap();
            let weight = Buffer::from_host(&gpu, &weight).unwrap();
            check_rows(&gpu, &normed, rows, &what, |out, order| {
                (gpu.norm_rows(out, order, matrix(&there, rows, k), &weight, 1e-5)).unwrap();
            });

            let both = values(&mut random, rows * 2 * k);
            let gated: Vec<f64> = (both.chunks(2 * k))
                .flat_map(|row| {
                    (0..k).map(|i| {
                        let g = row[i].to_f64();
                        f16::from_f64(g / (1.0 + (-g).exp())).to_f64() * row[k + i].to_f64()
                    })
                })
                .collect();
            let there = Buffer::from_host(&gpu, &both).unwrap();
            check_rows(&gpu, &gated, rows, &what, |out, order| {
                let outputs = [0, 2 * k as u64].map(|before| Output {
                    address: there.address() + before,
                    pitch: 2 * k,
                });
                (gpu.gate_rows(out, order, outputs, [rows, k], Dtype::F16)).unwrap();
            });
        }
    }
}

/// As many as a window of a long context has, and more than a grid's second dimension.
#[test]
fn rows_of_long_windows_are_gated() {
    let Some(gpu) = gpu() else { return };
    let (rows, k) = (65_537, 8);
    let mut random = Random(5);
    let both = [(); 2].map(|()| values(&mut random, rows * k));
    let there = [0, 1].map(|at| Buffer::from_host(&gpu, &both[at]).unwrap());
    let [gate, up] = [0, 1].map(|at| matrix(&there[at], rows, k));
    gpu.swiglu(gate, up).unwrap();
    let want: Vec<f64> = (both[0].iter().zip(&both[1]))
        .map(|(g, u)| {
            let g = g.to_f64();
            f16::from_f64(g / (1.0 + (-g).exp())).to_f64() * u.to_f64()
        })
        .collect();
    close(&gpu.download(gate).unwrap(), &want, "rows of a long window");
}

#[test]
fn dequantised_weights_are_those_of_the_processor() {
    let Some(gpu) = gpu() else { return };
    for (bits, k, n) in [
        (Bits::Two, 64usize, 40usize),
        (Bits::Four, 200, 136),
        (Bits::Eight, 129, 65),
    ] {
        let groups = k.div_ceil(32);
        let mut random = Random(k as u64);
        let mut whole = |count: usize, below: usize| -> Vec<usize> {
            (values(&mut random, count).iter())
                .map(|value| ((value.to_f32() + 1.0) * 500.0) as usize % below)
                .collect()
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
        gpu.dequantise(matrix(&out, n, k), &layer).unwrap();
        let got = gpu.download(matrix(&out, n, k)).unwrap();
        let want = layer.dequantise();
        for output in 0..n {
            for channel in 0..k {
                let want = f16::from_f32(want[channel * n + output]).to_f32();
                assert_eq!(got[output * k + channel], want, "{bits} bits");
            }
        }
    }
}
