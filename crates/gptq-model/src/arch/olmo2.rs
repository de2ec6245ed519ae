//! OLMo 2 (`Olmo2ForCausalLM`, arXiv:2501.00656): norms behind attention and feed-forward only, and over
//! all queries and all keys of a token.

use super::parts::{AttentionBias, norms_of_projections};
use super::relative::{Layout, Relative, name_unlike};
use super::rotaries::Rotaries;
use super::sizes::Defaults;
use super::{Reader, Sizes, windows};
use crate::config::ConfigError;
use crate::config_keys::Honoured;
use crate::spec::ModelSpec;

pub(super) const DEFAULTS: Defaults = Defaults {
    eps: ("rms_norm_eps", 1e-5),
    ..Defaults::LLAMA
};

pub(super) fn read(reader: &Reader<'_>) -> Result<ModelSpec, ConfigError> {
    let mut sizes = Sizes::read(reader, &Honoured::NOTHING, &DEFAULTS)?;
    name_unlike(&mut sizes, reader, &[("mlp_bias", false)])?;
    let relative = relative(reader, windows::nowhere(reader, &mut sizes)?)?;
    Ok(relative.model(reader, &sizes, Rotaries::one(reader, &sizes)?))
}

/// OLMo 2 with windows.
pub(super) fn relative(
    reader: &Reader<'_>,
    windows: Vec<Option<usize>>,
) -> Result<Relative, ConfigError> {
    Ok(Relative {
        layout: Layout::AFTER,
        attention_bias: AttentionBias::all(reader.fields.flag("attention_bias", false)?),
        head_norms: norms_of_projections,
        ..Relative::new(windows)
    })
}
