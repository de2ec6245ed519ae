//! One decoder block: pre-norm attention and a gated feed-forward, as the Llama family has it.

use std::rc::Rc;

use burn::tensor::Tensor;
use gptq_kernels::AttentionShape;
use gptq_types::{LayerName, SourceError, Stage, Weight};
use rayon::prelude::*;

use crate::backend::DecoderBackend;
use crate::config::{DecoderConfig, prefix};
use crate::weights::{LinearValues, LinearWeights, WeightSource};

/// A linear on the device.
pub(crate) struct Linear<B: DecoderBackend> {
    pub name: LayerName,
    weight: Tensor<B, 2>,
    bias: Option<Rc<B::Vector>>, // [N]
    in_features: usize,
    out_features: usize,
}

impl<B: DecoderBackend> Linear<B> {
    pub fn forward(&self, x: &Tensor<B, 2>) -> Tensor<B, 2> {
        B::project(x, &self.weight, self.bias.as_deref())
    }

    pub fn weight(&self) -> Weight {
        B::show_weight(&self.weight)
    }

    fn copied(&self, place: Option<Tensor<B, 2>>) -> Self {
        Linear {
            name: self.name.clone(),
            weight: B::copied(&self.weight, place),
            bias: self.bias.clone(),
            in_features: self.in_features,
            out_features: self.out_features,
        }
    }

    /// A weight on the device was written over by whoever solved it.
    pub fn replace(&mut self, weight: Weight) {
        if let Weight::Host(values) = weight {
            let values = LinearValues::InputMajor(values);
            self.weight = B::weight(values, self.in_features, self.out_features);
        }
    }
}

/// The weights of one block in host memory, on their way to the device.
pub(crate) struct HostBlock {
    input_norm: Vec<f32>,
    post_attention_norm: Vec<f32>,
    head_norms: Option<[Vec<f32>; 2]>,
    linears: Vec<(LayerName, usize, usize, LinearWeights)>,
}

impl HostBlock {
    pub fn read<B: DecoderBackend>(
        source: &dyn WeightSource,
        config: &DecoderConfig,
        index: usize,
    ) -> Result<Self, SourceError> {
        let at = prefix(index);
        let norm = |name: &str| source.plain(&format!("{at}{name}.weight"));
        let names: Vec<_> = (Stage::ALL.into_iter())
            .flat_map(|stage| {
                let bias = config.has_bias(stage);
                (config.linears(index, stage).into_iter()).map(move |linear| (linear, bias))
            })
            .collect();
        let read = |((name, k, n), bias): ((LayerName, usize, usize), bool)| {
            let stored = B::read(source, &name, [k, n], bias)?;
            Ok::<_, SourceError>((name, k, n, stored))
        };
        // Side by side where somebody waits; one after another needs less memory on the way.
        let linears = match B::PREFETCH {
            true => names.into_par_iter().map(read).collect::<Result<_, _>>()?,
            false => names.into_iter().map(read).collect::<Result<_, _>>()?,
        };
        Ok(HostBlock {
            input_norm: norm("input_layernorm")?,
            post_attention_norm: norm("post_attention_layernorm")?,
            head_norms: match config.qk_norm {
                true => Some([norm("self_attn.q_norm")?, norm("self_attn.k_norm")?]),
                false => None,
            },
            linears,
        })
    }
}

/// The weights of one block.
pub(crate) struct Block<B: DecoderBackend> {
    shape: AttentionShape,
    eps: f64,
    input_norm: Rc<B::Vector>,              // [hidden]
    post_attention_norm: Rc<B::Vector>,     // [hidden]
    head_norms: Option<[Rc<B::Vector>; 2]>, // queries and keys, [head_dim]
    pub attention_in: [Linear<B>; 3],       // q, k, v
    pub attention_out: Linear<B>,
    pub mlp_in: [Linear<B>; 2], // gate, up
    pub mlp_out: Linear<B>,
}

