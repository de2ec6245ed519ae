//! A decoder as data: what is computed, over which tensors, in which order.
//!
//! [`ModelSpec::read`] makes one of `config.json` and the names of a checkpoint's tensors (one file a
//! family under `arch`). All else follows from it: which tensors there must be and in which shape, which
//! linears read the same rows ([`BlockSpec::groups`]), what a block costs in bytes and operations, and
//! the forward pass itself ([`crate::forward`]).

mod beside;
mod block;
mod check;
mod rotary;

use gptq_types::{Dtype, LayerName};

pub use block::{
    AttentionSpec, BlockSpec, BranchSpec, CaptureGroup, HeadNormSpec, KeySource, LinearSpec, Mixer,
    Piece, StepSpec, Tap,
};
pub(crate) use check::{MAX_BLOCKS, MAX_POSITIONS, MAX_WIDTH, WIDTH, within};
pub use rotary::{QueryFactor, RotarySpec};

use crate::ConfigError;
use crate::arch;

/// A decoder.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelSpec {
    /// `model_type` of the text model.
    pub architecture: String,
    /// Width of the hidden states.
    pub hidden_size: usize,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Positions the model was trained for.
    pub max_position_embeddings: usize,
    /// From token ids to hidden states.
    pub embedding: EmbeddingSpec,
    /// The blocks, which may differ.
    pub blocks: Vec<BlockSpec>,
    /// Tables of cosines and sines; attention names one by its place here.
    pub rotaries: Vec<RotarySpec>,
    /// The norm before the head.
    pub final_norm: NormSpec,
    /// From hidden states to logits.
    pub head: HeadSpec,
    /// Every text begins with the beginning-of-sequence token, without which the family computes nonsense.
    pub begins_with_bos: bool,
    /// Trained in bf16, with hidden states that f16 cannot hold.
    pub overflows_f16: bool,
    /// Tensors beside the decoder's are carried along: it is the text model of a multimodal checkpoint.
    pub multimodal: bool,
    /// Modules that a checkpoint may hold and its model does not use.
    pub unused: Vec<String>,
    /// Keys of the file that nobody here knows: whether they change the model is not known either.
    pub unread_keys: Vec<String>,
}

/// From token ids to hidden states.
#[derive(Clone, Debug, PartialEq)]
pub struct EmbeddingSpec {
    /// Tensor `[vocab_size, hidden_size]`.
    pub name: String,
    /// Multiplies its rows.
    pub factor: f32,
    /// That factor, and the one of rows by block, are rounded to the type in which the model computes, as
    /// they are where they belong to the embedding (Gemma); [`ModelSpec::computed_in`].
    pub rounds_factor: bool,
    /// Inputs of each block by token id.
    pub per_block: Option<PerBlockInputSpec>,
}

/// Inputs that every block looks up by token id (Gemma 3n and 4, "per-layer embeddings"). Those of all
/// blocks are `(rows * row_factor + norm(embeddings P * projection_factor)) * factor`,
/// `[tokens, blocks * width]`, the norm over runs of `width`.
#[derive(Clone, Debug, PartialEq)]
pub struct PerBlockInputSpec {
    /// Tensor `[vocab, blocks * width]`.
    pub table: String,
    /// Its rows.
    pub vocab: usize,
    /// Columns of one block.
    pub width: usize,
    /// Multiplies rows of the table.
    pub row_factor: f32,
    /// Tensor `[blocks * width, hidden_size]`, multiplied by the scaled embeddings.
    pub projection: String,
    /// Multiplies that product.
    pub projection_factor: f32,
    /// Over runs of `width` columns of the product.
    pub norm: NormSpec,
    /// Multiplies the sum.
    pub factor: f32,
}

/// From hidden states to logits.
#[derive(Clone, Debug, PartialEq)]
pub struct HeadSpec {
    /// Tensor `[vocab_size, hidden_size]`; the embedding's where both are one.
    pub name: String,
    /// The head is the embedding.
    pub tied: bool,
    /// The name under which a checkpoint may repeat a tied head.
    pub own_name: String,
    /// Multiplies logits.
    pub factor: f32,
    /// Logits `l` become `cap * tanh(l / cap)`.
    pub soft_cap: Option<f32>,
}

