//! Names of quantized linears.

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
