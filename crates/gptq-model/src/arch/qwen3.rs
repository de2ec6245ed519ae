//! Qwen3, dense (`Qwen3ForCausalLM`, arXiv:2505.09388): norms on every query and key head,
//! a head width of its own.

use super::parts::{AttentionBias, norms_of_heads};
use super::relative::{Relative, name_unlike};
use super::rotaries::Rotaries;
use super::sizes::Defaults;
use super::{Reader, Sizes, windows};
use crate::config::ConfigError;
use crate::config_keys::Honoured;
use crate::spec::ModelSpec;

pub(super) fn read(reader: &Reader<'_>) -> Result<ModelSpec, ConfigError> {
    let bias = reader.fields.flag("attention_bias", false)?;
    let honoured = Honoured::means(&[("qk_norm", true), ("use_qk_norm", true)]);
    let defaults = Defaults {
        head_dim: Some(128),
        ..Defaults::LLAMA
    };
    let mut sizes = Sizes::read(reader, &honoured, &defaults)?;
    name_unlike(&mut sizes, reader, &[("mlp_bias", false)])?;
    let relative = Relative {
        attention_bias: AttentionBias::all(bias),
        head_norms: norms_of_heads,
        ..Relative::new(windows::of_qwen(reader, sizes.blocks)?)
    };
    Ok(relative.model(reader, &sizes, Rotaries::one(reader, &sizes)?))
}
