//! GGUF block types turned into f32, with the arithmetic of llama.cpp's reference code: one
//! multiplication by the scale and one addition of the minimum, each rounded to f32, never fused.
//!
//! Every stored number is little-endian. `d` and `m` are f16: scale and minimum.

use std::fmt;

use bytemuck::{Pod, Zeroable};
use half::{bf16, f16};

/// Elements of the small blocks.
const SMALL: usize = 32;
/// Elements of the super-blocks (`_K`).
const SUPER: usize = 256;

/// 4 bits: `w = d * (q - 8)`; element i in the low half of `codes[i]`, i + 16 in the high half.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Q4_0 {
    d: [u8; 2],
    codes: [u8; SMALL / 2],
}
const _: () = assert!(size_of::<Q4_0>() == 18);

/// 4 bits: `w = d * q + m`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Q4_1 {
    d: [u8; 2],
    m: [u8; 2],
    codes: [u8; SMALL / 2],
}
const _: () = assert!(size_of::<Q4_1>() == 20);

/// 5 bits: `w = d * (q - 16)`; bit i of `high` is the fifth bit of element i.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Q5_0 {
    d: [u8; 2],
    high: [u8; 4],
    codes: [u8; SMALL / 2],
}
const _: () = assert!(size_of::<Q5_0>() == 22);

/// 5 bits: `w = d * q + m`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Q5_1 {
    d: [u8; 2],
    m: [u8; 2],
    high: [u8; 4],
    codes: [u8; SMALL / 2],
}
const _: () = assert!(size_of::<Q5_1>() == 24);

/// 8 bits: `w = d * q`, q signed.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Q8_0 {
    d: [u8; 2],
    codes: [i8; SMALL],
}
const _: () = assert!(size_of::<Q8_0>() == 34);

/// 4 bits in 8 sub-blocks of 32: `w = (d * scale) * q - (dmin * min)`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Q4K {
    d: [u8; 2],
    dmin: [u8; 2],
    scales: [u8; 12],
    codes: [u8; SUPER / 2],
}
const _: () = assert!(size_of::<Q4K>() == 144);

/// 5 bits in 8 sub-blocks of 32: like `Q4K`; bit s of `high[i]` is the fifth bit of element i of
/// sub-block s.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Q5K {
    d: [u8; 2],
    dmin: [u8; 2],
    scales: [u8; 12],
    high: [u8; SUPER / 8],
    codes: [u8; SUPER / 2],
}
const _: () = assert!(size_of::<Q5K>() == 176);

/// 6 bits in 16 sub-blocks of 16: `w = (d * scale) * (q - 32)`, scales signed.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Q6K {
    low: [u8; SUPER / 2],
    high: [u8; SUPER / 4],
    scales: [i8; SUPER / 16],
    d: [u8; 2],
}
const _: () = assert!(size_of::<Q6K>() == 210);

/// Storage types that can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs, non_camel_case_types)]
pub enum BlockType {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q4_K,
    Q5_K,
    Q6_K,
}

