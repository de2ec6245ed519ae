//! The two halves of an f32 in which model folders hold their weights.

use gptq_types::Dtype;
use half::{bf16, f16};

/// The element type of the weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HalfType {
    /// IEEE half precision.
    F16,
    /// The upper half of an f32.
    Bf16,
}

impl HalfType {
    /// The name in config.json: `float16` or `bfloat16`.
    pub fn name(self) -> &'static str {
        match self {
            HalfType::F16 => "float16",
            HalfType::Bf16 => "bfloat16",
        }
    }

    /// The type in a tensor file.
    pub fn dtype(self) -> Dtype {
        match self {
            HalfType::F16 => Dtype::F16,
            HalfType::Bf16 => Dtype::BF16,
        }
    }

    /// The bits of `value`, rounded.
    pub(crate) fn bits(self, value: f64) -> u16 {
        match self {
            HalfType::F16 => f16::from_f64(value).to_bits(),
            HalfType::Bf16 => bf16::from_f64(value).to_bits(),
        }
    }

    /// The bits of `value`, rounded, and what they stand for.
    pub(crate) fn round(self, value: f32) -> (u16, f32) {
        match self {
            HalfType::F16 => {
                let half = f16::from_f32(value);
                (half.to_bits(), half.to_f32())
            }
            HalfType::Bf16 => {
                let half = bf16::from_f32(value);
                (half.to_bits(), half.to_f32())
            }
        }
    }
}
