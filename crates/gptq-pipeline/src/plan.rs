//! The tensors of the result and their files, known before any tensor is computed.

use std::collections::BTreeSet;

use gptq_model::{LinearSpec, ModelSpec};
use gptq_packer::{CheckpointLayout, packed_tensors};
use gptq_types::{QuantSpec, TensorInfo, TensorSource};

use crate::PipelineError;
use crate::fold::Fold;

/// The layout of the output, and the tensors that pass through unchanged.
pub struct OutputPlan {
    /// Files and offsets.
    pub layout: CheckpointLayout,
    /// Names copied byte for byte: embeddings, norms, an untied head, and biases but for those that a
    /// folded order permutes.
    pub copied: Vec<String>,
}

impl OutputPlan {
    /// Plans the output for a checked source.
    pub fn new(
        source: &dyn TensorSource,
        model: &ModelSpec,
        spec: &QuantSpec,
        max_shard_bytes: u64,
    ) -> Result<Self, PipelineError> {
        let mut tensors: Vec<(String, TensorInfo)> = Vec::new();
        let mut replaced = BTreeSet::new();
        let mut in_blocks = Vec::new();
        let mut permuted = BTreeSet::new();
        for index in 0..model.blocks.len() {
            if spec.order.may_fold() {
                let before = Fold::all_before(model, index, spec.group_size);
                permuted.extend(before.iter().map(|layer| layer.tensor("bias")));
            }
            for linear in model.block_linears(index) {
                replaced.insert(linear.name.tensor("weight"));
                in_blocks.extend(packed(&linear, spec));
            }
        }
        let mut copied = Vec::new();
        for name in source.names() {
            if !model.is_derived(&name) && !replaced.contains(&name) {
                tensors.push((name.clone(), source.require(&name)?));
                if !permuted.contains(&name) {
                    copied.push(name);
                }
            }
        }
        tensors.extend(in_blocks);
        Ok(OutputPlan {
            layout: CheckpointLayout::plan(tensors, max_shard_bytes)?,
            copied,
        })
    }
}

/// The packed tensors of a layer without its bias, which is copied like every plain tensor.
fn packed(linear: &LinearSpec, spec: &QuantSpec) -> Vec<(String, TensorInfo)> {
    let [in_features, out_features] = linear.shape();
    packed_tensors(&linear.name, in_features, out_features, spec, false)
}
