//! Gigabytes of f16 weights packed and unpacked per second on one core, for every width.
//!
//! `cargo run --release -p gptq-packer --example throughput`
#![allow(clippy::print_stdout)]

use std::time::Instant;

use gptq_packer::{pack, unpack};
use gptq_types::{Bits, CheckpointFormat, SolvedLayer};
use half::f16;

const SIZE: usize = 4096;
const GROUP: usize = 128;
const ROUNDS: usize = 9;

fn main() {
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(1)
        .build()
        .expect("a pool of one thread");
    println!("{SIZE}x{SIZE}, group {GROUP}, best of {ROUNDS}, one thread");
    println!("bits  pack GB/s  unpack GB/s  (f16 weights)");
    for bits in Bits::ALL {
        let layer = layer(bits);
        let format = CheckpointFormat::Gptq;
        let packed = pack(&layer, format).expect("a layer that fits");
        let pack_speed = pool.install(|| best(|| pack(&layer, format).is_ok()));
        let unpack_speed = pool.install(|| best(|| unpack(&packed, format).is_ok()));
        println!("{bits:>4}  {pack_speed:>9.2}  {unpack_speed:>11.2}");
    }
}

fn best(mut work: impl FnMut() -> bool) -> f64 {
    let seconds = (0..ROUNDS)
        .map(|_| {
            let start = Instant::now();
            assert!(work());
            start.elapsed().as_secs_f64()
        })
        .fold(f64::INFINITY, f64::min);
    (SIZE * SIZE * 2) as f64 / seconds / 1e9
}

fn layer(bits: Bits) -> SolvedLayer {
    let groups = SIZE / GROUP;
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        ((state >> 16) & bits.max_code()) as u8
    };
    SolvedLayer {
        bits,
        in_features: SIZE,
        out_features: SIZE,
        codes: (0..SIZE * SIZE).map(|_| next()).collect(),
        scales: vec![f16::from_f32(0.01); groups * SIZE],
        zeros: (0..groups * SIZE).map(|_| u16::from(next()) + 1).collect(),
        g_idx: (0..SIZE).map(|k| (k / GROUP) as u32).collect(),
    }
}