/// A norm over runs of `width` columns.
#[derive(Clone, Debug, PartialEq)]
pub struct NormSpec {
    /// Its mathematics.
    pub kind: NormKind,
    /// Tensor `[width]`; ones where there is none.
    pub weight: Option<String>,
    /// Tensor `[width]`.
    pub bias: Option<String>,
    /// Columns that are normed together.
    pub width: usize,
    /// Added to the stored weight: 1 where a model stores the difference from it (Gemma).
    pub offset: f32,
    /// Added to the mean square, or to the variance.
    pub eps: f64,
}

/// The mathematics of a norm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// `x / sqrt(mean(x^2) + eps) * weight` (Zhang and Sennrich 2019, eq. 4).
    Rms,
    /// `(x - mean) / sqrt(variance + eps) * weight + bias` (Ba et al. 2016).
    Layer,
}

impl NormSpec {
    /// A root-mean-square norm by the name of its weight.
    pub fn rms(weight: String, width: usize, eps: f64) -> Self {
        NormSpec {
            kind: NormKind::Rms,
            weight: Some(weight),
            bias: None,
            width,
            offset: 0.0,
            eps,
        }
    }

    /// Its tensors.
    pub fn tensors(&self) -> impl Iterator<Item = (String, Vec<usize>)> + '_ {
        (self.weight.iter().chain(&self.bias)).map(|name| (name.clone(), vec![self.width]))
    }
}

impl ModelSpec {
    /// Reads the text of a `config.json`. `names` are those of the checkpoint's tensors; without any, the
    /// names are the ones that transformers writes.
    ///
    /// # Errors
    /// Text that is no config, a key without which nothing can be said, a value that cannot be meant, and
    /// what is not computed here, each by name.
    pub fn read(text: &str, names: &[String]) -> Result<Self, ConfigError> {
        arch::read(text, names)
    }

    /// Reads a config without the names of tensors.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        Self::read(text, &[])
    }

    /// The same where it computes in `dtype`: what is rounded to that type is. On a processor, in f32,
    /// nothing is.
    pub fn computed_in(mut self, dtype: Dtype) -> Self {
        let rounded = |value: f32| match dtype {
            Dtype::F16 => half::f16::from_f32(value).to_f32(),
            Dtype::BF16 => half::bf16::from_f32(value).to_f32(),
            _ => value,
        };
        if self.embedding.rounds_factor {
            self.embedding.factor = rounded(self.embedding.factor);
            if let Some(inputs) = &mut self.embedding.per_block {
                inputs.row_factor = rounded(inputs.row_factor);
            }
        }
        self
    }

    /// All linears of block `index` that are quantized, in true-sequential order.
    pub fn block_linears(&self, index: usize) -> Vec<LinearSpec> {
        let groups = self.blocks[index].groups();
        groups.into_iter().flat_map(|group| group.linears).collect()
    }

    /// The linear of that name.
    pub fn linear(&self, name: &LayerName) -> Option<&LinearSpec> {
        let linears = self.blocks.iter().flat_map(BlockSpec::linears);
        linears.into_iter().find(|linear| linear.name == *name)
    }

    /// Linears that are quantized.
    pub fn quantized_linears(&self) -> usize {
        (0..self.blocks.len())
            .map(|index| self.block_linears(index).len())
            .sum()
    }

    /// Elements of the weights of the largest block.
    pub fn block_elements(&self) -> usize {
        self.blocks
            .iter()
            .map(BlockSpec::elements)
            .max()
            .unwrap_or(0)
    }

    /// Elements of the weights of all blocks.
    pub fn elements(&self) -> usize {
        self.blocks.iter().map(BlockSpec::elements).sum()
    }

    /// Floating-point operations of block `index` for windows of `tokens`: linears, and twice the part of
    /// the score matrix that causal attention needs.
    pub fn block_flop(&self, index: usize, windows: usize, tokens: usize) -> f64 {
        let all = (windows * tokens) as f64;
        let block = &self.blocks[index];
        let attention: f64 = (block.attention())
            .map(|attention| {
                let width = (attention.shape.heads * attention.shape.head_dim) as f64;
                let seen = attention.shape.window.unwrap_or(tokens).min(tokens) as f64;
                // The mean number of keys that a query sees, twice.
                let keys = 2.0 * seen - seen * (seen - 1.0) / tokens as f64;
                2.0 * all * keys * width
            })
            .sum();
        2.0 * all * block.elements() as f64 + attention
    }

    /// Columns of the widest input of a linear.
    pub fn widest_input(&self) -> usize {
        let linears = self.blocks.iter().flat_map(BlockSpec::linears);
        linears.map(|linear| linear.in_features).max().unwrap_or(0)
    }
}
