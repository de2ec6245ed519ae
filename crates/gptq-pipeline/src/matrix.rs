//! A matrix of permutations before any work: presets, plan files, and what each branch will be.

mod plan_file;
mod presets;

use std::collections::BTreeSet;

use gptq_model::{LinearSpec, ModelSpec};
use gptq_packer::readings;
use gptq_types::{Method, Permutation, PlannedBranch, TensorSource};

use crate::{OutputPlan, PipelineError, check_shapes, estimate};

pub use plan_file::{PlanError, check_permutations, read_plan};
pub use presets::Preset;

/// Sizes and readers of every branch, from headers alone; why a branch cannot be made.
pub fn plan_matrix(
    source: &dyn TensorSource,
    model: &ModelSpec,
    permutations: Vec<Permutation>,
    max_shard_bytes: u64,
) -> Result<Vec<PlannedBranch>, PipelineError> {
    (permutations.into_iter())
        .map(|permutation| plan_branch(source, model, permutation, max_shard_bytes))
        .collect()
}

fn plan_branch(
    source: &dyn TensorSource,
    model: &ModelSpec,
    permutation: Permutation,
    max_shard_bytes: u64,
) -> Result<PlannedBranch, PipelineError> {
    let refusal = permutation.spec.validate().err().map(|e| e.to_string());
    let refusal = refusal.or_else(|| refuse(model, &permutation));
    if refusal.is_some() {
        return Ok(PlannedBranch {
            permutation,
            refusal,
            weight_bytes: 0,
            bits_per_weight: 0.0,
            readings: Vec::new(),
            flop: 0.0,
            memory: 0,
            forecast: None,
        });
    }
    let spec = &permutation.spec;
    let linears: Vec<LinearSpec> = (0..model.blocks.len())
        .flat_map(|index| model.block_linears(index))
        .collect();
    let shapes: BTreeSet<(usize, usize)> = linears.iter().map(|l| l.shape().into()).collect();
    let shapes: Vec<(usize, usize)> = shapes.into_iter().collect();
    let layout = OutputPlan::new(source, model, spec, max_shard_bytes)?.layout;
    let packed: u64 = (linears.iter())
        .flat_map(|linear| {
            ["qweight", "qzeros", "scales", "g_idx"].map(|suffix| linear.name.tensor(suffix))
        })
        .filter_map(|name| Some(layout.placement(&name)?.bytes))
        .sum();
    let weights: usize = linears.iter().map(LinearSpec::elements).sum();
    Ok(PlannedBranch {
        refusal,
        weight_bytes: layout.file_bytes(),
        bits_per_weight: 8.0 * packed as f64 / weights as f64,
        readings: readings(spec, &shapes),
        flop: estimate::flop(model, &permutation),
        memory: estimate::host_memory(model, &permutation),
        forecast: None,
        permutation,
    })
}

fn refuse(model: &ModelSpec, permutation: &Permutation) -> Option<String> {
    if let Err(error) = check_shapes(model, &permutation.spec) {
        return Some(error.to_string());
    }
    let calibration = &permutation.calibration;
    let (asked, most) = (calibration.seq_len, model.max_position_embeddings);
    let calibrated = permutation.spec.method == Method::Gptq;
    (calibrated && asked > most)
        .then(|| format!("windows of {asked} tokens exceed the model's {most} positions"))
}
