//! Weights in the type of the file, for runners that keep all of them resident.

use gptq_model::{LinearSpec, LinearValues, ModelError};
use gptq_types::{Dtype, SolvedLayer, SourceError};

use crate::OpenedModel;

/// A linear as its file has it; `K` input and `N` output features.
pub struct StoredLinear {
    /// The weight.
    pub weight: StoredWeight,
    /// `[N]`.
    pub bias: Option<Vec<f32>>,
}

/// The weight of a linear, not widened.
pub enum StoredWeight {
    /// Codes, scales and zeros.
    Packed(SolvedLayer),
    /// `[N, K]` row-major.
    Float(StoredMatrix),
}

/// A float matrix with finite values, row-major and little-endian.
pub struct StoredMatrix {
    /// F16, BF16 or F32.
    pub dtype: Dtype,
    /// All values.
    pub bytes: Vec<u8>,
}

impl StoredMatrix {
    /// Values.
    pub fn elements(&self) -> usize {
        self.bytes.len() / self.dtype.size()
    }
}

impl OpenedModel {
    /// Presence and shape of every tensor that the architecture needs, from headers alone.
    pub fn check(&self) -> Result<(), ModelError> {
        self.spec.check_tensors(self.weights.as_ref())
    }

    /// A linear of the model. One checkpoint may hold packed and plain linears.
    pub fn linear(&self, linear: &LinearSpec) -> Result<StoredLinear, SourceError> {
        let (layer, shape, bias) = (&linear.name, linear.shape(), linear.bias);
        if let Some(packed) = &self.packed
            && let Some(solved) = packed.layer(layer, shape)?
        {
            return Ok(StoredLinear {
                weight: StoredWeight::Packed(solved),
                bias: self.weights.bias(layer, bias)?,
            });
        }
        let linear = self.weights.linear_as_stored(layer, shape, bias)?;
        let LinearValues::Stored { dtype, bytes } = linear.weight else {
            return Err(SourceError::Invalid {
                name: layer.to_string(),
                reason: "is neither packed nor stored as floats".to_string(),
            });
        };
        Ok(StoredLinear {
            weight: StoredWeight::Float(StoredMatrix { dtype, bytes }),
            bias: linear.bias,
        })
    }

    /// A norm's weight or another vector by its full name, such as
    /// `model.layers.0.input_layernorm.weight`.
    pub fn vector(&self, name: &str) -> Result<Vec<f32>, SourceError> {
        self.weights.plain(name)
    }

    /// The embedding, `[vocab_size, hidden_size]`.
    pub fn embedding(&self) -> Result<StoredMatrix, SourceError> {
        self.matrix(&self.spec.embedding.name)
    }

    /// The language-model head, `[vocab_size, hidden_size]`; absent where it is the embedding.
    pub fn own_head(&self) -> Result<Option<StoredMatrix>, SourceError> {
        match self.spec.head.tied {
            true => Ok(None),
            false => self.matrix(&self.spec.head.name).map(Some),
        }
    }

    /// A plain matrix by its full name.
    pub fn matrix(&self, name: &str) -> Result<StoredMatrix, SourceError> {
        let (dtype, bytes) = self.weights.plain_as_stored(name)?;
        Ok(StoredMatrix { dtype, bytes })
    }
}
