//! The operations of a decoder block beside a Burn backend.
//!
//! Burn's own operations round differently from Hugging Face's (its norm rounds the mean first,
//! its rotary embedding is interleaved), and its products run at a half (CPU) or a third (GPU) of
//! the rate of the libraries made for them. So a backend says here how it does the operations that
//! matter; tensors and their life stay Burn's.

pub(crate) mod host;

use std::ops::Range;

use burn::tensor::backend::Backend;
use gptq_kernels::{Activation, Activations, AttentionShape, Rotation, RowScale, Weight};
use gptq_types::{LayerName, SourceError};

use crate::ModelError;
use crate::Streams;
use crate::budget::GpuRun;
use crate::float_stream::is_followed;
use crate::head::HostHead;
use crate::score::HeadInput;
use crate::spec::{BlockSpec, KeySource, ModelSpec, NormKind};
use crate::training_sizes::TrainingSizes;
use crate::weights::{LinearValues, LinearWeights, WeightSource};

/// A tensor of a decoder backend.
pub(crate) type Tensor<B, const D: usize> = burn::tensor::Tensor<<B as DecoderBackend>::Tensors, D>;

/// A backend that can run a decoder block. Rows of tensors are tokens.
///
/// Operations do not fail one by one: work on a GPU is queued anyway, and what went wrong shows in
/// [`DecoderBackend::check`].
pub(crate) trait DecoderBackend: Clone + 'static {
    /// The backend of Burn that has the tensors: this type, or Flex, which holds tensors of either precision.
    type Tensors: Backend;
    /// The device, passed to every operation.
    type Context: Clone;
    /// A bias, where operations want it.
    type Vector;
    /// A norm's weight and bias.
    type Norm;
    /// A table of rotary cosines and sines.
    type RotaryTable;
    /// The embedding.
    type Table;
    /// A store for activations that are needed later.
    type ActivationStore;
    /// An activation in a store.
    type Offloaded;
    /// The head and the norm before it.
    type Head;

    /// Rows of a batch.
    const BATCH_TOKENS: usize;
    /// Whether the next block is read from its files while this one is worked on.
    const PREFETCH: bool;
    /// Whether the inputs of all output linears of a step are stored; else only that of the first branch.
    const EVERY_INNER: bool;

    /// The first thing that went wrong since the last call.
    fn check(on: &Self::Context) -> Result<(), ModelError>;

    /// Gives memory of past operations back, before much of it is needed for something else.
    fn tidy(on: &Self::Context);

    /// Reads a linear of `[in_features, out_features]` in the form that [`DecoderBackend::weight`] takes.
    fn read(
        source: &dyn WeightSource,
        layer: &LayerName,
        shape: [usize; 2],
        bias: bool,
    ) -> Result<LinearWeights, SourceError>;

    /// A weight of `in_features` and `out_features`; its layout is the backend's own.
    fn weight(
        on: &Self::Context,
        values: LinearValues,
        in_features: usize,
        out_features: usize,
    ) -> Tensor<Self, 2>;

    /// A weight that stays when solvers write over this one; in the place of one that nobody needs any
    /// more, where its shape is the same: a GPU waits for all work when memory is given back.
    fn copied(
        on: &Self::Context,
        weight: &Tensor<Self, 2>,
        place: Option<Tensor<Self, 2>>,
    ) -> Tensor<Self, 2>;

    /// The weight as solvers see it.
    fn show_weight(weight: &Tensor<Self, 2>) -> Weight<'_>;

    /// A vector.
    fn vector(on: &Self::Context, values: Vec<f32>) -> Self::Vector;

    /// A norm, its offset added.
    fn norm_weights(
        on: &Self::Context,
        kind: NormKind,
        weight: Vec<f32>,
        bias: Option<Vec<f32>>,
        eps: f64,
    ) -> Self::Norm;

    /// A rotary table.
    fn rotary_table(on: &Self::Context, rotation: Rotation) -> Self::RotaryTable;

    /// Reads the embedding, rows of `width`.
    fn table(
        on: &Self::Context,
        source: &dyn WeightSource,
        name: &str,
        width: usize,
    ) -> Result<Self::Table, SourceError>;

    /// Rows of the embedding, times a factor.
    fn embed(on: &Self::Context, table: &Self::Table, ids: &[u32], factor: f32) -> Tensor<Self, 2>;

    /// From host memory, rows of `columns`.
    fn upload(on: &Self::Context, values: Vec<f32>, columns: usize) -> Tensor<Self, 2>;

    /// To host memory, row-major.
    fn download(on: &Self::Context, x: Tensor<Self, 2>) -> Vec<f32>;

    /// Shows the rows without copying them.
    fn show(x: &Tensor<Self, 2>, look: &mut dyn FnMut(Activations<'_>));

    /// ActivationStores for the activations of all batches.
    fn stores(
        on: &Self::Context,
        need: &ActivationSizes,
    ) -> ActivationStores<Self::ActivationStore>;

    /// Empties a store, which takes activations of up to `rows` and `columns` from now on.
    fn clear(store: &Self::ActivationStore, rows: usize, columns: usize);

    /// Whether the slot `place` has room for an activation of that size.
    fn has_room(store: &Self::ActivationStore, place: usize) -> bool;

    /// Puts an activation at a place of a store that has room.
    fn offload(
        on: &Self::Context,
        store: &Self::ActivationStore,
        place: usize,
        x: &Tensor<Self, 2>,
    ) -> Self::Offloaded;

    /// Takes it back.
    fn take(on: &Self::Context, kept: Self::Offloaded) -> Tensor<Self, 2>;

    /// Looks at it and leaves it there.
    fn fetch(on: &Self::Context, kept: &Self::Offloaded) -> Tensor<Self, 2>;

    /// `x [T, K]` times a weight, plus a bias.
    fn project(
        on: &Self::Context,
        x: &Tensor<Self, 2>,
        weight: &Tensor<Self, 2>,
        bias: Option<&Self::Vector>,
    ) -> Tensor<Self, 2>;

    /// A copy of some columns.
    fn columns(on: &Self::Context, x: &Tensor<Self, 2>, columns: Range<usize>) -> Tensor<Self, 2>;

    /// `x + factor * y`.
    fn add(
        on: &Self::Context,
        x: Tensor<Self, 2>,
        y: Tensor<Self, 2>,
        factor: f32,
    ) -> Tensor<Self, 2>;

    /// `factor * x`.
    fn scale(on: &Self::Context, x: Tensor<Self, 2>, factor: f32) -> Tensor<Self, 2>;

    /// A norm over runs of as many columns as its weight has: whole rows, or heads.
    fn norm(on: &Self::Context, x: &Tensor<Self, 2>, norm: &Self::Norm) -> Tensor<Self, 2>;

    /// Rotary embedding; row `r` stands at position `r % tokens` of the table.
    fn rotate(
        on: &Self::Context,
        x: Tensor<Self, 2>,
        rotary: &Self::RotaryTable,
        tokens: usize,
    ) -> Tensor<Self, 2>;

    /// Causal attention inside windows of `tokens` rows.
    fn attend(
        on: &Self::Context,
        q: &Tensor<Self, 2>,
        k: &Tensor<Self, 2>,
        v: &Tensor<Self, 2>,
        tokens: usize,
        shape: AttentionShape,
    ) -> Tensor<Self, 2>;

    /// `activation(gate) * up`.
    fn gate(
        on: &Self::Context,
        gate: Tensor<Self, 2>,
        up: &Tensor<Self, 2>,
        activation: Activation,
    ) -> Tensor<Self, 2>;

    /// `activation(x)`.
    fn activate(on: &Self::Context, x: Tensor<Self, 2>, activation: Activation) -> Tensor<Self, 2>;

    /// Whether no element is infinite or NaN.
    fn is_finite(on: &Self::Context, x: &Tensor<Self, 2>) -> bool;

    /// Reads the head where it scores.
    fn head(on: &Self::Context, head: HostHead) -> Result<Self::Head, ModelError>;

    /// Hidden states `[tokens, hidden_size]` before the final norm, with the head.
    fn head_input(head: &Self::Head, hidden: Tensor<Self, 2>) -> Result<HeadInput, ModelError>;
}

/// A backend that can also walk back through a block.
pub(crate) trait GradientBackend: DecoderBackend {
    /// The same rows in memory of their own, to be changed in place.
    fn duplicate(on: &Self::Context, x: &Tensor<Self, 2>) -> Tensor<Self, 2>;

    /// `dy W`: the gradient at the rows of [`DecoderBackend::project`] from that at some of its outputs.
    fn project_backward(
        on: &Self::Context,
        dy: &Tensor<Self, 2>,
        weight: &Tensor<Self, 2>,
        outputs: Range<usize>,
    ) -> Tensor<Self, 2>;

    /// The gradient at the rows `x` of a norm.
    fn norm_backward(
        on: &Self::Context,
        dy: &Tensor<Self, 2>,
        x: &Tensor<Self, 2>,
        norm: &Self::Norm,
    ) -> Tensor<Self, 2>;

    /// The gradients at queries, keys and values.
    fn attend_backward(
        on: &Self::Context,
        dy: &Tensor<Self, 2>,
        qkv: [&Tensor<Self, 2>; 3],
        tokens: usize,
        shape: AttentionShape,
    ) -> [Tensor<Self, 2>; 3];

    /// The gradients at a gate and at what it multiplies.
    fn gate_backward(
        on: &Self::Context,
        dy: &Tensor<Self, 2>,
        gate_and_up: [Tensor<Self, 2>; 2],
        activation: Activation,
    ) -> [Tensor<Self, 2>; 2];

    /// The gradient at the rows of an activation.
    fn activate_backward(
        on: &Self::Context,
        dy: &Tensor<Self, 2>,
        x: Tensor<Self, 2>,
        activation: Activation,
    ) -> Tensor<Self, 2>;

    /// The mean squares of rows.
    fn row_squares(on: &Self::Context, x: &Tensor<Self, 2>) -> Vec<f64>;

    /// The error of outputs against their target, summed over rows: `gptq_kernels::output_error`.
    fn output_error(
        on: &Self::Context,
        y: &Tensor<Self, 2>,
        target: &Tensor<Self, 2>,
        scale: RowScale,
    ) -> f64;

    /// The gradient of `factor / 2` times that error with respect to `y`.
    fn error_gradient(
        on: &Self::Context,
        y: &Tensor<Self, 2>,
        target: &Tensor<Self, 2>,
        scale: RowScale,
        factor: f32,
    ) -> Tensor<Self, 2>;
}

/// The activation stores of a run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ActivationStores<S> {
    /// Hidden states.
    pub hidden: S,
    /// Hidden states of the float stream.
    pub float: S,
    /// Hidden states before the resident block.
    pub inputs: S,
    /// Keys and values that later blocks read: a pair for each donor block of each batch, then of each batch
    /// that the float stream follows.
    pub shared_kv: S,
    /// Inputs looked up by token id, of each block of each batch.
    pub by_token: S,
    /// Inputs of the output linear of the current step.
    pub inner: S,
    /// Donor blocks: those whose keys and values later blocks read.
    pub donors: usize,
}

