//! Values of a GGUF file rounded to f16 or bf16, and what that loses.

use rayon::prelude::*;

use crate::HalfType;
use crate::gguf::dequant::{BlockType, dequantize};

/// Effects of rounding values of one storage type to a half type.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Narrowing {
    /// Values in all.
    pub values: u64,
    /// Values that rounding changed.
    pub changed: u64,
    /// Values that became 0.
    pub zeroed: u64,
}

impl std::ops::AddAssign for Narrowing {
    fn add_assign(&mut self, other: Narrowing) {
        self.values += other.values;
        self.changed += other.changed;
        self.zeroed += other.zeroed;
    }
}

/// A value that the half cannot hold: its position and itself.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Unfit {
    /// Position in the tensor, row-major.
    pub element: usize,
    /// The value, infinite or NaN or too large.
    pub value: f32,
}

/// Decodes whole blocks, adds `shift` and rounds to the nearest number of `half`, as little-endian
/// bytes.
///
/// Fails on the first value that is not finite there.
pub fn to_half_bytes(
    kind: BlockType,
    blocks: &[u8],
    half: HalfType,
    shift: f32,
) -> Result<(Vec<u8>, Narrowing), Unfit> {
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
            dequantize(kind, blocks, values);
            if shift != 0.0 {
                values.iter_mut().for_each(|value| *value += shift);
            }
            rounded(values, half, out).map_err(|unfit| Unfit {
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

/// Fails on the first value that the half cannot hold.
fn rounded(values: &[f32], half: HalfType, out: &mut [u8]) -> Result<Narrowing, Unfit> {
    let mut narrowing = Narrowing {
        values: values.len() as u64,
        ..Narrowing::default()
    };
    for (element, (out, &value)) in out.chunks_exact_mut(2).zip(values).enumerate() {
        let (bits, kept) = half.round(value);
        if !kept.is_finite() {
            return Err(Unfit { element, value });
        }
        narrowing.changed += u64::from(kept != value);
        narrowing.zeroed += u64::from(kept != value && kept == 0.0);
        out.copy_from_slice(&bits.to_le_bytes());
    }
    Ok(narrowing)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_changes_and_what_becomes_zero_is_counted() {
        // 1e-9 once silently became 0
        let values = [1.0f32, 1e-9, -1e-9, 0.1, 0.0, -0.0, 6e-8];
        let bytes: Vec<u8> = values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect();
        let narrowed = |half| to_half_bytes(BlockType::F32, &bytes, half, 0.0).unwrap().1;
        let expected = Narrowing {
            values: 7,
            changed: 4,
            zeroed: 2,
        };
        assert_eq!(narrowed(HalfType::F16), expected);
        // its exponent is that of f32: nothing is too small
        let expected = Narrowing {
            zeroed: 0,
            ..expected
        };
        assert_eq!(narrowed(HalfType::Bf16), expected);
    }

    #[test]
    fn a_shift_comes_before_rounding() {
        let stored: Vec<u8> = [1.0f32, 1.0 + 3.0 / 4096.0, 70_001.0]
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect();
        let (bytes, narrowing) =
            to_half_bytes(BlockType::F32, &stored, HalfType::Bf16, -1.0).unwrap();
        let halves = bytes.as_chunks::<2>().0.iter();
        let values: Vec<f32> = halves
            .map(|half| half::bf16::from_le_bytes(*half).to_f32())
            .collect();
        // rounded first, the second would be 0
        assert_eq!(values, [0.0, 3.0 / 4096.0, 70_144.0]);
        assert_eq!(narrowing.changed, 1);
        let unfit = to_half_bytes(BlockType::F32, &stored, HalfType::F16, 0.0);
        assert_eq!(unfit.unwrap_err().element, 2);
    }
}
