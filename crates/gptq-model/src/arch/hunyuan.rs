//! Hunyuan, dense (`HunYuanDenseV1ForCausalLM`): norms on every query and key head behind the rotary
//! embedding, whose base grows by `alpha`.

use gptq_kernels::Pairing;

use super::parts::AttentionBias;
use super::relative::{Relative, name_unlike};
use super::rotaries::Rotaries;
use super::sizes::Defaults;
use super::{Reader, Sizes, windows};
use crate::config::ConfigError;
use crate::config_keys::Honoured;
use crate::rope::Reads;
use crate::spec::{HeadNormSpec, ModelSpec};

/// Published files have keys of the family's other models.
const HONOURED: Honoured = Honoured {
    reads: &[
        "attention_head_dim",
        "cla_share_factor",
        "norm_type",
        "num_experts",
    ],
    means: &[("use_qk_norm", true), ("qk_norm", true)],
};

pub(super) fn read(reader: &Reader<'_>) -> Result<ModelSpec, ConfigError> {
    let fields = &reader.fields;
    reader.text_is("norm_type", &["rms", "hf_rms", "rms_norm"])?;
    if let Some(experts) = fields
        .optional_size("num_experts")?
        .filter(|experts| *experts > 1)
    {
        return Err(ConfigError::unsupported(
            "num_experts",
            experts,
            "at most 1",
        ));
    }
    let defaults = Defaults {
        eps: ("rms_norm_eps", 1e-5),
        ..Defaults::LLAMA
    };
    let mut sizes = Sizes::read(reader, &HONOURED, &defaults)?;
    name_unlike(&mut sizes, reader, &[("mlp_bias", false)])?;
    let reads = Reads {
        alpha: Some(sizes.head_dim),
        ..Reads::LLAMA
    };
    let rotaries = Rotaries::one_of(reader, &sizes, &reads, Pairing::Halves)?;
    let relative = Relative {
        attention_bias: AttentionBias::all(fields.flag("attention_bias", false)?),
        head_norms,
        ..Relative::new(windows::nowhere(reader, &mut sizes)?)
    };
    Ok(relative.model(reader, &sizes, rotaries))
}

fn head_norms(reader: &Reader<'_>, sizes: &Sizes, index: usize) -> HeadNormSpec {
    let norm = |name| Some(sizes.norm(reader, index, name, sizes.head_dim));
    HeadNormSpec {
        query: norm("self_attn.query_layernorm"),
        key: norm("self_attn.key_layernorm"),
        value: None,
        after_rotation: true,
    }
}
