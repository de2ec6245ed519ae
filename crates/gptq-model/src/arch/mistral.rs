//! Mistral (`MistralForCausalLM`, arXiv:2310.06825): Llama with a sliding window in its first
//! version.

use crate::config::{ConfigError, DecoderConfig, Fields, read_common};

pub(super) fn read(fields: &Fields<'_>) -> Result<DecoderConfig, ConfigError> {
    Ok(DecoderConfig {
        sliding_window: fields.optional_size("sliding_window")?,
        ..read_common(fields)?
    })
}
