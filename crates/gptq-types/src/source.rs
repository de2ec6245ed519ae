//! Sources of weights, independent of how they are stored.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Element types that occur in checkpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[allow(missing_docs)]
pub enum Dtype {
    F64,
    F32,
    F16,
    BF16,
    I64,
    I32,
    I16,
    I8,
    U8,
    /// Eight-bit floats without infinities, stored with scales in FP8 checkpoints.
    F8E4M3,
    Bool,
}

impl Dtype {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Dtype::F64 | Dtype::I64 => 8,
            Dtype::F32 | Dtype::I32 => 4,
            Dtype::F16 | Dtype::BF16 | Dtype::I16 => 2,
            Dtype::I8 | Dtype::U8 | Dtype::F8E4M3 | Dtype::Bool => 1,
        }
    }

    /// The name in a safetensors header.
    pub fn safetensors_name(self) -> &'static str {
        match self {
            Dtype::F64 => "F64",
            Dtype::F32 => "F32",
            Dtype::F16 => "F16",
            Dtype::BF16 => "BF16",
            Dtype::I64 => "I64",
            Dtype::I32 => "I32",
            Dtype::I16 => "I16",
            Dtype::I8 => "I8",
            Dtype::U8 => "U8",
            Dtype::F8E4M3 => "F8_E4M3",
            Dtype::Bool => "BOOL",
        }
    }

    /// The inverse of [`Dtype::safetensors_name`].
    pub fn from_safetensors_name(name: &str) -> Option<Self> {
        [
            Dtype::F64,
            Dtype::F32,
            Dtype::F16,
            Dtype::BF16,
            Dtype::I64,
            Dtype::I32,
            Dtype::I16,
            Dtype::I8,
            Dtype::U8,
            Dtype::F8E4M3,
            Dtype::Bool,
        ]
        .into_iter()
        .find(|dtype| dtype.safetensors_name() == name)
    }

    /// Whether the type holds model weights (f16, bf16, f32).
    pub fn is_weight(self) -> bool {
        matches!(self, Dtype::F32 | Dtype::F16 | Dtype::BF16)
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.safetensors_name())
    }
}

/// Type and shape of a stored tensor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorInfo {
    /// Element type on disk.
    pub dtype: Dtype,
    /// Row-major shape.
    pub shape: Vec<usize>,
}

impl TensorInfo {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Bytes on disk.
    pub fn bytes(&self) -> usize {
        self.elements() * self.dtype.size()
    }
}

/// A tensor that could not be had.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum SourceError {
    #[error("tensor `{name}` is missing from {place}")]
    Missing { name: String, place: String },
    #[error("tensor `{name}` in {place} has shape {found:?}, expected {expected:?}")]
    Shape {
        name: String,
        place: String,
        found: Vec<usize>,
        expected: Vec<usize>,
    },
    #[error("tensor `{name}` in {place} has type {found}, expected {expected}")]
    Type {
        name: String,
        place: String,
        found: Dtype,
        expected: &'static str,
    },
    #[error("tensor `{name}` in {place} holds {value} at element {index}")]
    NotFinite {
        name: String,
        place: String,
        value: f32,
        index: usize,
    },
    #[error("tensor `{name}` in {path}: {source}")]
    Read {
        name: String,
        path: String,
        source: std::io::Error,
    },
    #[error("tensor `{name}`: {reason}")]
    Invalid { name: String, reason: String },
}

/// Named tensors, read one at a time.
pub trait TensorSource: Send + Sync {
    /// The location of the tensors, for error messages.
    fn place(&self) -> String;

    /// All names, sorted.
    fn names(&self) -> Vec<String>;

    /// Type and shape, if the name exists.
    fn info(&self, name: &str) -> Option<TensorInfo>;

    /// The stored bytes, little-endian, row-major.
    fn bytes(&self, name: &str) -> Result<Vec<u8>, SourceError>;

    /// Fills `out` with stored bytes from `offset` on.
    fn read_at(&self, name: &str, offset: usize, out: &mut [u8]) -> Result<(), SourceError> {
        let bytes = self.bytes(name)?;
        match bytes.get(offset..offset + out.len()) {
            Some(part) => {
                out.copy_from_slice(part);
                Ok(())
            }
            None => Err(SourceError::Invalid {
                name: name.to_string(),
                reason: format!("has no bytes {offset}..{}", offset + out.len()),
            }),
        }
    }

    /// Notes on tensors that were not read as they are stored, a sentence each, for the run record.
    fn notes(&self) -> Vec<String> {
        Vec::new()
    }

    /// Type and shape, or an error that names the place.
    fn require(&self, name: &str) -> Result<TensorInfo, SourceError> {
        self.info(name).ok_or_else(|| SourceError::Missing {
            name: name.to_string(),
            place: self.place(),
        })
    }
}
