//! Llama 1, 2 and 3 (`LlamaForCausalLM`, arXiv:2302.13971 and later), and all that call
//! themselves so.

use super::parts::AttentionBias;
use super::relative::Relative;
use super::rotaries::Rotaries;
use super::sizes::Defaults;
use super::{Reader, Sizes, windows};
use crate::config::ConfigError;
use crate::config_keys::Honoured;
use crate::spec::ModelSpec;

pub(super) fn read(reader: &Reader<'_>) -> Result<ModelSpec, ConfigError> {
    let mut sizes = Sizes::read(reader, &Honoured::NOTHING, &Defaults::LLAMA)?;
    let bias = reader.fields.flag("attention_bias", false)?;
    let relative = Relative {
        attention_bias: AttentionBias::all(bias),
        mlp_bias: reader.fields.flag("mlp_bias", false)?,
        ..Relative::new(windows::nowhere(reader, &mut sizes)?)
    };
    Ok(relative.model(reader, &sizes, Rotaries::one(reader, &sizes)?))
}
