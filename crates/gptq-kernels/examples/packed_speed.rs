//! How fast this processor multiplies packed and sixteen-bit weights with few and many rows, beside
//! the rate at which it reads memory: `packed_speed [K N]`.
#![allow(clippy::print_stdout)]

use std::time::Instant;

use gptq_kernels::{Matrix, multiply, vectorized};
use gptq_types::{Bits, Dtype, SolvedLayer};
use half::f16;
use rayon::prelude::*;

/// More than any cache: matrices are gone through in turn until so many bytes are read.
const WORKING_SET: usize = 256 << 20;
const GROUP: usize = 64;

fn main() {
    let mut sizes = std::env::args()
        .skip(1)
        .map(|arg| arg.parse().expect("a number"));
    let (k, n) = (sizes.next().unwrap_or(2048), sizes.next().unwrap_or(2048));
    println!(
        "{k} x {n}, group {GROUP}, {} threads",
        rayon::current_num_threads()
    );
    println!("memory: {:.1} GB/s", read_rate());
    let bytes: Vec<u8> = (0..k * n)
        .flat_map(|i| f16::from_f32((i % 97) as f32 * 0.01 - 0.5).to_le_bytes())
        .collect();
    let half = Matrix::float(Dtype::F16, &bytes, k, n).expect("sizes agree");
    time("f16", half, k, n);
    let half = Matrix::float(Dtype::BF16, &bytes, k, n).expect("sizes agree");
    time("bf16", half, k, n);
    for bits in Bits::ALL {
        time(
            &format!("{bits}-bit"),
            Matrix::packed(&layer(bits, k, n)),
            k,
            n,
        );
    }
    dense(k, n);
}

fn layer(bits: Bits, k: usize, n: usize) -> SolvedLayer {
    let groups = k.div_ceil(GROUP);
    SolvedLayer {
        bits,
        in_features: k,
        out_features: n,
        codes: (0..k * n)
            .map(|i| (i * 7) as u8 & bits.max_code() as u8)
            .collect(),
        scales: vec![f16::from_f32(0.01); groups * n],
        zeros: vec![1 << (bits.width() - 1); groups * n],
        g_idx: (0..k).map(|k| (k / GROUP) as u32).collect(),
    }
}

/// GB/s of all threads summing what no cache holds.
fn read_rate() -> f64 {
    let data = vec![1.0f32; WORKING_SET / 4];
    let sum = |part: &[f32]| {
        vectorized(|| {
            let mut lanes = [0.0f32; 64];
            for chunk in part.as_chunks::<64>().0 {
                lanes.iter_mut().zip(chunk).for_each(|(l, x)| *l += x);
            }
            lanes.iter().sum::<f32>()
        })
    };
    let seconds = best(|| {
        let total: f32 = data.par_chunks(1 << 18).map(sum).sum();
        assert!(total > 0.0);
    });
    WORKING_SET as f64 / seconds / 1e9
}

fn best(mut run: impl FnMut()) -> f64 {
    (0..7)
        .map(|_| {
            let start = Instant::now();
            run();
            start.elapsed().as_secs_f64()
        })
        .fold(f64::INFINITY, f64::min)
}

fn time(name: &str, matrix: Matrix, k: usize, n: usize) {
    let copies: Vec<Matrix> = vec![matrix; (WORKING_SET / (k * n * 2)).max(1)];
    let bytes = copies[0].bytes();
    print!("{name:>6}:");
    for rows in [1, 2, 4, 8, 15, 16, 64, 512] {
        let x: Vec<f32> = (0..rows * k).map(|i| (i % 13) as f32 * 0.1).collect();
        let used = if rows > 16 { 1 } else { copies.len() };
        let seconds = best(|| {
            rayon::scope(|_| {
                for matrix in &copies[..used] {
                    assert_eq!(matrix.multiply(&x, rows).len(), rows * n);
                }
            });
        }) / used as f64;
        match rows {
            1 => print!(
                " {:.0} us {:.1} GB/s {:.1} G weights/s |",
                seconds * 1e6,
                bytes as f64 / seconds / 1e9,
                (k * n) as f64 / seconds / 1e9
            ),
            _ => print!(" {rows}: {:.0} us", seconds * 1e6),
        }
    }
    println!();
}

fn dense(k: usize, n: usize) {
    let weight = vec![0.5f32; k * n];
    print!("   f32:");
    for rows in [16, 64, 512] {
        let x = vec![0.25f32; rows * k];
        let mut out = vec![0.0; rows * n];
        let seconds = best(|| multiply(&mut out, &x, &weight, rows, k, n));
        print!(" {rows}: {:.0} us", seconds * 1e6);
    }
    println!();
}
