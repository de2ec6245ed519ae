//! Bytes of host memory. Shapes and windows may be of any size here, so that a plan is refused for what it would
//! take and not for an overflow.

use gptq_model::spec::KeySource;
use gptq_model::{GpuMemory, LinearSpec, ModelSpec};
use gptq_types::{ColumnOrder, Method};

use super::Work;

/// Bytes that a process holds whatever it works on, and what CUDA's libraries add to it.
const FIXED: u128 = 60 << 20;
const LIBRARIES: u128 = 1300 << 20;

/// Rows of a batch on a processor.
const BATCH_TOKENS: u128 = 2048;

/// Bytes resident on the processor, as docs/ARCHITECTURE.md counts them.
pub(super) fn on_processor(work: &Work<'_>) -> u64 {
    let Work { model, spec, .. } = *work;
    let hidden = model.hidden_size as u128;
    let block = model.block_elements() as u128;
    let largest = largest(model);
    let widest = model.widest_input() as u128;
    let tokens = match spec.method {
        Method::Gptq => tokens(work),
        Method::Rtn => 0,
    };
    let width = hidden.saturating_add(widest);
    let activations = tokens.saturating_mul(width).saturating_mul(4);
    let activations = activations.saturating_add(kept_for_blocks(model, tokens));
    let square = widest.saturating_mul(widest);
    let solver =
        (square.saturating_mul(2 * 4 + 2 * 8)).saturating_add(largest.saturating_mul(3 * 4));
    // Hidden states, a block; two sums and what is carried of a weight.
    let (beside, sums) = match work.aims() {
        false => (0, 0),
        true => (
            tokens
                .saturating_mul(hidden)
                .saturating_add(block)
                .saturating_mul(4),
            square
                .saturating_mul(2)
                .saturating_add(largest.saturating_mul(3))
                .saturating_mul(4),
        ),
    };
    // The Hessian of held-out tokens, with its mismatch sums if there is a float stream.
    let held_out = match (spec.order, work.aims()) {
        (ColumnOrder::Auto, false) => square.saturating_mul(4),
        (ColumnOrder::Auto, true) => square.saturating_mul(12),
        _ => 0,
    };
    let solving = solver.saturating_add(sums).saturating_add(held_out);
    let Training {
        kept,
        latents,
        beside_latents,
    } = Training::of(work, tokens);
    let all = (block.saturating_mul(4).saturating_add(activations))
        .saturating_add(beside)
        .saturating_add(kept)
        .saturating_add(latents)
        .saturating_add(solving.max(beside_latents))
        .saturating_add(FIXED);
    u64::try_from(all).unwrap_or(u64::MAX)
}

/// What training takes: all of it 0 where there is none.
#[derive(Default)]
struct Training {
    /// Inputs of the block, for all tokens.
    kept: u128,
    /// Latents, scales and zeros, from the sweep on.
    latents: u128,
    /// What is there while the block is trained, when all Hessians are gone.
    beside_latents: u128,
}

impl Training {
    fn of(work: &Work<'_>, tokens: u128) -> Self {
        let Work { model, spec, .. } = *work;
        if !spec.trains() {
            return Training::default();
        }
        let of_block = |grids: bool| {
            let blocks = model.blocks.iter().map(|block| {
                let linears = block.linears().filter(|linear| linear.quantized);
                let count = linears.map(|linear| match grids {
                    true => spec.group_size.count(linear.in_features) * linear.out_features,
                    false => linear.elements(),
                });
                count.sum::<usize>() as u128
            });
            blocks.max().unwrap_or(0)
        };
        let (weights, grids) = (of_block(false), of_block(true));
        let rows = BATCH_TOKENS.max(longest(work));
        // The gradient, two moments, what is kept of the best epoch; a rounded weight twice on its way to the
        // block; the rows of a batch that a tape and its gradients hold.
        let tape = rows.saturating_mul(model.tape_columns() as u128);
        Training {
            kept: tokens
                .saturating_mul(model.hidden_size as u128)
                .saturating_mul(4),
            latents: weights
                .saturating_mul(4)
                .saturating_add(grids.saturating_mul(8)),
            beside_latents: (weights.saturating_mul(4 * 4))
                .saturating_add(grids.saturating_mul(4 * 4))
                .saturating_add(largest(model).saturating_mul(2 * 4))
                .saturating_add(tape.saturating_mul(4)),
        }
    }
}

/// Bytes of host memory of a run on a GPU: activations that wait there, the embedding before the first block, then
/// the block that is on its way to the GPU, the one that is read ahead, and the codes of one that is written.
pub(super) fn beside_gpu(work: &Work<'_>, there: &GpuMemory) -> u64 {
    let model = work.model;
    let embedding = 2 * model.vocab_size as u128 * model.hidden_size as u128;
    let block = model.block_elements() as u128;
    let blocks = block.saturating_mul(2 * 2 + 2);
    let all = LIBRARIES
        .saturating_add(there.in_host_memory as u128)
        .saturating_add(embedding.max(blocks))
        .saturating_add(FIXED);
    u64::try_from(all).unwrap_or(u64::MAX)
}

fn tokens(work: &Work<'_>) -> u128 {
    let of = work
        .windows
        .iter()
        .map(|run| (run.windows as u128).saturating_mul(run.tokens as u128));
    of.fold(0, u128::saturating_add)
}

fn longest(work: &Work<'_>) -> u128 {
    work.windows
        .iter()
        .map(|run| run.tokens as u128)
        .max()
        .unwrap_or(0)
}

fn largest(model: &ModelSpec) -> u128 {
    let linears = model.blocks.iter().flat_map(|block| block.linears());
    linears.map(LinearSpec::elements).max().unwrap_or(0) as u128
}

/// Keys and values that later blocks read, and inputs that blocks look up by token id, in f32.
fn kept_for_blocks(model: &ModelSpec, tokens: u128) -> u128 {
    let lent = (model.blocks.iter())
        .flat_map(|block| block.attention())
        .filter(|attention| attention.keys == KeySource::Donor)
        .map(|attention| 2 * attention.shape.kv_heads * attention.shape.head_dim);
    let by_token = model.embedding.per_block.as_ref();
    let by_token = by_token.map_or(0, |inputs| inputs.width * model.blocks.len());
    let columns = lent.sum::<usize>() + by_token;
    tokens.saturating_mul(columns as u128).saturating_mul(4)
}
