//! Shapes of Llama models, with the files that go with the weights.

use std::num::NonZeroU16;
use std::str::FromStr;

use gptq_types::{Dtype, TensorInfo};
use serde_json::{Map, Value as Json, json};

use super::HalfType;
use crate::HubError;

/// Standard deviation of the weights: the `initializer_range` of the family.
pub(super) const DEVIATION: f64 = 0.02;

/// The first ids, in order, as in Llama's own vocabulary; `t0`, `t1`, ... follow.
const SPECIAL: [&str; 3] = ["<unk>", "<s>", "</s>"];
const BOS: usize = 1;
const EOS: usize = 2;

/// The dimensions of a Llama model with untied embeddings and no biases.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelShape {
    /// What [`ModelShape::from_str`] knows it by.
    pub name: &'static str,
    /// Width of the hidden states.
    pub hidden: usize,
    /// Width inside the feed-forward part.
    pub intermediate: usize,
    /// Blocks.
    pub layers: NonZeroU16,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Tokens.
    pub vocab: usize,
    /// Longest context in tokens.
    pub positions: usize,
    /// Base of the rotary embedding's frequencies.
    pub rope_theta: f64,
    /// Factor of linear rope scaling, if there is any.
    pub rope_factor: Option<f64>,
}

const fn layers(count: u16) -> NonZeroU16 {
    match NonZeroU16::new(count) {
        Some(count) => count,
        None => NonZeroU16::MIN,
    }
}

const LLAMA_2_7B: ModelShape = ModelShape {
    name: "llama-2-7b",
    hidden: 4096,
    intermediate: 11008,
    layers: layers(32),
    heads: 32,
    kv_heads: 32,
    vocab: 32000,
    positions: 4096,
    rope_theta: 10000.0,
    rope_factor: None,
};

const KNOWN: [ModelShape; 4] = [
    LLAMA_2_7B,
    ModelShape {
        name: "llama-2-7b-32k",
        positions: 32768,
        rope_factor: Some(8.0),
        ..LLAMA_2_7B
    },
    ModelShape {
        name: "llama-3-8b",
        intermediate: 14336,
        kv_heads: 8,
        vocab: 128_256,
        positions: 8192,
        rope_theta: 500_000.0,
        ..LLAMA_2_7B
    },
    ModelShape {
        name: "tiny",
        hidden: 128,
        intermediate: 344,
        layers: layers(2),
        heads: 4,
        kv_heads: 2,
        vocab: 512,
        positions: 512,
        rope_theta: 10000.0,
        rope_factor: None,
    },
];

impl FromStr for ModelShape {
    type Err = HubError;

    fn from_str(name: &str) -> Result<Self, HubError> {
        let found = KNOWN.into_iter().find(|shape| shape.name == name);
        found.ok_or_else(|| HubError::UnknownShape {
            name: name.to_string(),
            known: KNOWN.map(|shape| format!("`{}`", shape.name)).join(", "),
        })
    }
}

impl ModelShape {
    /// Every tensor by its name in the file: embedding, blocks, norm, head.
    pub(super) fn tensors(&self, dtype: HalfType) -> Vec<(String, TensorInfo)> {
        let dtype = match dtype {
            HalfType::F16 => Dtype::F16,
            HalfType::Bf16 => Dtype::BF16,
        };
        let (hidden, wide) = (self.hidden, self.intermediate);
        let kv = hidden / self.heads * self.kv_heads;
        let mut tensors = Vec::new();
        let mut add = |name: String, shape: &[usize]| {
            let shape = shape.to_vec();
            tensors.push((format!("{name}.weight"), TensorInfo { dtype, shape }));
        };
        add("model.embed_tokens".to_string(), &[self.vocab, hidden]);
        for index in 0..self.layers.get() {
            for (name, shape) in [
                ("input_layernorm", &[hidden][..]),
                ("self_attn.q_proj", &[hidden, hidden]),
                ("self_attn.k_proj", &[kv, hidden]),
                ("self_attn.v_proj", &[kv, hidden]),
                ("self_attn.o_proj", &[hidden, hidden]),
                ("post_attention_layernorm", &[hidden]),
                ("mlp.gate_proj", &[wide, hidden]),
                ("mlp.up_proj", &[wide, hidden]),
                ("mlp.down_proj", &[hidden, wide]),
            ] {
                add(format!("model.layers.{index}.{name}"), shape);
            }
        }
        add("model.norm".to_string(), &[hidden]);
        add("lm_head".to_string(), &[self.vocab, hidden]);
        tensors
    }

    /// The small files by name.
    pub(super) fn texts(&self, dtype: HalfType) -> [(&'static str, Json); 4] {
        [
            ("config.json", self.config(dtype)),
            (
                "generation_config.json",
                json!({"_from_model_config": true, "bos_token_id": BOS, "eos_token_id": EOS}),
            ),
            ("tokenizer.json", self.tokenizer()),
            ("tokenizer_config.json", self.tokenizer_config()),
        ]
    }

    fn config(&self, dtype: HalfType) -> Json {
        let dtype = match dtype {
            HalfType::F16 => "float16",
            HalfType::Bf16 => "bfloat16",
        };
        let scaling = self
            .rope_factor
            .map(|factor| json!({"type": "linear", "factor": factor}));
        json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocab,
            "max_position_embeddings": self.positions,
            "rms_norm_eps": 1e-5,
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling,
            "hidden_act": "silu",
            "attention_bias": false,
            "mlp_bias": false,
            "initializer_range": DEVIATION,
            "tie_word_embeddings": false,
            "use_cache": true,
            "torch_dtype": dtype,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
        })
    }

    fn tokenizer(&self) -> Json {
        let special = SPECIAL.iter().map(|token| token.to_string());
        let words = special.chain((0..self.words()).map(|word| format!("t{word}")));
        let vocabulary: Map<String, Json> = words.zip((0..).map(|id: u32| json!(id))).collect();
        let added: Vec<Json> = (SPECIAL.iter().enumerate())
            .map(|(id, token)| {
                json!({
                    "id": id,
                    "content": token,
                    "single_word": false,
                    "lstrip": false,
                    "rstrip": false,
                    "normalized": false,
                    "special": true,
                })
            })
            .collect();
        json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": added,
            "normalizer": null,
            "pre_tokenizer": {"type": "Whitespace"},
            "post_processor": null,
            "decoder": null,
            "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": SPECIAL[0]},
        })
    }

    fn tokenizer_config(&self) -> Json {
        json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": SPECIAL[0],
            "bos_token": SPECIAL[BOS],
            "eos_token": SPECIAL[EOS],
            "model_max_length": self.positions,
            "clean_up_tokenization_spaces": false,
        })
    }

    /// Tokens that are not special.
    pub(super) fn words(&self) -> usize {
        self.vocab.saturating_sub(SPECIAL.len())
    }

    /// The id of the first of them.
    pub(super) fn first_word(&self) -> usize {
        SPECIAL.len()
    }
}
