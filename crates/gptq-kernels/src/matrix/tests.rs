//! Products against plain f64 on shapes that fit no tile, word or vector.

use gptq_types::Bits;
use half::{bf16, f16};
use proptest::prelude::*;

use super::*;
use crate::vector::{PORTABLE, vectorized};

/// Largest difference over the root mean square of the outputs: f32 sums of up to 300 terms.
const TOLERANCE: f64 = 2e-5;

/// A layer of any shape, groups in any order, one of which may be empty.
fn layers() -> impl Strategy<Value = SolvedLayer> {
    let bits = prop::sample::select(Bits::ALL.to_vec());
    (bits, 1usize..=150, 1usize..=300, 1usize..=5, any::<bool>()).prop_flat_map(
        |(bits, inputs, outputs, groups, permuted)| {
            let max = bits.max_code() as u8;
            let in_order = prop::collection::vec(0..groups as u32, inputs);
            (
                prop::collection::vec(0..=max, inputs * outputs),
                prop::collection::vec(0..=u16::from(max) + 1, groups * outputs),
                prop::collection::vec(-0.1f32..0.1, groups * outputs),
                in_order,
            )
                .prop_map(move |(codes, zeros, scales, mut g_idx)| {
                    if !permuted {
                        g_idx.sort_unstable();
                    }
                    SolvedLayer {
                        bits,
                        in_features: inputs,
                        out_features: outputs,
                        codes,
                        scales: scales.into_iter().map(f16::from_f32).collect(),
                        zeros,
                        g_idx,
                    }
                })
        },
    )
}

fn wave(len: usize, step: f32) -> Vec<f32> {
    (0..len).map(|i| (i as f32 * step).sin() * 3.0).collect()
}

/// `x [rows, K]` times `weight [K, N]` in f64.
fn reference(x: &[f32], weight: &[f32], k: usize, n: usize) -> Vec<f64> {
    let mut out = Vec::new();
    for x in x.chunks_exact(k) {
        for column in 0..n {
            let term = |(k, x): (usize, &f32)| f64::from(*x) * f64::from(weight[k * n + column]);
            out.push(x.iter().enumerate().map(term).sum());
        }
    }
    out
}

