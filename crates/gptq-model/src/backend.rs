//! The operations of a decoder block beside a Burn backend.
//!
//! Burn's own operations round differently from Hugging Face's (its norm rounds the mean first,
//! its rotary embedding is interleaved), and its products run at a half (CPU) or a third (GPU) of
//! the rate of the libraries made for them. So a backend says here how it does the operations that
//! matter; tensors and their life stay Burn's.

#[cfg(test)]
pub(crate) mod double;

use std::ops::Range;

use burn::backend::Flex;
use burn::tensor::backend::Backend;
use burn::tensor::{Element, TensorData, TensorPrimitive};
use burn_flex::FlexTensor;
use bytemuck::Pod;
use gptq_kernels::{
    Activation, Activations, AttentionShape, NormGradients, Real, Rotation, RowScale, Weight,
    activate, activate_backward, add_scaled, causal_attention, causal_attention_backward, gated,
    gated_backward, layer_norm, layer_norm_backward, multiply, output_error, output_error_backward,
    product_input_backward, rms_norm, rms_norm_backward, row_squares, scale,
};
use gptq_types::{LayerName, SourceError};
use rayon::prelude::*;

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

/// A backend on the processor: rows are Flex's, of either precision. Gradients are written once for both.
pub(crate) trait OnHost:
    DecoderBackend<Tensors = Flex, Context = (), Norm = HostNorm<<Self as OnHost>::Real>>
{
    /// The type of rows, weights and norms.
    type Real: Real + Element + Pod + Into<f64>;
}

impl OnHost for Flex {
    type Real = f32;
}

/// The float tensor behind a Burn tensor of the Flex backend.
fn flex(x: &Tensor<Flex, 2>) -> FlexTensor {
    let tensor = x.clone().into_primitive().tensor();
    match tensor.is_contiguous() {
        true => tensor,
        false => tensor.to_contiguous(),
    }
}

fn slice<R: Element + Pod>(x: &FlexTensor) -> &[R] {
    x.as_slice::<R>()
        .expect("tensors of the decoder are contiguous and of one type")
}

fn wrap<R: Element>(values: Vec<R>, columns: usize) -> Tensor<Flex, 2> {
    let rows = values.len() / columns;
    let data = TensorData::new(values, [rows, columns]);
    Tensor::<Flex, 2>::from_primitive(TensorPrimitive::Float(FlexTensor::from_data(data)))
}

/// Changes a tensor in place; it is copied first only if it is shared.
fn change<R: Element + Pod>(x: Tensor<Flex, 2>, change: impl FnOnce(&mut [R])) -> Tensor<Flex, 2> {
    let mut tensor = x.into_primitive().tensor();
    if tensor.as_slice::<R>().is_none() {
        tensor = tensor.to_contiguous();
    }
    change(tensor.storage_mut::<R>());
    Tensor::<Flex, 2>::from_primitive(TensorPrimitive::Float(tensor))
}

/// A norm in host memory.
pub(crate) struct HostNorm<R> {
    kind: NormKind,
    weight: Vec<R>,
    bias: Option<Vec<R>>,
    eps: R,
}

impl DecoderBackend for Flex {
    type Tensors = Self;
    type Context = (); // the processor
    type Vector = Vec<f32>;
    type Norm = HostNorm<f32>;
    type RotaryTable = Rotation;
    type Table = (Vec<f32>, usize);
    type ActivationStore = ();
    type Offloaded = Tensor<Self, 2>;
    type Head = HostHead;

    /// Enough for full speed of the products, few enough that the widest temporary
    /// (`rows * intermediate_size`) stays near the processor; 4096 rows were 5 % slower.
    const BATCH_TOKENS: usize = 2048;
    /// A second block would be the largest thing in memory.
    const PREFETCH: bool = false;
    const EVERY_INNER: bool = true;

    fn check(_: &()) -> Result<(), ModelError> {
        Ok(())
    }

    fn tidy(_: &()) {}

    fn read(
        source: &dyn WeightSource,
        layer: &LayerName,
        shape: [usize; 2],
        bias: bool,
    ) -> Result<LinearWeights, SourceError> {
        source.linear(layer, shape, bias)
    }

    fn weight(
        _: &(),
        values: LinearValues,
        in_features: usize,
        out_features: usize,
    ) -> Tensor<Self, 2> {
        let values = values.input_major(in_features, out_features);
        assert_eq!(
            values.len(),
            in_features * out_features,
            "elements of the weight"
        );
        wrap(values, out_features)
    }

    fn copied(_: &(), weight: &Tensor<Self, 2>, _: Option<Tensor<Self, 2>>) -> Tensor<Self, 2> {
        weight.clone() // it is replaced, never written over
    }

