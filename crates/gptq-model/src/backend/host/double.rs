//! A decoder in f64, for tests: its forward operations are the plain loops that define them, on Flex's f64
//! tensors. The order of the operations, the tape and the gradients are those of every decoder on the
//! processor ([`OnHost`]). What only other passes need is not there.

#[path = "../../../../gptq-kernels/src/definition.rs"]
mod definition;

use super::*;

/// See the module.
#[derive(Clone)]
pub(crate) struct Double;

impl OnHost for Double {
    type Real = f64;
}

/// A tensor of rows of `columns`.
pub(crate) fn tensor(values: Vec<f64>, columns: usize) -> Tensor<Double, 2> {
    wrap(values, columns)
}

/// Its rows, one after the other.
pub(crate) fn values(x: &Tensor<Double, 2>) -> Vec<f64> {
    slice(&flex(x)).to_vec()
}

fn widened(values: Vec<f32>) -> Vec<f64> {
    values.into_iter().map(f64::from).collect()
}

fn widened_rows(x: Tensor<Flex, 2>) -> Tensor<Double, 2> {
    let columns = x.dims()[1];
    tensor(widened(Flex::download(&(), x)), columns)
}

impl DecoderBackend for Double {
    type Tensors = Flex;
    type Context = ();
    type Vector = Vec<f64>;
    type Norm = HostNorm<f64>;
    type RotaryTable = Rotation;
    type Table = (Vec<f32>, usize);
    type ActivationStore = ();
    type Offloaded = Tensor<Self, 2>;
    type Head = ();

    const BATCH_TOKENS: usize = Flex::BATCH_TOKENS;
    const PREFETCH: bool = false;
    const EVERY_INNER: bool = true;

    fn check((): &()) -> Result<(), ModelError> {
        Ok(())
    }

    fn tidy((): &()) {}

    fn read(
        source: &dyn WeightSource,
        layer: &LayerName,
        shape: [usize; 2],
        bias: bool,
    ) -> Result<LinearWeights, SourceError> {
        source.linear(layer, shape, bias)
    }

    fn weight(
        (): &(),
        values: LinearValues,
        in_features: usize,
        out_features: usize,
    ) -> Tensor<Self, 2> {
        widened_rows(Flex::weight(&(), values, in_features, out_features))
    }

    fn copied((): &(), weight: &Tensor<Self, 2>, _: Option<Tensor<Self, 2>>) -> Tensor<Self, 2> {
        weight.clone()
    }