/// Names of the types that are known and not read, by their number in the file.
const OTHERS: [(u32, &str); 24] = [
    (9, "Q8_1"),
    (10, "Q2_K"),
    (11, "Q3_K"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (31, "Q4_0_4_4"),
    (32, "Q4_0_4_8"),
    (33, "Q4_0_8_8"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (39, "MXFP4"),
];

impl BlockType {
    /// The type of a number in the file; the error is the name of a type that is not read.
    pub fn from_id(id: u32) -> Result<Self, String> {
        Ok(match id {
            0 => BlockType::F32,
            1 => BlockType::F16,
            2 => BlockType::Q4_0,
            3 => BlockType::Q4_1,
            6 => BlockType::Q5_0,
            7 => BlockType::Q5_1,
            8 => BlockType::Q8_0,
            12 => BlockType::Q4_K,
            13 => BlockType::Q5_K,
            14 => BlockType::Q6_K,
            30 => BlockType::BF16,
            _ => {
                let known = OTHERS.iter().find(|(number, _)| *number == id);
                return Err(known.map_or_else(|| id.to_string(), |(_, name)| name.to_string()));
            }
        })
    }

    /// Elements that are stored together.
    pub fn block_elements(self) -> usize {
        match self {
            BlockType::F32 | BlockType::F16 | BlockType::BF16 => 1,
            BlockType::Q4_0
            | BlockType::Q4_1
            | BlockType::Q5_0
            | BlockType::Q5_1
            | BlockType::Q8_0 => SMALL,
            BlockType::Q4_K | BlockType::Q5_K | BlockType::Q6_K => SUPER,
        }
    }

    /// Bytes of one block.
    pub fn block_bytes(self) -> usize {
        match self {
            BlockType::F32 => 4,
            BlockType::F16 | BlockType::BF16 => 2,
            BlockType::Q4_0 => size_of::<Q4_0>(),
            BlockType::Q4_1 => size_of::<Q4_1>(),
            BlockType::Q5_0 => size_of::<Q5_0>(),
            BlockType::Q5_1 => size_of::<Q5_1>(),
            BlockType::Q8_0 => size_of::<Q8_0>(),
            BlockType::Q4_K => size_of::<Q4K>(),
            BlockType::Q5_K => size_of::<Q5K>(),
            BlockType::Q6_K => size_of::<Q6K>(),
        }
    }
}

impl fmt::Display for BlockType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

/// Decodes whole blocks; bytes beyond the last whole block, or beyond `out`, are left alone.
///
/// `blocks` holds `n * block_bytes` bytes, `out` `n * block_elements` values.
pub fn dequantize(kind: BlockType, blocks: &[u8], out: &mut [f32]) {
    match kind {
        BlockType::F32 => plain(blocks, out, f32::from_le_bytes),
        BlockType::F16 => plain(blocks, out, |bytes| f16::from_le_bytes(bytes).to_f32()),
        BlockType::BF16 => plain(blocks, out, |bytes| bf16::from_le_bytes(bytes).to_f32()),
        BlockType::Q4_0 => each(blocks, out, q4_0),
        BlockType::Q4_1 => each(blocks, out, q4_1),
        BlockType::Q5_0 => each(blocks, out, q5_0),
        BlockType::Q5_1 => each(blocks, out, q5_1),
        BlockType::Q8_0 => each(blocks, out, q8_0),
        BlockType::Q4_K => each(blocks, out, q4_k),
        BlockType::Q5_K => each(blocks, out, q5_k),
        BlockType::Q6_K => each(blocks, out, q6_k),
    }
}

fn plain<const N: usize>(bytes: &[u8], out: &mut [f32], decode: impl Fn([u8; N]) -> f32) {
    for (value, bytes) in out.iter_mut().zip(bytes.as_chunks::<N>().0) {
        *value = decode(*bytes);
    }
}

fn each<B: Pod, const N: usize>(bytes: &[u8], out: &mut [f32], decode: fn(&B, &mut [f32; N])) {
    let blocks = bytes.chunks_exact(size_of::<B>());
    for (out, block) in out.as_chunks_mut::<N>().0.iter_mut().zip(blocks) {
        // all blocks consist of single bytes, so any address will do
        decode(bytemuck::from_bytes(block), out);
    }
}

fn real(bytes: [u8; 2]) -> f32 {
    f16::from_le_bytes(bytes).to_f32()
}

/// The 4-bit codes of a small block: low halves first, then high halves.
fn halves(codes: &[u8; SMALL / 2]) -> [u8; SMALL] {
    std::array::from_fn(|i| match i < SMALL / 2 {
        true => codes[i] & 0xF,
        false => codes[i - SMALL / 2] >> 4,
    })
}

/// [`halves`] with a fifth bit each.
fn halves_with_fifth(codes: &[u8; SMALL / 2], high: [u8; 4]) -> [u8; SMALL] {
    let high = u32::from_le_bytes(high);
    let mut wide = halves(codes);
    for (i, code) in wide.iter_mut().enumerate() {
        *code |= ((high >> i & 1) as u8) << 4;
    }
    wide
}

fn q4_0(block: &Q4_0, out: &mut [f32; SMALL]) {
    let d = real(block.d);
    for (w, q) in out.iter_mut().zip(halves(&block.codes)) {
        *w = d * (f32::from(q) - 8.0);
    }
}

fn q4_1(block: &Q4_1, out: &mut [f32; SMALL]) {
    let (d, m) = (real(block.d), real(block.m));
    for (w, q) in out.iter_mut().zip(halves(&block.codes)) {
        *w = d * f32::from(q) + m;
    }
}

fn q5_0(block: &Q5_0, out: &mut [f32; SMALL]) {
    let d = real(block.d);
    let codes = halves_with_fifth(&block.codes, block.high);
    for (w, q) in out.iter_mut().zip(codes) {
        *w = d * (f32::from(q) - 16.0);
    }
}

fn q5_1(block: &Q5_1, out: &mut [f32; SMALL]) {
    let (d, m) = (real(block.d), real(block.m));
    let codes = halves_with_fifth(&block.codes, block.high);
    for (w, q) in out.iter_mut().zip(codes) {
        *w = d * f32::from(q) + m;
    }
}

fn q8_0(block: &Q8_0, out: &mut [f32; SMALL]) {
    let d = real(block.d);
    for (w, &q) in out.iter_mut().zip(&block.codes) {
        *w = d * f32::from(q);
    }
}

/// The 6-bit scale and minimum of sub-block `s`, 0 to 7, out of twelve bytes:
///
/// ```text
/// byte 0..4   scale s     in bits 0-5, bits 4-5 of scale s + 4 in bits 6-7
/// byte 4..8   minimum s   in bits 0-5, bits 4-5 of minimum s + 4 in bits 6-7
/// byte 8..12  scale s + 4, bits 0-3, below minimum s + 4, bits 0-3
/// ```
fn scale_and_min(scales: &[u8; 12], s: usize) -> (f32, f32) {
    let (scale, min) = if s < 4 {
        (scales[s] & 63, scales[s + 4] & 63)
    } else {
        let low = scales[s + 4];
        (
            (low & 0xF) | (scales[s - 4] >> 6) << 4,
            (low >> 4) | (scales[s] >> 6) << 4,
        )
    };
    (f32::from(scale), f32::from(min))
}

/// Decodes the eight sub-blocks; two neighbours share 32 bytes of codes, low and high halves.
fn k_blocks(
    (d, dmin): (f32, f32),
    scales: &[u8; 12],
    codes: &[u8; SUPER / 2],
    fifth: impl Fn(usize, usize) -> u8,
    out: &mut [f32; SUPER],
) {
    for (s, out) in out.chunks_exact_mut(SMALL).enumerate() {
        let (scale, min) = scale_and_min(scales, s);
        let (scale, min) = (d * scale, dmin * min);
        let codes = &codes[s / 2 * SMALL..][..SMALL];
        for (i, (w, &pair)) in out.iter_mut().zip(codes).enumerate() {
            let code = (pair >> (s % 2 * 4) & 0xF) | fifth(s, i);
            *w = scale * f32::from(code) - min;
        }
    }
}

fn q4_k(block: &Q4K, out: &mut [f32; SUPER]) {
    let d = (real(block.d), real(block.dmin));
    k_blocks(d, &block.scales, &block.codes, |_, _| 0, out);
}

fn q5_k(block: &Q5K, out: &mut [f32; SUPER]) {
    let d = (real(block.d), real(block.dmin));
    let fifth = |s: usize, i: usize| (block.high[i] >> s & 1) << 4;
    k_blocks(d, &block.scales, &block.codes, fifth, out);
}

/// Each half of 128 elements has 64 bytes of low and 32 bytes of high bits; quarter j of it takes
/// the low bits at `32 * (j % 2)`, half `j / 2`, and bits `2j` of the high ones.
fn q6_k(block: &Q6K, out: &mut [f32; SUPER]) {
    let d = real(block.d);
    for (quarter, out) in out.chunks_exact_mut(SMALL).enumerate() {
        let (half, j) = (quarter / 4, quarter % 4);
        let low = &block.low[half * 64 + j % 2 * 32..][..SMALL];
        let high = &block.high[half * 32..][..SMALL];
        for (i, w) in out.iter_mut().enumerate() {
            let code = (low[i] >> (j / 2 * 4) & 0xF) | (high[i] >> (j * 2) & 3) << 4;
            let scale = d * f32::from(block.scales[quarter * 2 + i / 16]);
            *w = scale * (f32::from(code) - 32.0);
        }
    }
}

#[cfg(test)]
mod tests;
