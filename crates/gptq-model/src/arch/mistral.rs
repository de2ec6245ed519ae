//! Mistral (`MistralForCausalLM`, arXiv:2310.06825): Llama with a sliding window in its first
//! version.

use super::relative::{Relative, name_unlike};
use super::rotaries::Rotaries;
use super::sizes::Defaults;
use super::{Reader, Sizes, windows};
use crate::config::ConfigError;
use crate::config_keys::Honoured;
use crate::spec::ModelSpec;

pub(super) fn read(reader: &Reader<'_>) -> Result<ModelSpec, ConfigError> {
    let mut sizes = Sizes::read(reader, &Honoured::NOTHING, &Defaults::LLAMA)?;
    let flags = [("attention_bias", false), ("mlp_bias", false)];
    name_unlike(&mut sizes, reader, &flags)?;
    let relative = Relative::new(windows::everywhere(reader, &mut sizes, Some(4096))?);
    Ok(relative.model(reader, &sizes, Rotaries::one(reader, &sizes)?))
}
