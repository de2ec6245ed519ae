//! Which tensors the result has and in which files they lie, known before any is computed.

use std::collections::BTreeSet;

use gptq_model::DecoderConfig;
use gptq_packer::{CheckpointLayout, packed_tensors};
use gptq_types::{LayerName, QuantSpec, Stage, TensorInfo, TensorSource};

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
        config: &DecoderConfig,
        spec: &QuantSpec,
        max_shard_bytes: u64,
    ) -> Result<Self, PipelineError> {
        let mut tensors: Vec<(String, TensorInfo)> = Vec::new();
        let mut replaced = BTreeSet::new();
        let mut in_blocks = Vec::new();
        let mut permuted = BTreeSet::new();
        for index in 0..config.num_hidden_layers {
            if spec.order.may_fold() {
                let before = Fold::all_before(config, index, spec.group_size);
                permuted.extend(before.iter().map(|layer| layer.tensor("bias")));
            }
            for stage in Stage::ALL {
                for (layer, k, n) in config.linears(index, stage) {
                    replaced.insert(layer.tensor("weight"));
                    in_blocks.extend(packed(&layer, k, n, spec));
                }
            }
        }
        let mut copied = Vec::new();
        for name in source.names() {
            let derived = name.ends_with("rotary_emb.inv_freq")
                || (config.tie_word_embeddings && name == "lm_head.weight");
            if !derived && !replaced.contains(&name) {
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
fn packed(layer: &LayerName, k: usize, n: usize, spec: &QuantSpec) -> Vec<(String, TensorInfo)> {
    packed_tensors(layer, k, n, spec, false)
}
