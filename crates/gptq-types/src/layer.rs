//! Names of quantised linears and the sink that sees their inputs.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Full module path of a linear, without `.weight`: `model.layers.0.self_attn.q_proj`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct LayerName(pub String);

impl LayerName {
    /// The name of one of this module's tensors, such as `qweight`.
    pub fn tensor(&self, suffix: &str) -> String {
        format!("{}.{suffix}", self.0)
    }
}

impl fmt::Display for LayerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The four groups of linears in a decoder block that share one input, in true-sequential order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// `q_proj`, `k_proj`, `v_proj`: the normed hidden state.
    AttentionIn,
    /// `o_proj`: the attention output.
    AttentionOut,
    /// `gate_proj`, `up_proj`: the second normed hidden state.
    MlpIn,
    /// `down_proj`: the gated product.
    MlpOut,
}

impl Stage {
    /// In the order of the data.
    pub const ALL: [Stage; 4] = [
        Stage::AttentionIn,
        Stage::AttentionOut,
        Stage::MlpIn,
        Stage::MlpOut,
    ];
}

/// Sees the inputs of the linears of one stage, one batch of tokens after the other.
pub trait ActivationSink {
    /// `x` is row-major `[tokens, in_features]`; padding is never among the tokens.
    fn observe(&mut self, x: &[f32], tokens: usize, in_features: usize);
}
