//! Branches and blocks that families share.

use gptq_kernels::AttentionShape;

use super::{Reader, Sizes};
use crate::spec::{
    AttentionSpec, BranchSpec, HeadNormSpec, KeySource, LinearSpec, Mixer, NormSpec, Piece,
    StepSpec,
};

/// Which linears of attention have a bias.
#[derive(Clone, Copy, Default)]
pub(crate) struct AttentionBias {
    /// Queries, keys and values.
    pub input: bool,
    /// `o_proj`.
    pub output: bool,
}

impl AttentionBias {
    /// All of them or none.
    pub fn all(has: bool) -> Self {
        AttentionBias {
            input: has,
            output: has,
        }
    }
}

/// Attention over own keys, with rotary table 0.
pub(crate) fn attention(shape: AttentionShape) -> AttentionSpec {
    AttentionSpec {
        shape,
        rotary: Some(0),
        norms: HeadNormSpec::default(),
        keys: KeySource::Own,
    }
}

/// `self_attn` of block `index`: `q_proj`, `k_proj`, `v_proj`, `o_proj`.
pub(crate) fn attention_branch(
    reader: &Reader<'_>,
    sizes: &Sizes,
    index: usize,
    attention: AttentionSpec,
    bias: AttentionBias,
) -> BranchSpec {
    let shape = attention.shape;
    let (queries, keys) = (
        shape.heads * shape.head_dim,
        shape.kv_heads * shape.head_dim,
    );
    let linear = |name: &str, outputs: usize| {
        reader
            .paths
            .linear(index, name, [sizes.hidden, outputs], bias.input)
    };
    let input = vec![
        linear("self_attn.q_proj", queries),
        linear("self_attn.k_proj", keys),
        linear("self_attn.v_proj", keys),
    ];
    let output = [queries, sizes.hidden];
    BranchSpec {
        mixer: Mixer::Attention(Box::new(attention)),
        operands: whole(&input),
        input,
        output: (reader.paths).linear(index, "self_attn.o_proj", output, bias.output),
        after: None,
    }
}

/// `mlp` of block `index`: `gate_proj`, `up_proj`, `down_proj`.
pub(crate) fn gated_branch(
    reader: &Reader<'_>,
    sizes: &Sizes,
    index: usize,
    width: usize,
    bias: bool,
) -> BranchSpec {
    let linear = |name: &str, shape: [usize; 2]| reader.paths.linear(index, name, shape, bias);
    let input = vec![
        linear("mlp.gate_proj", [sizes.hidden, width]),
        linear("mlp.up_proj", [sizes.hidden, width]),
    ];
    BranchSpec {
        mixer: Mixer::Gated(sizes.activation),
        operands: whole(&input),
        input,
        output: linear("mlp.down_proj", [width, sizes.hidden]),
        after: None,
    }
}

/// `self_attn` of block `index` with one linear for queries, keys and values, unless the checkpoint has
/// them apart.
pub(crate) fn fused_attention_branch(
    reader: &Reader<'_>,
    sizes: &Sizes,
    index: usize,
    attention: AttentionSpec,
    bias: AttentionBias,
) -> BranchSpec {
    let shape = attention.shape;
    let branch = attention_branch(reader, sizes, index, attention, bias);
    if reader.paths.has(index, "self_attn.q_proj") {
        return branch;
    }
    let widths = [shape.heads, shape.kv_heads, shape.kv_heads].map(|heads| heads * shape.head_dim);
    let linear = [sizes.hidden, widths.iter().sum()];
    BranchSpec {
        input: vec![(reader.paths).linear(index, "self_attn.qkv_proj", linear, bias.input)],
        operands: fused(&widths),
        ..branch
    }
}

/// `mlp` of block `index` with one linear for gate and up, unless the checkpoint has them apart.
pub(crate) fn fused_gated_branch(
    reader: &Reader<'_>,
    sizes: &Sizes,
    index: usize,
    width: usize,
    bias: bool,
) -> BranchSpec {
    let branch = gated_branch(reader, sizes, index, width, bias);
    if reader.paths.has(index, "mlp.gate_proj") {
        return branch;
    }
    let linear = [sizes.hidden, 2 * width];
    BranchSpec {
        input: vec![reader.paths.linear(index, "mlp.gate_up_proj", linear, bias)],
        operands: fused(&[width, width]),
        ..branch
    }
}

/// `mlp` of block `index` without a gate: `c_fc`, `c_proj`.
pub(crate) fn plain_branch(
    reader: &Reader<'_>,
    sizes: &Sizes,
    index: usize,
    width: usize,
    bias: bool,
) -> BranchSpec {
    let linear = |name: &str, shape: [usize; 2]| reader.paths.linear(index, name, shape, bias);
    let input = vec![linear("mlp.c_fc", [sizes.hidden, width])];
    BranchSpec {
        mixer: Mixer::Plain(sizes.activation),
        operands: whole(&input),
        input,
        output: linear("mlp.c_proj", [width, sizes.hidden]),
        after: None,
    }
}

/// The whole output of each linear.
pub(crate) fn whole(linears: &[LinearSpec]) -> Vec<Piece> {
    let pieces = linears.iter().enumerate();
    (pieces.map(|(linear, spec)| Piece {
        linear,
        columns: 0..spec.out_features,
    }))
    .collect()
}

/// Runs of columns of one fused linear.
pub(crate) fn fused(widths: &[usize]) -> Vec<Piece> {
    let mut first = 0;
    let piece = |width: &usize| {
        first += width;
        Piece {
            linear: 0,
            columns: first - width..first,
        }
    };
    widths.iter().map(piece).collect()
}

/// A step of one branch.
pub(crate) fn step(norm: Option<NormSpec>, branch: BranchSpec) -> StepSpec {
    StepSpec {
        norm,
        branches: vec![branch],
        residual_factor: 1.0,
    }
}

/// Norms of queries and keys over each head.
pub(crate) fn norms_of_heads(reader: &Reader<'_>, sizes: &Sizes, index: usize) -> HeadNormSpec {
    query_and_key_norms(reader, sizes, index, [sizes.head_dim; 2])
}

/// Norms of queries and keys over all heads together.
pub(crate) fn norms_of_projections(
    reader: &Reader<'_>,
    sizes: &Sizes,
    index: usize,
) -> HeadNormSpec {
    query_and_key_norms(reader, sizes, index, [sizes.queries(), sizes.keys()])
}

fn query_and_key_norms(
    reader: &Reader<'_>,
    sizes: &Sizes,
    index: usize,
    [queries, keys]: [usize; 2],
) -> HeadNormSpec {
    HeadNormSpec {
        query: Some(sizes.norm(reader, index, "self_attn.q_norm", queries)),
        key: Some(sizes.norm(reader, index, "self_attn.k_norm", keys)),
        ..HeadNormSpec::default()
    }
}