#[track_caller]
fn close(got: &[f32], want: &[f64]) {
    assert_eq!(got.len(), want.len());
    let square: f64 = want.iter().map(|w| w * w).sum();
    let size = (square / want.len() as f64).sqrt().max(1e-3);
    for (at, (got, want)) in got.iter().zip(want).enumerate() {
        let error = (f64::from(*got) - want).abs() / size;
        assert!(error < TOLERANCE, "{got} against {want} at {at}, {error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn packed_products_are_those_of_the_dequantized_weight(
        layer in layers(),
        rows in prop::sample::select(vec![1usize, 2, 3, 4, 5, 8, 15, 16, 33]),
    ) {
        let (k, n) = (layer.in_features, layer.out_features);
        let x = wave(rows * k, 0.37);
        let got = Matrix::packed(&layer).multiply(&x, rows);
        close(&got, &reference(&x, &layer.dequantize(), k, n));
    }

    #[test]
    fn float_products_are_those_of_the_stored_values(
        k in 1usize..200,
        n in 1usize..300,
        rows in prop::sample::select(vec![1usize, 2, 3, 7, 16, 20]),
        dtype in prop::sample::select(vec![Dtype::F32, Dtype::F16, Dtype::BF16]),
    ) {
        let values = wave(k * n, 0.61);
        let (bytes, stored) = store(&values, dtype);
        let x = wave(rows * k, 0.37);
        let matrix = Matrix::float(dtype, &bytes, k, n).unwrap();
        let got = matrix.multiply(&x, rows);
        close(&got, &reference(&x, &transpose(&stored, n, k), k, n));
    }
}

/// Bytes of `values` in `dtype`, and what they hold.
fn store(values: &[f32], dtype: Dtype) -> (Vec<u8>, Vec<f32>) {
    let mut bytes = Vec::new();
    let mut stored = Vec::new();
    for &value in values {
        match dtype {
            Dtype::F32 => {
                bytes.extend(value.to_le_bytes());
                stored.push(value);
            }
            Dtype::F16 => {
                bytes.extend(f16::from_f32(value).to_le_bytes());
                stored.push(f16::from_f32(value).to_f32());
            }
            _ => {
                bytes.extend(bf16::from_f32(value).to_le_bytes());
                stored.push(bf16::from_f32(value).to_f32());
            }
        }
    }
    (bytes, stored)
}

/// Every finite half, those below the normal range too.
#[test]
fn halves_are_widened_exactly() {
    for bits in 0..=u16::MAX {
        let half = f16::from_bits(bits);
        if half.is_finite() {
            let got = vectorized(|| float::f16_bits_to_f32(bits));
            assert_eq!(got.to_bits(), half.to_f32().to_bits(), "{bits:#06x}");
        }
    }
}

/// Rows do not change each other, and neither do threads: the same bits alone and together, up to
/// where the dense product takes over.
#[test]
fn a_row_is_the_same_alone_and_among_others() {
    let (k, n, rows) = (83, 101, 7);
    let layer = SolvedLayer {
        bits: Bits::Three,
        in_features: k,
        out_features: n,
        codes: (0..k * n).map(|i| (i * 7 % 8) as u8).collect(),
        scales: (0..2 * n)
            .map(|i| f16::from_f32(0.01 + i as f32 * 1e-4))
            .collect(),
        zeros: (0..2 * n).map(|i| (i % 9) as u16).collect(),
        g_idx: (0..k).map(|i| u32::from(i % 3 == 0)).collect(),
    };
    let (bytes, _) = store(&wave(k * n, 0.61), Dtype::F16);
    let x = wave(rows * k, 0.37);
    for matrix in [
        Matrix::packed(&layer),
        Matrix::float(Dtype::F16, &bytes, k, n).unwrap(),
    ] {
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
            pool.build().unwrap().install(|| matrix.multiply(&x, rows))
        };
        let all = run(1);
        assert_eq!(all, run(3));
        for (x, all) in x.chunks_exact(k).zip(all.chunks_exact(n)) {
            assert_eq!(matrix.multiply(x, 1), all);
        }
    }
}

/// The results of a processor without vector instructions, which this one does not choose by itself.
#[test]
fn the_portable_path_is_as_exact() {
    let (k, n) = (83, 101);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1);
    let pool = pool.build().unwrap();
    pool.install(|| PORTABLE.set(true));
    for bits in Bits::ALL {
        let codes = bits.max_code() as usize + 1;
        let layer = SolvedLayer {
            bits,
            in_features: k,
            out_features: n,
            codes: (0..k * n).map(|i| (i * 7 % codes) as u8).collect(),
            scales: vec![f16::from_f32(0.03); 2 * n],
            zeros: (0..2 * n).map(|i| (i % codes) as u16).collect(),
            g_idx: (0..k).map(|i| u32::from(i % 3 == 0)).collect(),
        };
        for rows in [1, 2, 20] {
            let x = wave(rows * k, 0.37);
            let got = pool.install(|| Matrix::packed(&layer).multiply(&x, rows));
            close(&got, &reference(&x, &layer.dequantize(), k, n));
        }
    }
    let (bytes, stored) = store(&wave(k * n, 0.61), Dtype::F16);
    let matrix = Matrix::float(Dtype::F16, &bytes, k, n).unwrap();
    let x = wave(3 * k, 0.37);
    let got = pool.install(|| matrix.multiply(&x, 3));
    close(&got, &reference(&x, &transpose(&stored, n, k), k, n));
}

#[test]
fn a_wrong_number_of_bytes_is_no_matrix() {
    assert!(Matrix::float(Dtype::F16, &[0; 11], 2, 3).is_none());
    assert!(Matrix::float(Dtype::I32, &[0; 24], 2, 3).is_none());
    assert!(Matrix::float(Dtype::F32, &[], 0, 3).is_none());
}