    fn show_weight(weight: &Tensor<Self, 2>) -> Weight<'_> {
        Weight::Host(Self::download(&(), weight.clone()))
    }

    fn vector(_: &(), values: Vec<f32>) -> Vec<f32> {
        values
    }

    fn norm_weights(
        _: &(),
        kind: NormKind,
        weight: Vec<f32>,
        bias: Option<Vec<f32>>,
        eps: f64,
    ) -> HostNorm<f32> {
        let eps = eps as f32;
        HostNorm {
            kind,
            weight,
            bias,
            eps,
        }
    }

    fn rotary_table(_: &(), rotation: Rotation) -> Rotation {
        rotation
    }

    fn table(
        _: &(),
        source: &dyn WeightSource,
        name: &str,
        width: usize,
    ) -> Result<Self::Table, SourceError> {
        Ok((source.plain(name)?, width))
    }

    fn embed(_: &(), (table, width): &Self::Table, ids: &[u32], factor: f32) -> Tensor<Self, 2> {
        let mut rows = Vec::with_capacity(ids.len() * width);
        for &id in ids {
            rows.extend_from_slice(&table[id as usize * width..][..*width]);
        }
        if factor != 1.0 {
            scale(&mut rows, factor);
        }
        wrap(rows, *width)
    }

    fn upload(_: &(), values: Vec<f32>, columns: usize) -> Tensor<Self, 2> {
        wrap(values, columns)
    }

    fn download(_: &(), x: Tensor<Self, 2>) -> Vec<f32> {
        x.into_data()
            .into_vec()
            .expect("tensors of the decoder are f32")
    }

    fn show(x: &Tensor<Self, 2>, look: &mut dyn FnMut(Activations<'_>)) {
        look(Activations::Host(slice(&flex(x))));
    }

    fn stores(_: &(), need: &ActivationSizes) -> ActivationStores<()> {
        ActivationStores {
            hidden: (),
            float: (),
            inputs: (),
            shared_kv: (),
            by_token: (),
            inner: (),
            donors: need.shared_kv.0,
        }
    }

    fn clear((): &(), _: usize, _: usize) {}

    fn has_room((): &(), _: usize) -> bool {
        true
    }

    fn offload(_: &(), (): &(), _: usize, x: &Tensor<Self, 2>) -> Tensor<Self, 2> {
        x.clone()
    }

    fn take(_: &(), kept: Tensor<Self, 2>) -> Tensor<Self, 2> {
        kept
    }

    fn fetch(_: &(), kept: &Tensor<Self, 2>) -> Tensor<Self, 2> {
        kept.clone()
    }

    fn project(
        _: &(),
        x: &Tensor<Self, 2>,
        weight: &Tensor<Self, 2>,
        bias: Option<&Vec<f32>>,
    ) -> Tensor<Self, 2> {
        let [rows, k] = x.dims();
        let n = weight.dims()[1];
        let mut out = vec![0.0; rows * n];
        multiply(&mut out, slice(&flex(x)), slice(&flex(weight)), rows, k, n);
        let out = wrap(out, n);
        match bias {
            Some(bias) => out + wrap(bias.clone(), n),
            None => out,
        }
    }

    fn columns(_: &(), x: &Tensor<Self, 2>, columns: Range<usize>) -> Tensor<Self, 2> {
        let (width, x) = (x.dims()[1], flex(x));
        let rows = slice::<f32>(&x).chunks_exact(width);
        let kept = rows.flat_map(|row| &row[columns.clone()]).copied();
        wrap(kept.collect(), columns.len())
    }

    fn add(_: &(), x: Tensor<Self, 2>, y: Tensor<Self, 2>, factor: f32) -> Tensor<Self, 2> {
        match factor == 1.0 {
            true => x + y,
            false => {
                let y = flex(&y);
                change(x, |x| add_scaled(x, slice(&y), factor))
            }
        }
    }

    fn scale(_: &(), x: Tensor<Self, 2>, factor: f32) -> Tensor<Self, 2> {
        change(x, |x| scale(x, factor))
    }

    fn norm(_: &(), x: &Tensor<Self, 2>, norm: &HostNorm<f32>) -> Tensor<Self, 2> {
        let (columns, x) = (x.dims()[1], flex(x));
        let out = match norm.kind {
            NormKind::Rms => rms_norm(slice(&x), &norm.weight, norm.eps),
            NormKind::Layer => layer_norm(slice(&x), &norm.weight, norm.bias.as_deref(), norm.eps),
        };
        wrap(out, columns)
    }

    fn rotate(_: &(), x: Tensor<Self, 2>, rotary: &Rotation, tokens: usize) -> Tensor<Self, 2> {
        let width = x.dims()[1];
        change(x, |x| rotary.apply(x, width, tokens))
    }

    fn attend(
        _: &(),
        q: &Tensor<Self, 2>,
        k: &Tensor<Self, 2>,
        v: &Tensor<Self, 2>,
        tokens: usize,
        shape: AttentionShape,
    ) -> Tensor<Self, 2> {
        let (width, q, k, v) = (q.dims()[1], flex(q), flex(k), flex(v));
        let out = causal_attention(slice(&q), slice(&k), slice(&v), tokens, shape);
        wrap(out, width)
    }

    fn gate(
        _: &(),
        gate: Tensor<Self, 2>,
        up: &Tensor<Self, 2>,
        activation: Activation,
    ) -> Tensor<Self, 2> {
        let up = flex(up);
        change(gate, |gate| gated(gate, slice(&up), activation))
    }

    fn activate(_: &(), x: Tensor<Self, 2>, activation: Activation) -> Tensor<Self, 2> {
        change(x, |x| activate(x, activation))
    }

    fn is_finite(_: &(), x: &Tensor<Self, 2>) -> bool {
        slice::<f32>(&flex(x))
            .par_iter()
            .all(|value| value.is_finite())
    }

    fn head(_: &(), head: HostHead) -> Result<HostHead, ModelError> {
        Ok(head)
    }

    fn head_input(head: &HostHead, hidden: Tensor<Self, 2>) -> Result<HeadInput, ModelError> {
        Ok(HeadInput::of(head.rows(slice(&flex(&hidden)))?))
    }
}

