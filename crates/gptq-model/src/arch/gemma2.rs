//! Gemma 2 (`Gemma2ForCausalLM`, arXiv:2408.00118): norms before and behind attention and feed-forward,
//! scores and logits capped, a window in every other block.

use super::gemma::{GEMMA, with_scaled_embedding};
use super::parts::AttentionBias;
use super::relative::{Layout, Relative};
use super::rotaries::Rotaries;
use super::sizes::{Defaults, cap, factor};
use super::{Reader, Sizes, windows};
use crate::config::ConfigError;
use crate::config_keys::Honoured;
use crate::spec::ModelSpec;

const HONOURED: Honoured = Honoured::reads(&[
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "hidden_activation",
    "query_pre_attn_scalar",
]);

pub(super) fn read(reader: &Reader<'_>) -> Result<ModelSpec, ConfigError> {
    let defaults = Defaults {
        kv_heads: Some(4),
        ..GEMMA
    };
    let sizes = Sizes::read(reader, &HONOURED, &defaults)?;
    let windowed = windows::layer_types(reader, sizes.blocks)?;
    let windowed = windowed.unwrap_or_else(|| (0..sizes.blocks).map(|at| at % 2 == 0).collect());
    let relative = Relative {
        layout: Layout::AROUND,
        attention_bias: AttentionBias::all(reader.fields.flag("attention_bias", false)?),
        scale: Some(scale(reader)?),
        soft_cap: cap(&reader.fields, "attn_logit_softcapping", Some(50.0))?,
        ..Relative::new(windows::by_block(reader, windowed, Some(4096))?)
    };
    let mut model = relative.model(reader, &sizes, Rotaries::one(reader, &sizes)?);
    model.head.soft_cap = cap(&reader.fields, "final_logit_softcapping", Some(30.0))?;
    Ok(with_scaled_embedding(model))
}

/// Scores are divided by the root of `query_pre_attn_scalar`.
pub(super) fn scale(reader: &Reader<'_>) -> Result<f32, ConfigError> {
    Ok(1.0 / factor(&reader.fields, "query_pre_attn_scalar", 256.0)?.sqrt())
}
