//! Bytes that training takes on a GPU: plain arithmetic, so that plans are made where there is none.

use crate::AttentionShape;
use crate::descent_blocks::DESCENT_CHANNELS;

/// The gradient of a weight that exists at a time: that of a larger weight is made for some outputs after the
/// other.
const GRADIENT_BYTES: usize = 256 << 20;
/// Outputs whose gradients are made together: threads of a block, an output each.
pub(crate) const GRADIENT_OUTPUTS: usize = 128;

/// Scores that exist at a time: long windows are cut into query rows that keep to it, so that memory is linear in
/// the window.
const SCORE_BYTES: usize = 256 << 20;
/// Most query rows at a time; shorter runs leave more of the unneeded upper triangle out.
const QUERY_ROWS: usize = 512;

/// The shape of a linear whose latents are trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LatentShape {
    /// Input channels.
    pub features: usize,
    /// Outputs.
    pub outputs: usize,
    /// Quantization groups.
    pub groups: usize,
}

impl LatentShape {
    /// Bytes of its latents and grids.
    pub fn latent_bytes(self) -> usize {
        let LatentShape {
            features,
            outputs,
            groups,
        } = self;
        4 * (features * outputs
            + 2 * groups * outputs
            + 2 * features
            + 2 * self.parts()
            + groups
            + 2)
    }

    /// What Adam's moments take more, while the block is trained.
    pub fn moment_bytes(self) -> usize {
        8 * self.trained()
    }

    /// What a snapshot of latents and scales takes more.
    pub fn snapshot_bytes(self) -> usize {
        4 * self.trained()
    }

    /// Working space of a step, which all linears share: that of the one that needs most.
    pub fn working_bytes(self) -> usize {
        let at_a_time = outputs_at_a_time(self.features, self.outputs);
        4 * (self.features * at_a_time + self.parts() * self.outputs)
    }

    /// Latents and scales.
    fn trained(self) -> usize {
        (self.features + self.groups) * self.outputs
    }

    /// Most runs of channels of a group over which a thread sums.
    fn parts(self) -> usize {
        self.features.div_ceil(DESCENT_CHANNELS) + self.groups
    }
}

/// Outputs whose gradients exist at a time.
pub(crate) fn outputs_at_a_time(features: usize, outputs: usize) -> usize {
    let most = GRADIENT_BYTES / (4 * features.max(1)) / GRADIENT_OUTPUTS * GRADIENT_OUTPUTS;
    most.max(GRADIENT_OUTPUTS).min(outputs)
}

/// Query rows of `count` whose scores against `keys` keys exist at a time.
pub(crate) fn rows_at_a_time(count: usize, keys: usize, shape: AttentionShape) -> usize {
    (SCORE_BYTES / (4 * shape.heads * keys).max(1))
        .clamp(16, QUERY_ROWS)
        .min(count)
}

/// Bytes that the gradient of attention in windows of `tokens` works with beside its operands, and keeps for the
/// next call. Linear in `tokens` beyond 2048 tokens of 32 heads, where the query rows at a time become fewer.
pub fn attention_backward_bytes(tokens: usize, shape: AttentionShape) -> usize {
    let scores = shape.heads * rows_at_a_time(tokens, tokens, shape) * tokens;
    12 * scores + 8 * tokens * shape.kv_width()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gradient_of_a_large_weight_is_made_in_parts() {
        let shape = |features, outputs| LatentShape {
            features,
            outputs,
            groups: features / 128,
        };
        let down = shape(11008, 4096);
        assert_eq!(down.latent_bytes() / (11008 * 4096), 4);
        assert_eq!(down.moment_bytes(), 2 * down.snapshot_bytes());
        assert!(down.working_bytes() < GRADIENT_BYTES + (4 << 20));
        let small = shape(4096, 4096);
        assert_eq!(small.working_bytes(), 4 * 4096 * (4096 + 64));
        assert_eq!(outputs_at_a_time(1 << 30, 4096), GRADIENT_OUTPUTS);
    }
}
