//! GLM-4-0414 (`Glm4ForCausalLM`, arXiv:2406.12793): norms before and behind attention and feed-forward,
//! half of a head that RoPE rotates, neighbouring components together.

use gptq_kernels::Pairing;

use super::parts::{AttentionBias, fused_gated_branch};
use super::relative::{Layout, Relative, name_unlike};
use super::rotaries::Rotaries;
use super::sizes::Defaults;
use super::{Reader, Sizes, windows};
use crate::config::ConfigError;
use crate::config_keys::Honoured;
use crate::rope::Reads;
use crate::spec::ModelSpec;

const HONOURED: Honoured = Honoured::reads(&["partial_rotary_factor"]);

const DEFAULTS: Defaults = Defaults {
    eps: ("rms_norm_eps", 1.5625e-7),
    positions: 131_072,
    head_dim: Some(128),
    kv_heads: Some(2),
    ..Defaults::LLAMA
};

const LAYOUT: Layout = Layout::InTurn {
    before: [Some("input_layernorm"), Some("post_attention_layernorm")],
    after: [Some("post_self_attn_layernorm"), Some("post_mlp_layernorm")],
};

pub(super) fn read(reader: &Reader<'_>) -> Result<ModelSpec, ConfigError> {
    let mut sizes = Sizes::read(reader, &HONOURED, &DEFAULTS)?;
    name_unlike(&mut sizes, reader, &[("mlp_bias", false)])?;
    let reads = Reads {
        partial: Some(0.5),
        ..Reads::LLAMA
    };
    let rotaries = Rotaries::one_of(reader, &sizes, &reads, Pairing::Interleaved)?;
    let relative = Relative {
        feed_forward: fused_gated_branch,
        layout: LAYOUT,
        attention_bias: AttentionBias {
            input: reader.fields.flag("attention_bias", true)?,
            output: false,
        },
        ..Relative::new(windows::nowhere(reader, &mut sizes)?)
    };
    Ok(relative.model(reader, &sizes, rotaries))
}
