//! The operations of a decoder block as an extension of a Burn backend.
//!
//! Burn's own operations round differently from Hugging Face's (its norm rounds the mean first,
//! its rotary embedding is interleaved), and its CPU products run at half the rate of faer. So a
//! backend says here how it does the seven operations that matter; tensors, their life and the
//! residual additions stay Burn's.

use burn::backend::Flex;
use burn::tensor::backend::Backend;
use burn::tensor::{Tensor, TensorData, TensorPrimitive};
use burn_flex::FlexTensor;
use gptq_kernels::{
    AttentionShape, CachedRows, Rotation, attend_cached, causal_attention, multiply, rms_norm,
    swiglu,
};

/// A backend that can run a decoder block. All tensors are f32; rows are tokens.
pub(crate) trait DecoderBackend: Backend + 'static {
    /// Keys and values of earlier tokens.
    type Cache;

    /// `[rows, columns]` from host memory.
    fn upload(values: Vec<f32>, rows: usize, columns: usize) -> Tensor<Self, 2>;

    /// To host memory, row-major.
    fn download(x: Tensor<Self, 2>) -> Vec<f32>;

    /// Shows the rows without copying where they lie in host memory.
    fn show(x: &Tensor<Self, 2>, look: &mut dyn FnMut(&[f32]));

    /// `x [T, K] * weight [K, N] + bias [1, N]`.
    fn project(
        x: &Tensor<Self, 2>,
        weight: &Tensor<Self, 2>,
        bias: Option<&Tensor<Self, 2>>,
    ) -> Tensor<Self, 2>;

    /// Root-mean-square norm over runs of `weight.len()` columns: whole rows, or heads.
    fn norm(x: &Tensor<Self, 2>, weight: &[f32], eps: f64) -> Tensor<Self, 2>;

    /// Rotary embedding; row `r` stands at position `r % tokens` of `rotation`.
    fn rotate(x: Tensor<Self, 2>, rotation: &Rotation, tokens: usize) -> Tensor<Self, 2>;

    /// Causal attention inside windows of `tokens` rows.
    fn attend(
        q: &Tensor<Self, 2>,
        k: &Tensor<Self, 2>,
        v: &Tensor<Self, 2>,
        tokens: usize,
        shape: AttentionShape,
    ) -> Tensor<Self, 2>;

    /// `silu(gate) * up`.
    fn gate(gate: Tensor<Self, 2>, up: &Tensor<Self, 2>) -> Tensor<Self, 2>;

    /// An empty cache for `capacity` tokens of each of `sequences`.
    fn cache(sequences: usize, capacity: usize, shape: AttentionShape) -> Self::Cache;

    /// Appends a token a sequence and attends from it.
    fn attend_cached(
        cache: &mut Self::Cache,
        q: &Tensor<Self, 2>,
        k: &Tensor<Self, 2>,
        v: &Tensor<Self, 2>,
        shape: AttentionShape,
    ) -> Tensor<Self, 2>;
}

/// The float tensor behind a Burn tensor of the Flex backend.
fn flex(x: &Tensor<Flex, 2>) -> FlexTensor {
    let tensor = x.clone().into_primitive().tensor();
    match tensor.as_slice::<f32>() {
        Some(_) => tensor,
        None => tensor.to_contiguous(),
    }
}

fn slice(x: &FlexTensor) -> &[f32] {
    x.as_slice::<f32>()
        .expect("tensors of the decoder are contiguous f32")
}

fn wrap(values: Vec<f32>, columns: usize) -> Tensor<Flex, 2> {
    let rows = values.len() / columns;
    let data = TensorData::new(values, [rows, columns]);
    Tensor::from_primitive(TensorPrimitive::Float(FlexTensor::from_data(data)))
}

/// Changes a tensor in place; it is copied first only where someone else still holds it.
fn change(x: Tensor<Flex, 2>, change: impl FnOnce(&mut [f32])) -> Tensor<Flex, 2> {
    let mut tensor = x.into_primitive().tensor();
    if tensor.as_slice::<f32>().is_none() {
        tensor = tensor.to_contiguous();
    }
    change(tensor.storage_mut::<f32>());
    Tensor::from_primitive(TensorPrimitive::Float(tensor))
}

impl DecoderBackend for Flex {
    type Cache = CachedRows;

    fn upload(values: Vec<f32>, rows: usize, columns: usize) -> Tensor<Self, 2> {
        assert_eq!(
            values.len(),
            rows * columns,
            "elements of the uploaded matrix"
        );
        wrap(values, columns)
    }

    fn download(x: Tensor<Self, 2>) -> Vec<f32> {
        x.into_data()
            .into_vec()
            .expect("tensors of the decoder are f32")
    }

    fn show(x: &Tensor<Self, 2>, look: &mut dyn FnMut(&[f32])) {
        look(slice(&flex(x)));
    }

    fn project(
        x: &Tensor<Self, 2>,
        weight: &Tensor<Self, 2>,
        bias: Option<&Tensor<Self, 2>>,
    ) -> Tensor<Self, 2> {
        let [rows, k] = x.dims();
        let n = weight.dims()[1];
        let mut out = vec![0.0; rows * n];
        multiply(&mut out, slice(&flex(x)), slice(&flex(weight)), rows, k, n);
        let out = wrap(out, n);
        match bias {
            Some(bias) => out + bias.clone(),
            None => out,
        }
    }

    fn norm(x: &Tensor<Self, 2>, weight: &[f32], eps: f64) -> Tensor<Self, 2> {
        let columns = x.dims()[1];
        wrap(rms_norm(slice(&flex(x)), weight, eps as f32), columns)
    }

    fn rotate(x: Tensor<Self, 2>, rotation: &Rotation, tokens: usize) -> Tensor<Self, 2> {
        let width = x.dims()[1];
        change(x, |x| rotation.apply(x, width, tokens))
    }

    fn attend(
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

    fn gate(gate: Tensor<Self, 2>, up: &Tensor<Self, 2>) -> Tensor<Self, 2> {
        let up = flex(up);
        change(gate, |gate| swiglu(gate, slice(&up)))
    }

    fn cache(sequences: usize, capacity: usize, shape: AttentionShape) -> CachedRows {
        CachedRows::new(sequences, capacity, shape)
    }

    fn attend_cached(
        cache: &mut CachedRows,
        q: &Tensor<Self, 2>,
        k: &Tensor<Self, 2>,
        v: &Tensor<Self, 2>,
        shape: AttentionShape,
    ) -> Tensor<Self, 2> {
        let (width, q, k, v) = (q.dims()[1], flex(q), flex(k), flex(v));
        let out = attend_cached(cache, slice(&q), slice(&k), slice(&v), shape);
        wrap(out, width)
    }
}
