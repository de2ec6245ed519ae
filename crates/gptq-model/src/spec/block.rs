//! A block: steps that each add to the hidden states.

use std::ops::Range;

use gptq_kernels::{Activation, AttentionShape};
use gptq_types::LayerName;

use super::NormSpec;

/// A decoder block, from hidden states to hidden states.
#[derive(Clone, Debug, PartialEq)]
pub struct BlockSpec {
    /// One after the other: attention and feed-forward in most models, both side by side in one step in
    /// some (Cohere).
    pub steps: Vec<StepSpec>,
    /// Tensor `[1]` that multiplies the hidden states at the end.
    pub output_factor: Option<String>,
}

/// `hidden += factor * sum of branch(norm(hidden))`.
#[derive(Clone, Debug, PartialEq)]
pub struct StepSpec {
    /// Before the branches; the hidden states as they are where there is none.
    pub norm: Option<NormSpec>,
    /// Side by side, from the same input.
    pub branches: Vec<BranchSpec>,
    /// Multiplies what is added.
    pub residual_factor: f32,
}

/// `after(output(mix(input(x))))`.
#[derive(Clone, Debug, PartialEq)]
pub struct BranchSpec {
    /// The mixer between its linears.
    pub mixer: Mixer,
    /// Linears that read `x`.
    pub input: Vec<LinearSpec>,
    /// Where the mixer's operands lie in their outputs: queries, keys, values; gate, up; or the one input.
    pub operands: Vec<Piece>,
    /// The linear that reads what is mixed.
    pub output: LinearSpec,
    /// The norm of its output.
    pub after: Option<NormSpec>,
}

/// The computation of a branch between its linears.
#[derive(Clone, Debug, PartialEq)]
pub enum Mixer {
    /// Causal attention. Operands: queries, keys, values; queries alone where another block has the others.
    Attention(Box<AttentionSpec>),
    /// `activation(gate) * up`.
    Gated(Activation),
    /// `activation(x)`.
    Plain(Activation),
    /// `activation(x) * row`, the row that the block looked up by token id.
    PerBlockInput(Activation),
}

/// Causal attention with rotary positions.
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionSpec {
    /// Heads, and how scores become weights.
    pub shape: AttentionShape,
    /// Index into [`super::ModelSpec::rotaries`]; `None` without positional encoding.
    pub rotary: Option<usize>,
    /// Norms of queries, keys and values.
    pub norms: HeadNormSpec,
    /// Where keys and values come from.
    pub keys: KeySource,
}

/// Norms between the projections and the scores: over a head where `width` is that of a head, else over
/// the whole projection.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HeadNormSpec {
    /// Norm of queries.
    pub query: Option<NormSpec>,
    /// Norm of keys.
    pub key: Option<NormSpec>,
    /// Norm of values.
    pub value: Option<NormSpec>,
    /// Queries and keys are normed behind the rotary embedding (Hunyuan), not before it.
    pub after_rotation: bool,
}

/// The source of the keys and values that a block attends to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeySource {
    /// Its own.
    Own,
    /// Its own, which later blocks read too.
    Donor,
    /// Keys and values of an earlier block.
    Block(usize),
}

/// A linear, `y = x W^T + bias`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinearSpec {
    /// Module path in the checkpoint.
    pub name: LayerName,
    /// Columns of its input.
    pub in_features: usize,
    /// Columns of its output.
    pub out_features: usize,
    /// It has a bias.
    pub bias: bool,
    /// It is quantized; else it stays in float.
    pub quantized: bool,
}

impl LinearSpec {
    /// `[in_features, out_features]`.
    pub fn shape(&self) -> [usize; 2] {
        [self.in_features, self.out_features]
    }

    /// Elements of the weight.
    pub fn elements(&self) -> usize {
        self.in_features * self.out_features
    }
}

/// Columns of the output of one linear of several.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Which linear.
    pub linear: usize,
    /// Its columns.
    pub columns: Range<usize>,
}

/// Quantized linears that read the same rows: one Hessian, one factor, solved together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CaptureGroup {
    /// Where in the block the rows arise.
    pub tap: Tap,
    /// The linears, all of the same input width; at least one.
    pub linears: Vec<LinearSpec>,
}

impl CaptureGroup {
    /// Columns of the rows.
    pub fn in_features(&self) -> usize {
        self.linears[0].in_features
    }
}

/// A place in a block where rows can be looked at. Places are ordered as the data passes them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tap {
    /// Index into [`BlockSpec::steps`].
    pub step: usize,
    /// The branch whose `output` reads the rows; `None`: the rows that `input` of all branches reads.
    pub branch: Option<usize>,
}

impl BlockSpec {
    /// Its capture groups, in true-sequential order.
    pub fn groups(&self) -> Vec<CaptureGroup> {
        let mut groups = Vec::new();
        for (step, StepSpec { branches, .. }) in self.steps.iter().enumerate() {
            let inputs = branches.iter().flat_map(|branch| &branch.input);
            let input = Tap { step, branch: None };
            let outputs = branches.iter().enumerate().map(|(branch, spec)| {
                let branch = Some(branch);
                (Tap { step, branch }, vec![&spec.output])
            });
            for (tap, linears) in std::iter::once((input, inputs.collect())).chain(outputs) {
                let quantized = linears.into_iter().filter(|linear| linear.quantized);
                let linears: Vec<LinearSpec> = quantized.cloned().collect();
                if !linears.is_empty() {
                    groups.push(CaptureGroup { tap, linears });
                }
            }
        }
        groups
    }

    /// All linears, quantized or not.
    pub fn linears(&self) -> impl Iterator<Item = &LinearSpec> {
        (self.branches()).flat_map(|branch| branch.input.iter().chain([&branch.output]))
    }

    /// All branches, in the order of the data.
    pub fn branches(&self) -> impl Iterator<Item = &BranchSpec> {
        self.steps.iter().flat_map(|step| &step.branches)
    }

    /// Its attention layers; one in all models so far.
    pub fn attention(&self) -> impl Iterator<Item = &AttentionSpec> {
        self.branches().filter_map(|branch| match &branch.mixer {
            Mixer::Attention(attention) => Some(&**attention),
            _ => None,
        })
    }

    /// Elements of its linears.
    pub fn elements(&self) -> usize {
        self.linears().map(LinearSpec::elements).sum()
    }

    /// Its norms.
    pub fn norms(&self) -> impl Iterator<Item = &NormSpec> {
        self.steps.iter().flat_map(|step| {
            let of_branches = step.branches.iter().flat_map(|branch| {
                let heads = match &branch.mixer {
                    Mixer::Attention(attention) => {
                        let HeadNormSpec {
                            query, key, value, ..
                        } = &attention.norms;
                        [query.as_ref(), key.as_ref(), value.as_ref()]
                    }
                    _ => [None; 3],
                };
                heads.into_iter().flatten().chain(&branch.after)
            });
            step.norm.iter().chain(of_branches)
        })
    }

    /// Its plain tensors and their shapes: norms and factors.
    pub fn plain_tensors(&self) -> Vec<(String, Vec<usize>)> {
        let norms = self.norms().flat_map(NormSpec::tensors);
        let factor = self
            .output_factor
            .iter()
            .map(|name| (name.clone(), vec![1]));
        norms.chain(factor).collect()
    }
}
