//! Gemma (`GemmaForCausalLM`, arXiv:2403.08295): embeddings times the root of their width, norms that
//! store the difference of their weight from 1, a head that is the embedding.

use super::parts::AttentionBias;
use super::relative::Relative;
use super::rotaries::Rotaries;
use super::sizes::{Defaults, NormStyle};
use super::{Reader, Sizes, windows};
use crate::config::ConfigError;
use crate::config_keys::Honoured;
use crate::spec::{ModelSpec, NormKind};

/// What Gemma 1 to 4 have in common where the file does not say.
pub(super) const GEMMA: Defaults = Defaults {
    activation: ("hidden_activation", "gelu_pytorch_tanh"),
    tied: true,
    positions: 8192,
    head_dim: Some(256),
    norm: NormStyle {
        kind: NormKind::Rms,
        offset: 1.0,
        bias: false,
    },
    ..Defaults::LLAMA
};

pub(super) fn read(reader: &Reader<'_>) -> Result<ModelSpec, ConfigError> {
    // The first files have `gelu` in `hidden_act`, which readers take for different functions.
    let defaults = Defaults {
        activation: ("hidden_act", "gelu_pytorch_tanh"),
        kv_heads: Some(16),
        ..GEMMA
    };
    reader.text_is("hidden_activation", &["gelu_pytorch_tanh"])?;
    let mut sizes = Sizes::read(reader, &Honoured::reads(&["hidden_activation"]), &defaults)?;
    let relative = Relative {
        attention_bias: AttentionBias::all(reader.fields.flag("attention_bias", false)?),
        ..Relative::new(windows::nowhere(reader, &mut sizes)?)
    };
    let model = relative.model(reader, &sizes, Rotaries::one(reader, &sizes)?);
    Ok(with_scaled_embedding(model))
}

/// What all of them do with tokens.
pub(super) fn with_scaled_embedding(mut model: ModelSpec) -> ModelSpec {
    model.embedding.factor = (model.hidden_size as f64).sqrt() as f32;
    model.begins_with_bos = true;
    model.overflows_f16 = true;
    model
}
