//! Families that differ from Llama in a few places: one block after another of attention and a
//! feed-forward.

use super::parts::{AttentionBias, attention, attention_branch, gated_branch, step};
use super::rotaries::Rotaries;
use super::{Reader, Sizes};
use crate::config::ConfigError;
use crate::spec::{AttentionSpec, BlockSpec, BranchSpec, HeadNormSpec, ModelSpec, StepSpec};

/// Makes `self_attn` of a block.
type AttentionBranch = fn(&Reader<'_>, &Sizes, usize, AttentionSpec, AttentionBias) -> BranchSpec;

/// Makes `mlp` of a block of a width, with or without biases.
type FeedForward = fn(&Reader<'_>, &Sizes, usize, usize, bool) -> BranchSpec;

/// The differences of a family from Llama.
pub(super) struct Relative {
    pub attention: AttentionBranch,
    pub feed_forward: FeedForward,
    pub attention_bias: AttentionBias,
    pub mlp_bias: bool,
    pub head_norms: fn(&Reader<'_>, &Sizes, usize) -> HeadNormSpec,
    pub layout: Layout,
    /// Multiplies scores where it is not the root of the width of a head that divides them.
    pub scale: Option<f32>,
    /// Soft cap of attention scores.
    pub soft_cap: Option<f32>,
    /// Factor of the branch that a step adds to the residual.
    pub residual_factor: f32,
    /// Sliding window of each block.
    pub windows: Vec<Option<usize>>,
}

/// Where the norms of a block stand, by their names.
#[derive(Clone, Copy)]
pub(super) enum Layout {
    /// Attention, then the feed-forward.
    InTurn {
        before: [Option<&'static str>; 2],
        after: [Option<&'static str>; 2],
    },
    /// Both from one normed input.
    SideBySide { before: &'static str },
}

impl Layout {
    /// A norm before each (Llama).
    pub const BEFORE: Layout = Layout::InTurn {
        before: [Some("input_layernorm"), Some("post_attention_layernorm")],
        after: [None, None],
    };
    /// A norm behind each (OLMo 2).
    pub const AFTER: Layout = Layout::InTurn {
        before: [None, None],
        after: [
            Some("post_attention_layernorm"),
            Some("post_feedforward_layernorm"),
        ],
    };
    /// Norms before and behind each (Gemma 2).
    pub const AROUND: Layout = Layout::InTurn {
        before: [Some("input_layernorm"), Some("pre_feedforward_layernorm")],
        after: [
            Some("post_attention_layernorm"),
            Some("post_feedforward_layernorm"),
        ],
    };

    /// A block of both branches.
    pub fn block(
        self,
        reader: &Reader<'_>,
        sizes: &Sizes,
        index: usize,
        [mut attention, mut feed_forward]: [BranchSpec; 2],
    ) -> BlockSpec {
        let norm = |name: &str| sizes.norm(reader, index, name, sizes.hidden);
        let steps = match self {
            Layout::InTurn { before, after } => {
                [attention.after, feed_forward.after] = after.map(|name| name.map(norm));
                let [first, second] = before.map(|name| name.map(norm));
                vec![step(first, attention), step(second, feed_forward)]
            }
            Layout::SideBySide { before } => vec![StepSpec {
                branches: vec![attention, feed_forward],
                norm: Some(norm(before)),
                residual_factor: 1.0,
            }],
        };
        BlockSpec {
            steps,
            output_factor: None,
        }
    }
}

impl Relative {
    /// Llama with windows.
    pub fn new(windows: Vec<Option<usize>>) -> Self {
        Relative {
            attention: attention_branch,
            feed_forward: gated_branch,
            attention_bias: AttentionBias::default(),
            mlp_bias: false,
            head_norms: |_, _, _| HeadNormSpec::default(),
            layout: Layout::BEFORE,
            scale: None,
            soft_cap: None,
            residual_factor: 1.0,
            windows,
        }
    }

    /// The model.
    pub fn model(&self, reader: &Reader<'_>, sizes: &Sizes, rotaries: Rotaries) -> ModelSpec {
        let mut model = sizes.model(reader);
        model.unread_keys.extend(rotaries.unread_keys);
        model.rotaries = rotaries.tables;
        for (index, (&window, rotary)) in self.windows.iter().zip(rotaries.of_block).enumerate() {
            let mut attention = attention(sizes.shape());
            attention.rotary = rotary;
            attention.shape.window = window;
            attention.shape.scale = self.scale.unwrap_or(attention.shape.scale);
            attention.shape.soft_cap = self.soft_cap;
            attention.norms = (self.head_norms)(reader, sizes, index);
            let bias = self.attention_bias;
            let attention = (self.attention)(reader, sizes, index, attention, bias);
            let width = sizes.intermediate;
            let feed_forward = (self.feed_forward)(reader, sizes, index, width, self.mlp_bias);
            let branches = [attention, feed_forward];
            let mut block = self.layout.block(reader, sizes, index, branches);
            for step in &mut block.steps {
                step.residual_factor = self.residual_factor;
            }
            model.blocks.push(block);
        }
        model
    }
}

/// Names a flag that the family does not read where it is not what the family does anyway, as
/// transformers has it: which tensors there are decides.
pub(super) fn name_unlike(
    sizes: &mut Sizes,
    reader: &Reader<'_>,
    flags: &[(&'static str, bool)],
) -> Result<(), ConfigError> {
    for &(key, does) in flags {
        if reader.fields.flag(key, does)? != does {
            sizes.unread_keys.push(key.to_string());
        }
    }
    Ok(())
}
