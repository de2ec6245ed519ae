//! Names of quantized linears and the sink that sees their inputs.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::Dtype;

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

/// A matrix in the memory of a GPU, lent for the length of a call.
///
/// Only `gptq-kernels` reads through the address; who makes one of these vouches for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceMatrix {
    /// Device address of the first element, row-major without gaps.
    pub address: u64,
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub columns: usize,
    /// F16 or BF16.
    pub dtype: Dtype,
}

/// The inputs of a linear, where the forward pass has them.
#[derive(Clone, Copy, Debug)]
pub enum Activations<'a> {
    /// Row-major `[tokens, in_features]` in host memory.
    Host(&'a [f32]),
    /// `[tokens, in_features]` on the GPU.
    Device(DeviceMatrix),
}

/// The weight of a linear, where the forward pass has it.
#[derive(Clone, Debug)]
pub enum Weight {
    /// `[in_features, out_features]` row-major in host memory.
    Host(Vec<f32>),
    /// `[out_features, in_features]` on the GPU; the solver writes the rounded weight over it.
    Device(DeviceMatrix),
}

/// Tokens of a stretch, see [`stretch_of`].
const STRETCH: usize = 8192;

/// The place, 0 to 7, of the stretch that the token number `start` of a pass lies in. What needs not all
/// tokens takes some of every eight stretches, so that it sees all of the text, and the same tokens on
/// every device: batches begin where windows do and are no longer than a stretch.
pub fn stretch_of(start: usize) -> usize {
    start / STRETCH % 8
}

/// Sees the inputs of the linears of one capture group, one batch of tokens after the other.
pub trait ActivationSink {
    /// `x` has `tokens` rows of `in_features`; padding is never among the tokens.
    fn observe(&mut self, x: Activations<'_>, tokens: usize, in_features: usize);

    /// Observes rows together with their float partners: the rows of the float model.
    fn observe_pair(
        &mut self,
        x: Activations<'_>,
        float: Activations<'_>,
        tokens: usize,
        in_features: usize,
    ) {
        let _ = float;
        self.observe(x, tokens, in_features);
    }
}
