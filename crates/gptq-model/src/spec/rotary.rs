//! Tables of rotary positions.

use std::ops::Range;

use gptq_kernels::{Pairing, Rotation};

use crate::RopeScaling;

/// A table of cosines and sines, by position.
#[derive(Clone, Debug, PartialEq)]
pub struct RotarySpec {
    /// Width of a head.
    pub head_dim: usize,
    /// Components of it that are rotated.
    pub rotary_dim: usize,
    /// The components that are rotated together.
    pub pairing: Pairing,
    /// Base of the frequencies.
    pub theta: f64,
    /// Change of the frequencies for long contexts.
    pub scaling: RopeScaling,
    /// Factor of queries by position.
    pub query_factor: Option<QueryFactor>,
}

/// Queries at position `p` are multiplied by `1 + beta ln(1 + floor(p / original))` (Llama 4, Ministral 3).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct QueryFactor {
    /// The factor of the logarithm.
    pub beta: f64,
    /// Positions the model was first trained for.
    pub original: usize,
}

impl RotarySpec {
    /// The table of keys for `positions` of texts that are `tokens` long.
    pub fn keys(&self, positions: Range<usize>, tokens: usize) -> Rotation {
        let (frequencies, scale) = (self.scaling).frequencies(self.rotary_dim, self.theta, tokens);
        Rotation::new(&frequencies, positions, scale, self.head_dim, self.pairing)
    }

    /// The table of queries, where it is another one.
    pub fn queries(&self, positions: Range<usize>, tokens: usize) -> Option<Rotation> {
        let factor = self.query_factor?;
        let of = |position: usize| {
            let times = (position / factor.original.max(1)) as f64;
            (1.0 + factor.beta * (1.0 + times).ln()) as f32
        };
        let factors: Vec<f32> = positions.clone().map(of).collect();
        Some(self.keys(positions, tokens).scaled(&factors))
    }
}