impl<B: DecoderBackend> Block<B> {
    pub fn load(host: HostBlock, config: &DecoderConfig) -> Self {
        let mut linears = host.linears.into_iter().map(|(name, k, n, stored)| Linear {
            weight: B::weight(stored.weight, k, n),
            bias: stored.bias.map(|bias| Rc::new(B::vector(bias))),
            name,
            in_features: k,
            out_features: n,
        });
        let mut next = || {
            linears
                .next()
                .expect("the config names seven linears a block")
        };
        let vector = |values| Rc::new(B::vector(values));
        Block {
            shape: AttentionShape {
                heads: config.num_attention_heads,
                kv_heads: config.num_key_value_heads,
                head_dim: config.head_dim,
            },
            eps: config.rms_norm_eps,
            input_norm: vector(host.input_norm),
            post_attention_norm: vector(host.post_attention_norm),
            head_norms: host.head_norms.map(|norms| norms.map(vector)),
            attention_in: [next(), next(), next()],
            attention_out: next(),
            mlp_in: [next(), next()],
            mlp_out: next(),
        }
    }

    /// The same block, which stays as it is when linears of this one are replaced or written over; in the
    /// place of another one, where there is one.
    pub fn copied(&self, place: Option<Self>) -> Self {
        let mut places = place.into_iter().flat_map(Self::into_weights);
        let mut copied = |linear: &Linear<B>| linear.copied(places.next());
        Block {
            shape: self.shape,
            eps: self.eps,
            input_norm: self.input_norm.clone(),
            post_attention_norm: self.post_attention_norm.clone(),
            head_norms: self.head_norms.clone(),
            attention_in: self.attention_in.each_ref().map(&mut copied),
            attention_out: copied(&self.attention_out),
            mlp_in: self.mlp_in.each_ref().map(&mut copied),
            mlp_out: copied(&self.mlp_out),
        }
    }

    fn into_weights(self) -> impl Iterator<Item = Tensor<B, 2>> {
        (self.attention_in.into_iter())
            .chain([self.attention_out])
            .chain(self.mlp_in)
            .chain([self.mlp_out])
            .map(|linear| linear.weight)
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

    /// The hidden states behind the block, from those before it.
    pub fn forward(&self, hidden: Tensor<B, 2>, turn: &B::Turn, tokens: usize) -> Tensor<B, 2> {
        let input = self.attend(&self.attention_input(&hidden), turn, tokens);
        let hidden = B::add(hidden, self.attention_out.forward(&input));
        drop(input);
        let input = self.gated(&self.mlp_input(&hidden));
        B::add(hidden, self.mlp_out.forward(&input))
    }

    /// The input of `q_proj`, `k_proj`, `v_proj`.
    pub fn attention_input(&self, hidden: &Tensor<B, 2>) -> Tensor<B, 2> {
        B::norm(hidden, &self.input_norm, self.eps)
    }

    /// The input of `o_proj`, from that of `q_proj`.
    pub fn attend(&self, x: &Tensor<B, 2>, turn: &B::Turn, tokens: usize) -> Tensor<B, 2> {
        let [q, k, v] = self.queries_keys_values(x, turn, tokens);
        B::attend(&q, &k, &v, tokens, self.shape)
    }

    /// The same for one new token a sequence, which `turn` holds the position of.
    pub fn attend_cached(
        &self,
        x: &Tensor<B, 2>,
        turn: &B::Turn,
        cache: &mut B::Cache,
    ) -> Tensor<B, 2> {
        let [q, k, v] = self.queries_keys_values(x, turn, 1);
        B::attend_cached(cache, &q, &k, &v, self.shape)
    }

    fn queries_keys_values(
        &self,
        x: &Tensor<B, 2>,
        turn: &B::Turn,
        tokens: usize,
    ) -> [Tensor<B, 2>; 3] {
        let [q, k, v] = &self.attention_in;
        let normed = |x: Tensor<B, 2>, which: usize| match &self.head_norms {
            Some(norms) => B::norm(&x, &norms[which], self.eps),
            None => x,
        };
        [
            B::rotate(normed(q.forward(x), 0), turn, tokens),
            B::rotate(normed(k.forward(x), 1), turn, tokens),
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
