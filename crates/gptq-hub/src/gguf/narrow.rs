//! Values of a GGUF file rounded to f16, and what that loses.

use half::f16;
use rayon::prelude::*;

use crate::gguf::dequant::{BlockType, dequantise};

/// What rounding to f16 did to the values of a kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Narrowing {
    /// Values in all.
    pub values: u64,
    /// Of these, those that are not the same in f16.
    pub changed: u64,
    /// Of these, those that became 0.
    pub zeroed: u64,
}

impl std::ops::AddAssign for Narrowing {
    fn add_assign(&mut self, other: Narrowing) {
        self.values += other.values;
        self.changed += other.changed;
        self.zeroed += other.zeroed;
    }
}

/// A value that f16 cannot hold: its position and itself.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Unfit {
    /// Position in the tensor, row-major.
    pub element: usize,
    /// The value, infinite or NaN or too large.
    pub value: f32,
}

/// Decodes whole blocks and rounds to the nearest f16, as little-endian bytes.
///
/// Fails on the first value that is not finite in f16.
pub fn to_f16_bytes(kind: BlockType, blocks: &[u8]) -> Result<(Vec<u8>, Narrowing), Unfit> {
    /// Elements decoded at a time: a multiple of every block, small enough for the L1 cache.
    const CHUNK: usize = 4096;
    let count = blocks.len() / kind.block_bytes();
    let elements = count * kind.block_elements();
    let mut bytes = vec![0u8; elements * 2];
    let chunk_bytes = CHUNK / kind.block_elements() * kind.block_bytes();
    let chunks: Vec<Result<Narrowing, Unfit>> = bytes
        .par_chunks_mut(CHUNK * 2)
        .zip(blocks.par_chunks(chunk_bytes))
        .enumerate()
        .map(|(chunk, (out, blocks))| {
            let mut values = [0.0f32; CHUNK];
            let values = &mut values[..out.len() / 2];
            dequantise(kind, blocks, values);
            round_to_f16(values, out).map_err(|unfit| Unfit {
                element: chunk * CHUNK + unfit.element,
                ..unfit
            })
        })
        .collect();
    let mut narrowing = Narrowing::default();
    for chunk in chunks {
        narrowing += chunk?;
    }
    Ok((bytes, narrowing))
}

/// Fails on the first value that f16 cannot hold.
fn round_to_f16(values: &[f32], out: &mut [u8]) -> Result<Narrowing, Unfit> {
    let mut narrowing = Narrowing {
        values: values.len() as u64,
        ..Narrowing::default()
    };
    for (element, (out, &value)) in out.chunks_exact_mut(2).zip(values).enumerate() {
        let rounded = f16::from_f32(value);
        if !rounded.is_finite() {
            return Err(Unfit { element, value });
        }
        let same = rounded.to_f32() == value;
        narrowing.changed += u64::from(!same);
        narrowing.zeroed += u64::from(!same && rounded.to_f32() == 0.0);
        out.copy_from_slice(&rounded.to_le_bytes());
    }
    Ok(narrowing)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_changes_and_what_becomes_zero_is_counted() {
        // 1e-9 once became 0 without a word
        let values = [1.0f32, 1e-9, -1e-9, 0.1, 0.0, -0.0, 6e-8];
        let bytes: Vec<u8> = values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect();
        let (_, narrowing) = to_f16_bytes(BlockType::F32, &bytes).unwrap();
        let expected = Narrowing {
            values: 7,
            changed: 4,
            zeroed: 2,
        };
        assert_eq!(narrowing, expected);
    }
}
