//! Llama 1, 2 and 3 (`LlamaForCausalLM`, arXiv:2302.13971 and later), and all that call
//! themselves so.

use crate::config::{ConfigError, DecoderConfig, Fields, read_common};

pub(super) fn read(fields: &Fields<'_>) -> Result<DecoderConfig, ConfigError> {
    let attention_bias = fields.flag("attention_bias", false)?;
    Ok(DecoderConfig {
        qkv_bias: attention_bias,
        o_bias: attention_bias,
        mlp_bias: fields.flag("mlp_bias", false)?,
        // Llama has none; what calls itself so and gives one is taken at its word.
        sliding_window: super::window(fields)?,
        ..read_common(fields, &[])?
    })
}
