//! Command R (`CohereForCausalLM`) and Command R7B and Command A (`Cohere2ForCausalLM`, arXiv:2504.00698):
//! attention and feed-forward side by side behind one norm, interleaved RoPE,
//! logits times a factor. In the second, blocks without a window have no RoPE.

use gptq_kernels::Pairing;

use super::parts::AttentionBias;
use super::relative::{Layout, Relative, name_unlike};
use super::rotaries::Rotaries;
use super::sizes::{Defaults, NormStyle, factor};
use super::{Reader, Sizes, windows};
use crate::config::ConfigError;
use crate::config_keys::Honoured;
use crate::rope::Reads;
use crate::spec::{ModelSpec, NormKind};

const HONOURED: Honoured = Honoured {
    reads: &[
        "layer_norm_eps",
        "layer_switch",
        "logit_scale",
        "order_of_interleaved_layers",
        "position_embedding_type",
        "sliding_window_pattern",
        "use_embedding_sharing",
        "use_parallel_embedding",
    ],
    means: &[("use_gated_activation", true), ("use_parallel_block", true)],
};

const DEFAULTS: Defaults = Defaults {
    eps: ("layer_norm_eps", 1e-5),
    tied: true,
    positions: 8192,
    norm: NormStyle {
        kind: NormKind::Layer,
        offset: 0.0,
        bias: false,
    },
    ..Defaults::LLAMA
};

pub(super) fn read(reader: &Reader<'_>) -> Result<ModelSpec, ConfigError> {
    let mut sizes = read_sizes(reader)?;
    let reads = Reads {
        theta: 500_000.0,
        ..Reads::LLAMA
    };
    let rotaries = Rotaries::one_of(reader, &sizes, &reads, Pairing::Interleaved)?;
    let windows = windows::nowhere(reader, &mut sizes)?;
    model(reader, &sizes, windows, rotaries)
}

pub(super) fn read_second(reader: &Reader<'_>) -> Result<ModelSpec, ConfigError> {
    let sizes = read_sizes(reader)?;
    let windowed = windows::all_but_each(reader, sizes.blocks, "sliding_window_pattern", 4)?;
    let windows = windows::by_block(reader, windowed, Some(4096))?;
    let rotaries = Rotaries::one_of(reader, &sizes, &Reads::LLAMA, Pairing::Interleaved)?
        .only_where(windows.iter().map(Option::is_some));
    model(reader, &sizes, windows, rotaries)
}

fn read_sizes(reader: &Reader<'_>) -> Result<Sizes, ConfigError> {
    reader.text_is("position_embedding_type", &["rope_gptj"])?;
    reader.text_is("order_of_interleaved_layers", &["local_attn_first"])?;
    let mut sizes = Sizes::read(reader, &HONOURED, &DEFAULTS)?;
    name_unlike(&mut sizes, reader, &[("mlp_bias", false)])?;
    Ok(sizes)
}

fn model(
    reader: &Reader<'_>,
    sizes: &Sizes,
    windows: Vec<Option<usize>>,
    rotaries: Rotaries,
) -> Result<ModelSpec, ConfigError> {
    let relative = Relative {
        layout: Layout::SideBySide {
            before: "input_layernorm",
        },
        attention_bias: AttentionBias::all(reader.fields.flag("attention_bias", false)?),
        ..Relative::new(windows)
    };
    let mut model = relative.model(reader, sizes, rotaries);
    model.head.factor = factor(&reader.fields, "logit_scale", 0.0625)?;
    Ok(model)
}
