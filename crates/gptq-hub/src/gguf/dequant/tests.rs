use super::*;
use crate::HalfType::F16;
use crate::gguf::narrow::to_half_bytes;

/// f16 of 0.5, -2 and 1.
const HALF: [u8; 2] = [0x00, 0x38];
const MINUS_TWO: [u8; 2] = [0x00, 0xC0];
const ONE: [u8; 2] = [0x00, 0x3C];

fn decoded(kind: BlockType, parts: &[&[u8]]) -> Vec<f32> {
    let block = parts.concat();
    assert_eq!(block.len(), kind.block_bytes());
    let mut out = vec![f32::NAN; kind.block_elements()];
    dequantize(kind, &block, &mut out);
    out
}

/// Byte i is `i | (15 - i) << 4`: codes 0..16 in the low halves, 15..=0 in the high ones.
fn ramp() -> [u8; 16] {
    std::array::from_fn(|i| (i | (15 - i) << 4) as u8)
}

#[test]
fn plain_types() {
    assert_eq!(decoded(BlockType::F32, &[&1.5f32.to_le_bytes()]), [1.5]);
    assert_eq!(decoded(BlockType::F16, &[&MINUS_TWO]), [-2.0]);
    // bf16 is the upper half of an f32: 0xC040 0000 is -3
    assert_eq!(decoded(BlockType::BF16, &[&[0x40, 0xC0]]), [-3.0]);
}

#[test]
fn q4_0_subtracts_eight() {
    let w = decoded(BlockType::Q4_0, &[&HALF, &ramp()]);
    assert_eq!((w[0], w[1], w[15]), (-4.0, -3.5, 3.5));
    assert_eq!((w[16], w[17], w[31]), (3.5, 3.0, -4.0));
}

#[test]
fn q4_1_adds_the_minimum() {
    let w = decoded(BlockType::Q4_1, &[&HALF, &MINUS_TWO, &ramp()]);
    assert_eq!((w[0], w[1], w[15]), (-2.0, -1.5, 5.5));
    assert_eq!((w[16], w[31]), (5.5, -2.0));
}

#[test]
fn q5_takes_the_fifth_bit_from_high() {
    // bits 0, 15, 16 and 31 are set
    let high = 0x8001_8001u32.to_le_bytes();
    let w = decoded(BlockType::Q5_0, &[&HALF, &high, &ramp()]);
    // codes 16, 1, 31, 31, 14, 16 minus 16, halved
    assert_eq!((w[0], w[1], w[15]), (0.0, -7.5, 7.5));
    assert_eq!((w[16], w[17], w[31]), (7.5, -1.0, 0.0));
    let w = decoded(BlockType::Q5_1, &[&HALF, &MINUS_TWO, &high, &ramp()]);
    assert_eq!((w[0], w[1], w[15]), (6.0, -1.5, 13.5));
    assert_eq!((w[16], w[17], w[31]), (13.5, 5.0, 6.0));
}

#[test]
fn q8_0_is_signed() {
    let mut codes = [0u8; 32];
    (codes[0], codes[1], codes[31]) = (0x80, 0x7F, 0xFF);
    let w = decoded(BlockType::Q8_0, &[&HALF, &codes]);
    assert_eq!((w[0], w[1], w[2], w[31]), (-64.0, 63.5, 0.0, -0.5));
}

/// Scales 1, 2, 3, 4, 21, 38, 55, 8 and minima 5, 6, 7, 0, 41, 26, 11, 60.
const K_SCALES: [u8; 12] = [
    1 | 1 << 6, // 21 = 5 + 16
    2 | 2 << 6, // 38 = 6 + 32
    3 | 3 << 6, // 55 = 7 + 48
    4,          // 8
    5 | 2 << 6, // 41 = 9 + 32
    6 | 1 << 6, // 26 = 10 + 16
    7,          // 11
    3 << 6,     // 60 = 12 + 48
    5 | 9 << 4,
    6 | 10 << 4,
    7 | 11 << 4,
    8 | 12 << 4,
];