/// The sizes of the activations of a pass, in rows and columns.
#[derive(Clone, Copy)]
pub(crate) struct ActivationSizes {
    /// Batches.
    pub batches: usize,
    /// Rows of the longest batch.
    pub rows: usize,
    /// Columns of the hidden states.
    pub hidden: usize,
    /// Columns of the widest attention's output.
    pub attention: usize,
    /// Columns of the widest inner activation.
    pub inner: usize,
    /// Number of donor blocks, and columns of their widest keys.
    pub shared_kv: (usize, usize),
    /// Number of blocks, and columns of the input that each looks up by token id.
    pub by_token: (usize, usize),
    /// Elements of the weights of one block.
    pub block_elements: usize,
    /// Batches that the float stream follows, where one runs beside the quantized one.
    pub float: Option<usize>,
    /// What training takes, where blocks are trained; the hidden states before the resident block are kept then.
    pub training: Option<TrainingSizes>,
    /// Matrices as large as the widest Hessian that somebody else keeps.
    pub more_hessians: usize,
}

impl ActivationSizes {
    /// The sizes of a run, with batches of at most `batch_tokens`.
    pub fn of_run(spec: &ModelSpec, run: &GpuRun<'_>, batch_tokens: usize) -> Self {
        let trains = run.training.is_some();
        let rows: Vec<usize> = (run.windows.iter())
            .flat_map(|of| {
                of.batches(batch_tokens, trains)
                    .map(|windows| windows * of.tokens)
            })
            .collect();
        let starts = rows.iter().scan(0, |start, rows| {
            let this = *start;
            *start += rows;
            Some(this)
        });
        let float = match run.streams {
            Streams::One => None,
            Streams::BesideFloat => {
                Some(starts.filter(|&start| is_followed(start, trains)).count())
            }
        };
        let tokens = run.windows.iter().map(|run| run.tokens).max().unwrap_or(0);
        ActivationSizes {
            training: (run.training).map(|group_size| TrainingSizes::of(spec, group_size, tokens)),
            more_hessians: run.more_hessians,
            ..Self::of(spec, rows.len(), rows.into_iter().max().unwrap_or(0), float)
        }
    }

