//! What training a block holds, in columns of rows and in bytes, from its spec alone.

use gptq_kernels::{LatentShape, attention_backward_bytes};
use gptq_types::GroupSize;

use crate::spec::{BlockSpec, BranchSpec, LinearSpec, Mixer, ModelSpec, Piece};

/// Bytes that training a block takes on a GPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct TrainingSizes {
    /// Latents and grids of all linears, from the sweep on.
    pub latents: usize,
    /// Adam's moments, a snapshot, and the working space of a step and of attention's gradient: beside the
    /// latents while the block is trained.
    pub beside_latents: usize,
    /// Columns of a batch's rows that a tape, gradients, input and target take.
    pub columns: usize,
}

impl TrainingSizes {
    /// The most that any block of a model takes, with windows of `tokens`.
    pub fn of(spec: &ModelSpec, group_size: GroupSize, tokens: usize) -> Self {
        let sizes = spec.blocks.iter().map(|block| {
            let of = |bytes: fn(LatentShape) -> usize| {
                let shapes = trained(block).map(|linear| shape(linear, group_size));
                shapes.map(bytes)
            };
            let attention = (block.attention())
                .map(|attention| attention_backward_bytes(tokens.max(1), attention.shape));
            TrainingSizes {
                latents: of(LatentShape::latent_bytes).sum(),
                beside_latents: of(LatentShape::moment_bytes).sum::<usize>()
                    + of(LatentShape::snapshot_bytes).sum::<usize>()
                    + of(LatentShape::working_bytes).max().unwrap_or(0)
                    + attention.max().unwrap_or(0),
                columns: block.tape_columns(spec.hidden_size),
            }
        });
        sizes.fold(TrainingSizes::default(), |most, block| TrainingSizes {
            latents: most.latents.max(block.latents),
            beside_latents: most.beside_latents.max(block.beside_latents),
            columns: most.columns.max(block.columns),
        })
    }
}

fn trained(block: &BlockSpec) -> impl Iterator<Item = &LinearSpec> {
    block.linears().filter(|linear| linear.quantized)
}

fn shape(linear: &LinearSpec, group_size: GroupSize) -> LatentShape {
    LatentShape {
        features: linear.in_features,
        outputs: linear.out_features,
        groups: group_size.count(linear.in_features),
    }
}

impl BlockSpec {
    /// Columns of the rows that a recorded pass and the gradients of a pass take at most, with the
    /// block's input, its output and its target. Memory that is freed serves rows of the same width alone (Burn
    /// keeps it so), so this is the most of each width, which do not all live at once.
    ///
    /// Of a Llama: the input, the hidden states between its two steps and both as they are normed; queries, keys,
    /// values and what attention makes of them; gate, up and their product; output, target, and three gradients
    /// as wide as the hidden states; those of keys and values, and a fourth matrix as wide as the feed-forward.
    pub fn tape_columns(&self, hidden: usize) -> usize {
        let steps = self.steps.iter().map(|step| {
            let branches = step.branches.iter();
            let normed = match step.norm {
                Some(_) => hidden * step.branches.len(), // once for each branch
                None => 0,
            };
            hidden
                + normed
                + branches
                    .map(|branch| branch_columns(branch, hidden))
                    .sum::<usize>()
        });
        let gradients = 3 * hidden;
        let ends = 2 * hidden; // output and target
        steps.sum::<usize>() + ends + gradients
    }
}

/// Columns that a branch takes beside its input.
fn branch_columns(branch: &BranchSpec, hidden: usize) -> usize {
    let operands = || branch.operands.iter().map(|piece| piece.columns.len());
    let inner = branch.output.in_features;
    let mixed = match &branch.mixer {
        Mixer::Attention(attention) => {
            let norms = &attention.norms;
            let queries = operands().next().unwrap_or(0);
            let keys = attention.shape.kv_heads * attention.shape.head_dim;
            let normed = [
                (&norms.query, queries),
                (&norms.key, keys),
                (&norms.value, keys),
            ];
            let normed = normed.iter().filter(|(norm, _)| norm.is_some());
            // The gradients of queries and of the output lie where those of the hidden states were, if they are
            // as wide; keys and values may come from another block.
            queries + inner + 4 * keys + normed.map(|(_, columns)| columns).sum::<usize>()
        }
        Mixer::Gated(_) => operands().sum::<usize>() + 2 * inner,
        Mixer::Plain(_) => operands().sum::<usize>() + 2 * inner,
        Mixer::PerBlockInput(_) => operands().sum::<usize>() + 3 * inner, // and the block's own rows
    };
    let after = match branch.after {
        Some(_) => hidden,
        None => 0,
    };
    // A fused linear's output before it is cut, and the gradient at all of it.
    let fused = (branch.input.iter().enumerate()).filter(|(at, linear)| {
        let whole =
            |piece: &&Piece| piece.linear == *at && piece.columns.len() == linear.out_features;
        !branch.operands.iter().any(|piece| whole(&piece))
    });
    let fused: usize = fused.map(|(_, linear)| 2 * linear.out_features).sum();
    mixed + after + fused
}

impl ModelSpec {
    /// Columns of the rows that a pass with gradients through the widest block holds.
    pub fn tape_columns(&self) -> usize {
        let columns = self
            .blocks
            .iter()
            .map(|block| block.tape_columns(self.hidden_size));
        columns.max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::budget::tests::shape_of_a_llama;

    /// Widths of Llama 2 7B and of Llama 3 70B.
    #[test]
    fn a_llama_keeps_nine_hidden_states_and_four_feed_forwards() {
        let seven = shape_of_a_llama([4096, 11008, 32, 32]);
        let columns = 9 * 4096 + 2 * 4096 + 4 * 4096 + 4 * 11008;
        assert_eq!(seven.tape_columns(), columns);
        let seventy = shape_of_a_llama([8192, 28672, 64, 8]);
        let columns = 9 * 8192 + 2 * 8192 + 4 * 1024 + 4 * 28672;
        assert_eq!(seventy.tape_columns(), columns);
    }

    #[test]
    fn latents_moments_and_snapshot_take_sixteen_bytes_a_weight() {
        let seven = shape_of_a_llama([4096, 11008, 32, 32]);
        let sizes = TrainingSizes::of(&seven, GroupSize::Channels(128), 2048);
        let weights = seven.block_elements();
        assert!(sizes.latents >= 4 * weights && sizes.latents < 41 * weights / 10);
        let more = sizes.beside_latents - 12 * weights;
        let (working, attention) = (4 * 4096 * 11008, 469_762_048);
        assert!(more > working + attention, "{more}");
        assert!(more < working + attention + 50_000_000, "{more}");
    }
}
