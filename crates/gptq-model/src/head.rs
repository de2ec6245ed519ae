//! The language-model head and the norm before it, as the processor multiplies by them.

use std::sync::{Arc, OnceLock};

use gptq_kernels::rms_norm;
use gptq_types::SourceError;

use crate::DecoderConfig;
use crate::score::HeadRows;
use crate::weights::WeightSource;

/// In f32, read when first asked for: a head may be as large as several blocks, and a device that
/// scores has its own.
pub(crate) struct HostHead {
    pub source: Arc<dyn WeightSource>,
    /// Of the tensor: the embedding's where they are one.
    pub name: &'static str,
    pub norm: Vec<f32>, // [hidden_size]
    pub eps: f64,
    weight: OnceLock<Arc<Vec<f32>>>, // [vocab_size, hidden_size]
}

impl HostHead {
    pub fn new(source: Arc<dyn WeightSource>, config: &DecoderConfig) -> Result<Self, SourceError> {
        Ok(HostHead {
            norm: source.plain("model.norm.weight")?,
            source,
            name: match config.tie_word_embeddings {
                true => "model.embed_tokens.weight",
                false => "lm_head.weight",
            },
            eps: config.rms_norm_eps,
            weight: OnceLock::new(),
        })
    }

    pub fn width(&self) -> usize {
        self.norm.len()
    }

    pub fn weight(&self) -> Result<Arc<Vec<f32>>, SourceError> {
        if let Some(weight) = self.weight.get() {
            return Ok(weight.clone());
        }
        let read = Arc::new(self.source.plain(self.name)?);
        Ok(self.weight.get_or_init(|| read).clone())
    }

    /// Hidden states `[tokens, hidden_size]`, normed, before the head.
    pub fn rows(&self, hidden: &[f32]) -> Result<HeadRows, SourceError> {
        Ok(HeadRows {
            normed: rms_norm(hidden, &self.norm, self.eps as f32),
            head: self.weight()?,
            width: self.width(),
        })
    }
}
