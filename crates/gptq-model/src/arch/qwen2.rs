//! Qwen2 and Qwen2.5 (`Qwen2ForCausalLM`, arXiv:2407.10671): Llama with biases on queries, keys
//! and values.

use super::parts::AttentionBias;
use super::relative::{Relative, name_unlike};
use super::rotaries::Rotaries;
use super::sizes::Defaults;
use super::{Reader, Sizes, windows};
use crate::config::ConfigError;
use crate::config_keys::Honoured;
use crate::spec::ModelSpec;

pub(super) fn read(reader: &Reader<'_>) -> Result<ModelSpec, ConfigError> {
    let honoured = Honoured::means(&[("qkv_bias", true), ("use_qkv_bias", true)]);
    let mut sizes = Sizes::read(reader, &honoured, &Defaults::LLAMA)?;
    let flags = [("attention_bias", true), ("mlp_bias", false)];
    name_unlike(&mut sizes, reader, &flags)?;
    let relative = Relative {
        attention_bias: AttentionBias {
            input: true,
            output: false,
        },
        ..Relative::new(windows::of_qwen(reader, sizes.blocks)?)
    };
    Ok(relative.model(reader, &sizes, Rotaries::one(reader, &sizes)?))
}
