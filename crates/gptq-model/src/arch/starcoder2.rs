//! StarCoder2 (`Starcoder2ForCausalLM`, arXiv:2402.19173): norms that subtract the mean, a feed-forward
//! without a gate, biases everywhere.

use super::parts::{AttentionBias, plain_branch};
use super::relative::Relative;
use super::rotaries::Rotaries;
use super::sizes::{Defaults, NormStyle};
use super::{Reader, Sizes, windows};
use crate::config::ConfigError;
use crate::config_keys::Honoured;
use crate::spec::{ModelSpec, NormKind};

const HONOURED: Honoured = Honoured::reads(&[
    "attention_softmax_in_fp32",
    "layer_norm_epsilon",
    "mlp_type",
    "norm_epsilon",
    "norm_type",
    "scale_attention_softmax_in_fp32",
    "use_bias",
]);

const DEFAULTS: Defaults = Defaults {
    eps: ("norm_epsilon", 1e-5),
    activation: ("hidden_act", "gelu_pytorch_tanh"),
    tied: true,
    positions: 4096,
    kv_heads: Some(2),
    norm: NormStyle {
        kind: NormKind::Layer,
        offset: 0.0,
        bias: true,
    },
    ..Defaults::LLAMA
};

pub(super) fn read(reader: &Reader<'_>) -> Result<ModelSpec, ConfigError> {
    reader.text_is("norm_type", &["layer_norm"])?;
    reader.text_is("mlp_type", &["default"])?;
    let mut sizes = Sizes::read(reader, &HONOURED, &DEFAULTS)?;
    let bias = reader.fields.flag("use_bias", true)?;
    let relative = Relative {
        feed_forward: plain_branch,
        attention_bias: AttentionBias::all(bias),
        mlp_bias: bias,
        ..Relative::new(windows::everywhere(reader, &mut sizes, None)?)
    };
    Ok(relative.model(reader, &sizes, Rotaries::one(reader, &sizes)?))
}