    fn show_weight(_: &Tensor<Self, 2>) -> Weight<'_> {
        unreachable!("weights are shown in f32")
    }

    fn vector((): &(), values: Vec<f32>) -> Vec<f64> {
        widened(values)
    }

    fn norm_weights(
        (): &(),
        kind: NormKind,
        weight: Vec<f32>,
        bias: Option<Vec<f32>>,
        eps: f64,
    ) -> HostNorm<f64> {
        HostNorm {
            kind,
            weight: widened(weight),
            bias: bias.map(widened),
            eps,
        }
    }

    fn rotary_table((): &(), rotation: Rotation) -> Rotation {
        rotation
    }

    fn table(
        (): &(),
        source: &dyn WeightSource,
        name: &str,
        width: usize,
    ) -> Result<Self::Table, SourceError> {
        Flex::table(&(), source, name, width)
    }

    fn embed((): &(), table: &Self::Table, ids: &[u32], factor: f32) -> Tensor<Self, 2> {
        widened_rows(Flex::embed(&(), table, ids, factor))
    }

    fn upload((): &(), values: Vec<f32>, columns: usize) -> Tensor<Self, 2> {
        tensor(widened(values), columns)
    }

    fn download((): &(), _: Tensor<Self, 2>) -> Vec<f32> {
        unreachable!("rows are downloaded in f32")
    }

    /// Sinks are shown f32: the bits of each f64 are two of them.
    fn show(x: &Tensor<Self, 2>, look: &mut dyn FnMut(Activations<'_>)) {
        look(Activations::Host(bytemuck::cast_slice(&values(x))));
    }

    fn stores((): &(), need: &ActivationSizes) -> ActivationStores<()> {
        Flex::stores(&(), need)
    }

    fn clear((): &(), _: usize, _: usize) {}

    fn has_room((): &(), _: usize) -> bool {
        true
    }

    fn offload((): &(), (): &(), _: usize, x: &Tensor<Self, 2>) -> Tensor<Self, 2> {
        x.clone()
    }

    fn take((): &(), kept: Tensor<Self, 2>) -> Tensor<Self, 2> {
        kept
    }

    fn fetch((): &(), kept: &Tensor<Self, 2>) -> Tensor<Self, 2> {
        kept.clone()
    }

    fn project(
        (): &(),
        x: &Tensor<Self, 2>,
        weight: &Tensor<Self, 2>,
        bias: Option<&Vec<f64>>,
    ) -> Tensor<Self, 2> {
        let [k, n] = weight.dims();
        let bias = bias.cloned().unwrap_or_else(|| vec![0.0; n]);
        let out = definition::project(&values(x), &values(weight), &bias, k);
        tensor(out, n)
    }

    fn columns((): &(), x: &Tensor<Self, 2>, columns: Range<usize>) -> Tensor<Self, 2> {
        let (width, x) = (x.dims()[1], values(x));
        let rows = x.chunks_exact(width);
        let kept = rows.flat_map(|row| &row[columns.clone()]).copied();
        tensor(kept.collect(), columns.len())
    }

    fn add((): &(), x: Tensor<Self, 2>, y: Tensor<Self, 2>, factor: f32) -> Tensor<Self, 2> {
        let pairs = values(&x).into_iter().zip(values(&y));
        let sum = pairs.map(|(x, y)| x + f64::from(factor) * y);
        tensor(sum.collect(), x.dims()[1])
    }

    fn scale((): &(), x: Tensor<Self, 2>, factor: f32) -> Tensor<Self, 2> {
        let scaled = values(&x).into_iter().map(|x| f64::from(factor) * x);
        tensor(scaled.collect(), x.dims()[1])
    }

    fn norm((): &(), x: &Tensor<Self, 2>, norm: &HostNorm<f64>) -> Tensor<Self, 2> {
        let (columns, x) = (x.dims()[1], values(x));
        let (weight, eps) = (&norm.weight, norm.eps);
        let out = match norm.kind {
            NormKind::Rms => definition::rms_norm(&x, weight, eps),
            NormKind::Layer => {
                let bias = norm.bias.clone().unwrap_or_else(|| vec![0.0; weight.len()]);
                definition::layer_norm(&x, weight, &bias, eps)
            }
        };
        tensor(out, columns)
    }

    fn rotate((): &(), x: Tensor<Self, 2>, rotary: &Rotation, tokens: usize) -> Tensor<Self, 2> {
        let width = x.dims()[1];
        tensor(
            definition::rotate(&values(&x), rotary, width, tokens),
            width,
        )
    }

    fn attend(
        (): &(),
        q: &Tensor<Self, 2>,
        k: &Tensor<Self, 2>,
        v: &Tensor<Self, 2>,
        tokens: usize,
        shape: AttentionShape,
    ) -> Tensor<Self, 2> {
        let out = definition::attend(&values(q), &values(k), &values(v), tokens, shape);
        tensor(out, q.dims()[1])
    }

    fn gate(
        (): &(),
        gate: Tensor<Self, 2>,
        up: &Tensor<Self, 2>,
        activation: Activation,
    ) -> Tensor<Self, 2> {
        let out = definition::gated(&values(&gate), &values(up), activation);
        tensor(out, gate.dims()[1])
    }

    fn activate((): &(), x: Tensor<Self, 2>, activation: Activation) -> Tensor<Self, 2> {
        let out = definition::activate(&values(&x), activation);
        tensor(out, x.dims()[1])
    }

    fn is_finite((): &(), x: &Tensor<Self, 2>) -> bool {
        values(x).iter().all(|value| value.is_finite())
    }

    fn head((): &(), _: HostHead) -> Result<(), ModelError> {
        unreachable!("heads score in f32")
    }

    fn head_input((): &(), _: Tensor<Self, 2>) -> Result<HeadInput, ModelError> {
        unreachable!("heads score in f32")
    }
}
