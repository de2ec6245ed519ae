//! Decoding on the processor: Burn's Flex holds the tensors and adds residuals, products are faer's, the rest are
//! kernels of this project. Gradients are written once for f32 and f64.

#[cfg(test)]
pub(crate) mod double;

use std::ops::Range;

use burn::backend::Flex;
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

use super::{ActivationSizes, ActivationStores, DecoderBackend, GradientBackend, Tensor};
use crate::ModelError;
use crate::head::HostHead;
use crate::score::HeadInput;
use crate::spec::NormKind;
use crate::weights::{LinearValues, LinearWeights, WeightSource};

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
