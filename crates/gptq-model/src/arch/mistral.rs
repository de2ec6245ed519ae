//! Mistral (`MistralForCausalLM`, arXiv:2310.06825): Llama with a sliding window in its first
//! version.

use crate::config::{ConfigError, DecoderConfig, Fields, read_common};

pub(super) fn read(fields: &Fields<'_>) -> Result<DecoderConfig, ConfigError> {
    super::always(fields, "attention_bias", false)?;
    super::always(fields, "mlp_bias", false)?;
    Ok(DecoderConfig {
        sliding_window: super::window(fields)?,
        ..read_common(fields, &[])?
    })
}
