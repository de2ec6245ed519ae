//! A matrix of permutations before any work: presets, plan files, and what each branch will be.

pub(crate) mod estimate;
mod plan_file;
mod presets;

use std::collections::BTreeSet;

use gptq_model::DecoderConfig;
use gptq_packer::readings;
use gptq_types::{Method, Permutation, PlannedBranch, TensorSource};

use crate::{OutputPlan, PipelineError, check_shapes};

pub use plan_file::{PlanError, check_permutations, read_plan};
pub use presets::Preset;

/// Sizes and readers of every branch, from headers alone; why a branch cannot be made.
pub fn plan_matrix(
    source: &dyn TensorSource,
    config: &DecoderConfig,
    permutations: Vec<Permutation>,
    max_shard_bytes: u64,
) -> Result<Vec<PlannedBranch>, PipelineError> {
    (permutations.into_iter())
        .map(|permutation| plan_branch(source, config, permutation, max_shard_bytes))
        .collect()
}

fn plan_branch(
    source: &dyn TensorSource,
    config: &DecoderConfig,
    permutation: Permutation,
    max_shard_bytes: u64,
) -> Result<PlannedBranch, PipelineError> {
    let refusal = permutation.spec.validate().err().map(|e| e.to_string());
    let refusal = refusal.or_else(|| refuse(config, &permutation));
    if refusal.is_some() {
        return Ok(PlannedBranch {
            permutation,
            refusal,
            weight_bytes: 0,
            bits_per_weight: 0.0,
            readings: Vec::new(),
            flop: 0.0,
            memory: 0,
        });
    }
    let spec = &permutation.spec;
    let linears = config.block_linears(0);
    let shapes: BTreeSet<(usize, usize)> = linears.iter().map(|&(_, k, n)| (k, n)).collect();
    let shapes: Vec<(usize, usize)> = shapes.into_iter().collect();
    let layout = OutputPlan::new(source, config, spec, max_shard_bytes)?.layout;
    let packed: u64 = (linears.iter())
        .flat_map(|(layer, ..)| {
            ["qweight", "qzeros", "scales", "g_idx"].map(|suffix| layer.tensor(suffix))
        })
        .filter_map(|name| Some(layout.placement(&name)?.bytes))
        .sum();
    let weights: usize = linears.iter().map(|(_, k, n)| k * n).sum();
    Ok(PlannedBranch {
        refusal,
        weight_bytes: layout.file_bytes(),
        bits_per_weight: 8.0 * packed as f64 / weights as f64,
        readings: readings(spec, &shapes),
        flop: estimate::flop(config, &permutation),
        memory: estimate::memory(config, &permutation),
        permutation,
    })
}

fn refuse(config: &DecoderConfig, permutation: &Permutation) -> Option<String> {
    if let Err(error) = check_shapes(config, &permutation.spec) {
        return Some(error.to_string());
    }
    let calibration = &permutation.calibration;
    let (asked, most) = (calibration.seq_len, config.max_position_embeddings);
    let calibrated = permutation.spec.method == Method::Gptq;
    (calibrated && asked > most)
        .then(|| format!("windows of {asked} tokens exceed the model's {most} positions"))
}