#[test]
fn k_scales_are_put_together_from_six_bits() {
    let pairs: Vec<_> = (0..8).map(|s| scale_and_min(&K_SCALES, s)).collect();
    let scales: Vec<f32> = pairs.iter().map(|pair| pair.0).collect();
    let minima: Vec<f32> = pairs.iter().map(|pair| pair.1).collect();
    assert_eq!(scales, [1.0, 2.0, 3.0, 4.0, 21.0, 38.0, 55.0, 8.0]);
    assert_eq!(minima, [5.0, 6.0, 7.0, 0.0, 41.0, 26.0, 11.0, 60.0]);
}

#[test]
fn q4_k_scales_each_sub_block() {
    let mut codes = [0u8; 128];
    codes[0] = 0xA3; // sub-block 0: 3, sub-block 1: 10
    codes[64 + 31] = 0x4F; // last elements of sub-blocks 4 and 5: 15 and 4
    codes[127] = 0x70; // of 6 and 7: 0 and 7
    let w = decoded(BlockType::Q4_K, &[&HALF, &ONE, &K_SCALES, &codes]);
    assert_eq!((w[0], w[1]), (0.5 * 3.0 - 5.0, -5.0));
    assert_eq!((w[32], w[33]), (1.0 * 10.0 - 6.0, -6.0));
    assert_eq!(w[4 * 32 + 31], 10.5 * 15.0 - 41.0);
    assert_eq!(w[5 * 32 + 31], 19.0 * 4.0 - 26.0);
    assert_eq!((w[6 * 32 + 31], w[255]), (-11.0, 4.0 * 7.0 - 60.0));
}

#[test]
fn q5_k_takes_bit_s_of_high_for_sub_block_s() {
    let mut codes = [0u8; 128];
    codes[0] = 0xA3;
    codes[127] = 0x70;
    let mut high = [0u8; 32];
    high[0] = 0b01; // sub-block 0: 3 + 16; sub-block 1 stays 10
    high[31] = 0b1100_0000; // sub-blocks 6 and 7: 16 and 7 + 16
    let w = decoded(BlockType::Q5_K, &[&HALF, &ONE, &K_SCALES, &high, &codes]);
    assert_eq!((w[0], w[32]), (0.5 * 19.0 - 5.0, 1.0 * 10.0 - 6.0));
    assert_eq!(w[6 * 32 + 31], 27.5 * 16.0 - 11.0);
    assert_eq!(w[255], 4.0 * 23.0 - 60.0);
}

#[test]
fn q6_k_joins_low_and_high_bits() {
    let mut low = [0u8; 128];
    let mut high = [0u8; 64];
    let mut scales = [1u8; 16];
    low[0] = 0x21; // quarter 0: 1, quarter 2: 2
    low[32] = 0x43; // quarter 1: 3, quarter 3: 4
    high[0] = 0b11_10_01_00; // quarters 0 to 3: 0, 1, 2, 3
    low[127] = 0xF5; // last elements of quarters 5 and 7
    high[63] = 0b11_00_10_00;
    scales[1] = 0xFE; // elements 16..32: -2
    scales[15] = 3; // the last 16
    let w = decoded(BlockType::Q6_K, &[&low, &high, &scales, &HALF]);
    assert_eq!((w[0], w[16]), (0.5 * (1.0 - 32.0), -1.0 * -32.0));
    assert_eq!(w[32], 0.5 * (3.0 + 16.0 - 32.0));
    assert_eq!(w[64], 0.5 * (2.0 + 32.0 - 32.0));
    assert_eq!(w[96], 0.5 * (4.0 + 48.0 - 32.0));
    assert_eq!(w[5 * 32 + 31], 0.5 * (5.0 + 32.0 - 32.0));
    assert_eq!(w[255], 1.5 * (15.0 + 48.0 - 32.0));
}

#[test]
fn f16_rounding_names_the_first_value_that_does_not_fit() {
    let mut values = vec![0.1f32; 10_000];
    (values[9_000], values[5_000]) = (f32::NAN, 65_520.0);
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    let unfit = to_half_bytes(BlockType::F32, &bytes, F16, 0.0).unwrap_err();
    assert_eq!((unfit.element, unfit.value), (5_000, 65_520.0));
    let (half, _) = to_half_bytes(BlockType::F32, &bytes[..40], F16, 0.0).unwrap();
    assert_eq!(half[..2], f16::from_f32(0.1).to_le_bytes());
    assert_eq!(half.len(), 20);
}
