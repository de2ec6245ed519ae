//! One decoder block: pre-norm attention and a gated feed-forward, as the Llama family has it.

use burn::tensor::Tensor;
use gptq_kernels::{AttentionShape, Rotation};
use gptq_types::{LayerName, Stage};

use crate::ModelError;
use crate::backend::DecoderBackend;
use crate::config::{DecoderConfig, prefix};
use crate::weights::WeightSource;

/// A linear on the device.
pub(crate) struct Linear<B: DecoderBackend> {
    pub name: LayerName,
    weight: Tensor<B, 2>,       // [K, N]
    bias: Option<Tensor<B, 2>>, // [1, N]
}

impl<B: DecoderBackend> Linear<B> {
    pub fn forward(&self, x: &Tensor<B, 2>) -> Tensor<B, 2> {
        B::project(x, &self.weight, self.bias.as_ref())
    }

    pub fn weight(&self) -> Vec<f32> {
        B::download(self.weight.clone())
    }

    pub fn replace(&mut self, weight: Vec<f32>) {
        let [k, n] = self.weight.dims();
        self.weight = B::upload(weight, k, n);
    }
}

/// The weights of one block.
pub(crate) struct Block<B: DecoderBackend> {
    shape: AttentionShape,
    eps: f64,
    input_norm: Vec<f32>,             // [hidden]
    post_attention_norm: Vec<f32>,    // [hidden]
    q_norm: Option<Vec<f32>>,         // [head_dim]
    k_norm: Option<Vec<f32>>,         // [head_dim]
    pub attention_in: [Linear<B>; 3], // q, k, v
    pub attention_out: Linear<B>,
    pub mlp_in: [Linear<B>; 2], // gate, up
    pub mlp_out: Linear<B>,
}

impl<B: DecoderBackend> Block<B> {
    pub fn load(
        source: &dyn WeightSource,
        config: &DecoderConfig,
        index: usize,
    ) -> Result<Self, ModelError> {
        let at = prefix(index);
        let head_norm = |which: &str| -> Result<Option<Vec<f32>>, ModelError> {
            if !config.qk_norm {
                return Ok(None);
            }
            Ok(Some(
                source.plain(&format!("{at}self_attn.{which}_norm.weight"))?,
            ))
        };
        let linears = |stage| -> Result<Vec<Linear<B>>, ModelError> {
            (config.linears(index, stage).into_iter())
                .map(|(name, k, n)| {
                    let stored = source.linear(&name, config.has_bias(stage))?;
                    Ok(Linear {
                        weight: B::upload(stored.weight, k, n),
                        bias: stored.bias.map(|bias| B::upload(bias, 1, n)),
                        name,
                    })
                })
                .collect()
        };
        Ok(Block {
            shape: AttentionShape {
                heads: config.num_attention_heads,
                kv_heads: config.num_key_value_heads,
                head_dim: config.head_dim,
            },
            eps: config.rms_norm_eps,
            input_norm: source.plain(&format!("{at}input_layernorm.weight"))?,
            post_attention_norm: source.plain(&format!("{at}post_attention_layernorm.weight"))?,
            q_norm: head_norm("q")?,
            k_norm: head_norm("k")?,
            attention_in: exactly(linears(Stage::AttentionIn)?),
            attention_out: only(linears(Stage::AttentionOut)?),
            mlp_in: exactly(linears(Stage::MlpIn)?),
            mlp_out: only(linears(Stage::MlpOut)?),
        })
    }

    pub fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear<B>> {
        self.attention_in
            .iter_mut()
            .chain([&mut self.attention_out])
            .chain(&mut self.mlp_in)
            .chain([&mut self.mlp_out])
    }

    pub fn linears(&self) -> impl Iterator<Item = &Linear<B>> {
        self.attention_in
            .iter()
            .chain([&self.attention_out])
            .chain(&self.mlp_in)
            .chain([&self.mlp_out])
    }

    pub fn cache(&self, sequences: usize, capacity: usize) -> B::Cache {
        B::cache(sequences, capacity, self.shape)
    }

    /// The input of `q_proj`, `k_proj`, `v_proj`.
    pub fn attention_input(&self, hidden: &Tensor<B, 2>) -> Tensor<B, 2> {
        B::norm(hidden, &self.input_norm, self.eps)
    }

    /// The input of `o_proj`, from that of `q_proj`.
    pub fn attend(&self, x: &Tensor<B, 2>, rotation: &Rotation, tokens: usize) -> Tensor<B, 2> {
        let [q, k, v] = self.queries_keys_values(x, rotation, tokens);
        B::attend(&q, &k, &v, tokens, self.shape)
    }

    /// The same for one new token a sequence, which `rotation` holds the position of.
    pub fn attend_cached(
        &self,
        x: &Tensor<B, 2>,
        rotation: &Rotation,
        cache: &mut B::Cache,
    ) -> Tensor<B, 2> {
        let [q, k, v] = self.queries_keys_values(x, rotation, 1);
        B::attend_cached(cache, &q, &k, &v, self.shape)
    }

    fn queries_keys_values(
        &self,
        x: &Tensor<B, 2>,
        rotation: &Rotation,
        tokens: usize,
    ) -> [Tensor<B, 2>; 3] {
        let [q, k, v] = &self.attention_in;
        let normed = |x: Tensor<B, 2>, norm: &Option<Vec<f32>>| match norm {
            Some(weight) => B::norm(&x, weight, self.eps),
            None => x,
        };
        [
            B::rotate(normed(q.forward(x), &self.q_norm), rotation, tokens),
            B::rotate(normed(k.forward(x), &self.k_norm), rotation, tokens),
            v.forward(x),
        ]
    }

    /// The input of `gate_proj`, `up_proj`.
    pub fn mlp_input(&self, hidden: &Tensor<B, 2>) -> Tensor<B, 2> {
        B::norm(hidden, &self.post_attention_norm, self.eps)
    }

    /// The input of `down_proj`, from that of `gate_proj`.
    pub fn gated(&self, x: &Tensor<B, 2>) -> Tensor<B, 2> {
        let [gate, up] = &self.mlp_in;
        B::gate(gate.forward(x), &up.forward(x))
    }
}

fn exactly<T, const N: usize>(items: Vec<T>) -> [T; N] {
    items
        .try_into()
        .unwrap_or_else(|_| unreachable!("the config names {N} linears for the stage"))
}

fn only<T>(items: Vec<T>) -> T {
    let [item] = exactly(items);
    item
}
