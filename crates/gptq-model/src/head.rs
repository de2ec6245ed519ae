//! The language-model head and the norm before it, as the processor multiplies by them.

use std::sync::{Arc, OnceLock};

use gptq_kernels::{layer_norm, rms_norm};
use gptq_types::SourceError;

use crate::read_block::norm_values;
use crate::score::HeadRows;
use crate::spec::{ModelSpec, NormKind};
use crate::weights::WeightSource;

/// In f32, read when first asked for: a head may be as large as several blocks, and a device that
/// scores has its own.
pub(crate) struct HostHead {
    pub source: Arc<dyn WeightSource>,
    /// Name of the tensor; the embedding's if they are tied.
    pub name: String,
    pub norm: HeadNorm,
    pub soft_cap: Option<f32>,
    weight: OnceLock<Arc<Vec<f32>>>, // [vocab_size, hidden_size]
}

/// The norm before the head; a factor of logits is part of its weight and bias.
pub(crate) struct HeadNorm {
    pub kind: NormKind,
    pub weight: Vec<f32>, // [hidden_size]
    pub bias: Option<Vec<f32>>,
    pub eps: f64,
}

impl HeadNorm {
    fn read(source: &dyn WeightSource, spec: &ModelSpec) -> Result<Self, SourceError> {
        let norm = &spec.final_norm;
        let (mut weight, mut bias) = norm_values(norm, |name| source.plain(name))?;
        if spec.head.factor != 1.0 {
            let values = weight.iter_mut().chain(bias.iter_mut().flatten());
            values.for_each(|value| *value *= spec.head.factor);
        }
        Ok(HeadNorm {
            kind: norm.kind,
            weight,
            bias,
            eps: norm.eps,
        })
    }

    fn apply(&self, hidden: &[f32]) -> Vec<f32> {
        let eps = self.eps as f32;
        match self.kind {
            NormKind::Rms => rms_norm(hidden, &self.weight, eps),
            NormKind::Layer => layer_norm(hidden, &self.weight, self.bias.as_deref(), eps),
        }
    }
}

impl HostHead {
    pub fn new(source: Arc<dyn WeightSource>, spec: &ModelSpec) -> Result<Self, SourceError> {
        Ok(HostHead {
            norm: HeadNorm::read(source.as_ref(), spec)?,
            source,
            name: spec.head.name.clone(),
            soft_cap: spec.head.soft_cap,
            weight: OnceLock::new(),
        })
    }

    pub fn width(&self) -> usize {
        self.norm.weight.len()
    }

    pub fn weight(&self) -> Result<Arc<Vec<f32>>, SourceError> {
        if let Some(weight) = self.weight.get() {
            return Ok(weight.clone());
        }
        let read = Arc::new(self.source.plain(&self.name)?);
        Ok(self.weight.get_or_init(|| read).clone())
    }

    /// Hidden states `[tokens, hidden_size]`, normed, before the head.
    pub fn rows(&self, hidden: &[f32]) -> Result<HeadRows, SourceError> {
        Ok(HeadRows {
            normed: self.norm.apply(hidden),
            head: self.weight()?,
            width: self.width(),
            soft_cap: self.soft_cap,
        })
    }
}
