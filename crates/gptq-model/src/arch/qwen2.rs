//! Qwen2 and Qwen2.5 (`Qwen2ForCausalLM`, arXiv:2407.10671): Llama with biases on queries, keys
//! and values.

use crate::config::{ConfigError, DecoderConfig, Fields, read_common};

pub(super) fn read(fields: &Fields<'_>) -> Result<DecoderConfig, ConfigError> {
    let mut config = DecoderConfig {
        qkv_bias: true,
        sliding_window: super::qwen_window(fields)?,
        ..read_common(fields, &[("qkv_bias", true), ("use_qkv_bias", true)])?
    };
    let flags = [("attention_bias", true), ("mlp_bias", false)];
    super::name_unlike(&mut config, fields, &flags)?;
    Ok(config)
}
