//! Mistral (`MistralForCausalLM`, arXiv:2310.06825): Llama with a sliding window in its first
//! version.

use crate::config::{ConfigError, DecoderConfig, Fields, read_common};

pub(super) fn read(fields: &Fields<'_>) -> Result<DecoderConfig, ConfigError> {
    let mut config = DecoderConfig {
        sliding_window: super::window(fields)?,
        ..read_common(fields, &[])?
    };
    let flags = [("attention_bias", false), ("mlp_bias", false)];
    super::name_unlike(&mut config, fields, &flags)?;
    Ok(config)
}