    /// Batches whose hidden states before the resident block are kept.
    pub fn kept_inputs(&self) -> usize {
        self.training.map_or(0, |_| self.batches)
    }

    /// The sizes for a model, with batches of at most `rows`; `float` batches are in the float stream.
    pub fn of(spec: &ModelSpec, batches: usize, rows: usize, float: Option<usize>) -> Self {
        let attentions = || spec.blocks.iter().flat_map(BlockSpec::attention);
        let donors = || attentions().filter(|attention| attention.keys == KeySource::Donor);
        let outputs = (spec.blocks.iter())
            .flat_map(BlockSpec::branches)
            .map(|branch| branch.output.in_features);
        ActivationSizes {
            batches,
            rows,
            hidden: spec.hidden_size,
            attention: attentions()
                .map(|attention| attention.shape.heads * attention.shape.head_dim)
                .max()
                .unwrap_or(0),
            inner: outputs.max().unwrap_or(0),
            shared_kv: (
                donors().count(),
                donors()
                    .map(|attention| attention.shape.kv_heads * attention.shape.head_dim)
                    .max()
                    .unwrap_or(0),
            ),
            by_token: match &spec.embedding.per_block {
                Some(inputs) => (spec.blocks.len(), inputs.width),
                None => (0, 0),
            },
            block_elements: spec.block_elements(),
            float,
            training: None,
            more_hessians: 0,
        }
    }
}
