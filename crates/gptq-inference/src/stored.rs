//! Weights in the type of the file, for runners that keep all of them resident.

use gptq_kernels::Rotation;
use gptq_model::{LinearValues, ModelError};
use gptq_types::{Dtype, LayerName, SolvedLayer, SourceError, Stage};

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

impl OpenedModel {
    /// Presence and shape of every tensor that the architecture needs, from headers alone.
    pub fn check(&self) -> Result<(), ModelError> {
        self.config.check_tensors(self.weights.as_ref())
    }

    /// The linear `layer` of `stage`, `[in_features, out_features]`. One checkpoint may hold packed
    /// and plain linears.
    pub fn linear(
        &self,
        layer: &LayerName,
        shape: [usize; 2],
        stage: Stage,
    ) -> Result<StoredLinear, SourceError> {
        let bias = self.config.has_bias(stage);
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
        self.matrix("model.embed_tokens.weight")
    }

    /// The language-model head, `[vocab_size, hidden_size]`; absent where it is the embedding.
    pub fn own_head(&self) -> Result<Option<StoredMatrix>, SourceError> {
        match self.config.tie_word_embeddings {
            true => Ok(None),
            false => self.matrix("lm_head.weight").map(Some),
        }
    }

    fn matrix(&self, name: &str) -> Result<StoredMatrix, SourceError> {
        let (dtype, bytes) = self.weights.plain_as_stored(name)?;
        Ok(StoredMatrix { dtype, bytes })
    }

    /// Cosines and sines for positions `0..capacity`.
    ///
    /// `dynamic` scaling depends on the length of the text; here that is the capacity, from the
    /// first token on, so that all keys of a sequence are turned alike.
    pub fn rotation(&self, capacity: usize) -> Rotation {
        self.config.rotation(0..capacity, capacity)
    }
}
