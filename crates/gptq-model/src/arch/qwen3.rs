//! Qwen3, dense (`Qwen3ForCausalLM`, arXiv:2505.09388): norms on every query and key head,
//! a head width of its own.

use crate::config::{ConfigError, DecoderConfig, Fields, read_common};

pub(super) fn read(fields: &Fields<'_>) -> Result<DecoderConfig, ConfigError> {
    let attention_bias = fields.flag("attention_bias", false)?;
    let mut common = read_common(fields, &[("qk_norm", true), ("use_qk_norm", true)])?;
    super::name_unlike(&mut common, fields, &[("mlp_bias", false)])?;
    Ok(DecoderConfig {
        qkv_bias: attention_bias,
        o_bias: attention_bias,
        qk_norm: true,
        head_dim: fields.optional_size("head_dim")?.unwrap_or(128),
        sliding_window: super::qwen_window(fields)?,
        ..common
    })
}