impl<B: OnHost> GradientBackend for B {
    fn duplicate((): &(), x: &Tensor<Self, 2>) -> Tensor<Self, 2> {
        x.clone() // copied when it is changed
    }

    fn project_backward(
        on: &(),
        dy: &Tensor<Self, 2>,
        weight: &Tensor<Self, 2>,
        outputs: Range<usize>,
    ) -> Tensor<Self, 2> {
        let [rows, n] = dy.dims();
        let [k, all] = weight.dims();
        let weight = match n == all {
            true => weight.clone(),
            false => Self::columns(on, weight, outputs),
        };
        let mut dx = vec![B::Real::ZERO; rows * k];
        let (dy, weight) = (flex(dy), flex(&weight));
        product_input_backward(&mut dx, slice(&dy), slice(&weight), rows, k, n);
        wrap(dx, k)
    }

    fn norm_backward(
        (): &(),
        dy: &Tensor<Self, 2>,
        x: &Tensor<Self, 2>,
        norm: &HostNorm<B::Real>,
    ) -> Tensor<Self, 2> {
        let (columns, dy, x) = (x.dims()[1], flex(dy), flex(x));
        let (dy, x) = (slice(&dy), slice(&x));
        let dx = match norm.kind {
            NormKind::Rms => rms_norm_backward(dy, x, &norm.weight, norm.eps, None),
            NormKind::Layer => {
                layer_norm_backward(dy, x, &norm.weight, norm.eps, NormGradients::none())
            }
        };
        wrap(dx, columns)
    }

    fn attend_backward(
        (): &(),
        dy: &Tensor<Self, 2>,
        qkv: [&Tensor<Self, 2>; 3],
        tokens: usize,
        shape: AttentionShape,
    ) -> [Tensor<Self, 2>; 3] {
        let widths = qkv.map(|x| x.dims()[1]);
        let (dy, [q, k, v]) = (flex(dy), qkv.map(flex));
        let (q, k, v) = (slice::<B::Real>(&q), slice(&k), slice(&v));
        let found = causal_attention_backward(slice(&dy), q, k, v, tokens, shape);
        let [q, k, v] = widths;
        [wrap(found.q, q), wrap(found.k, k), wrap(found.v, v)]
    }

    fn gate_backward(
        (): &(),
        dy: &Tensor<Self, 2>,
        [gate, up]: [Tensor<Self, 2>; 2],
        activation: Activation,
    ) -> [Tensor<Self, 2>; 2] {
        let (columns, dy) = (gate.dims()[1], flex(dy));
        let [mut gate, mut up] = [gate, up].map(|x| slice::<B::Real>(&flex(&x)).to_vec());
        gated_backward(slice(&dy), &mut gate, &mut up, activation);
        [wrap(gate, columns), wrap(up, columns)]
    }

    fn activate_backward(
        (): &(),
        dy: &Tensor<Self, 2>,
        x: Tensor<Self, 2>,
        activation: Activation,
    ) -> Tensor<Self, 2> {
        let dy = flex(dy);
        change(x, |x: &mut [B::Real]| {
            activate_backward(slice(&dy), x, activation)
        })
    }

    fn row_squares((): &(), x: &Tensor<Self, 2>) -> Vec<f64> {
        let columns = x.dims()[1];
        row_squares::<B::Real>(slice(&flex(x)), columns)
    }

    fn output_error(
        (): &(),
        y: &Tensor<Self, 2>,
        target: &Tensor<Self, 2>,
        scale: RowScale,
    ) -> f64 {
        let columns = y.dims()[1];
        let (y, target) = (flex(y), flex(target));
        output_error::<B::Real>(slice(&y), slice(&target), columns, scale)
    }

    fn error_gradient(
        (): &(),
        y: &Tensor<Self, 2>,
        target: &Tensor<Self, 2>,
        scale: RowScale,
        factor: f32,
    ) -> Tensor<Self, 2> {
        let (columns, target) = (y.dims()[1], flex(target));
        change(y.clone(), |y: &mut [B::Real]| {
            output_error_backward(y, slice(&target), columns, scale, factor);
        })
    }
}
