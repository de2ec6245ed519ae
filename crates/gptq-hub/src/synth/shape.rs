//! Shapes of Llama and Gemma 3 models, with the files that go with the weights.

use std::num::NonZeroU16;
use std::str::FromStr;

use gptq_types::TensorInfo;
use serde_json::{Map, Value as Json, json};

use crate::{HalfType, HubError};

/// Standard deviation of the weights: the `initializer_range` of both families.
pub(super) const DEVIATION: f64 = 0.02;

/// The first ids, in order, as in Llama's own vocabulary; `t0`, `t1`, ... follow.
const SPECIAL: [&str; 3] = ["<unk>", "<s>", "</s>"];
const BOS: usize = 1;
const EOS: usize = 2;

/// The architecture of a model, apart from its dimensions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShapeFamily {
    /// Untied embeddings and no biases; norms multiply by their weights.
    Llama,
    /// Tied embeddings, norms of queries and keys and behind each part of a block; norms multiply
    /// by 1 and their weights, which lie around 0. Five blocks of six see a window.
    Gemma3 {
        /// Tokens in it.
        window: usize,
        /// Scores are divided by the root of this.
        score_width: usize,
    },
}

/// The dimensions of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelShape {
    /// The name that [`ModelShape::from_str`] accepts.
    pub name: &'static str,
    /// The architecture that the dimensions belong to.
    pub family: ShapeFamily,
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
    /// Width of a head.
    pub head_dim: usize,
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
    family: ShapeFamily::Llama,
    hidden: 4096,
    intermediate: 11008,
    layers: layers(32),
    heads: 32,
    kv_heads: 32,
    head_dim: 128,
    vocab: 32000,
    positions: 4096,
    rope_theta: 10000.0,
    rope_factor: None,
};

/// Period of Gemma 3's sliding windows in blocks; the last block of each period has none.
const GEMMA_PERIOD: usize = 6;
const GEMMA_LOCAL_ROPE_THETA: f64 = 10000.0;

const KNOWN: [ModelShape; 6] = [
    LLAMA_2_7B,
    ModelShape {
        name: "llama-2-7b-32k",
        positions: 32768,
        rope_factor: Some(8.0),
        ..LLAMA_2_7B
    },
    ModelShape {
        name: "llama-2-70b",
        hidden: 8192,
        intermediate: 28672,
        layers: layers(80),
        heads: 64,
        kv_heads: 8,
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
        name: "gemma-3-27b",
        family: ShapeFamily::Gemma3 {
            window: 1024,
            score_width: 168,
        },
        hidden: 5376,
        intermediate: 21504,
        layers: layers(62),
        heads: 32,
        kv_heads: 16,
        head_dim: 128,
        vocab: 262_208,
        positions: 131_072,
        rope_theta: 1_000_000.0,
        rope_factor: Some(8.0),
    },
    ModelShape {
        name: "tiny",
        family: ShapeFamily::Llama,
        hidden: 128,
        intermediate: 344,
        layers: layers(2),
        heads: 4,
        kv_heads: 2,
        head_dim: 32,
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
        let dtype = dtype.dtype();
        let (hidden, wide, head) = (self.hidden, self.intermediate, self.head_dim);
        let (q, kv) = (self.heads * head, self.kv_heads * head);
        let mut tensors = Vec::new();
        let mut add = |name: String, shape: &[usize]| {
            let shape = shape.to_vec();
            tensors.push((format!("{name}.weight"), TensorInfo { dtype, shape }));
        };
        let gemma = self.family != ShapeFamily::Llama;
        add("model.embed_tokens".to_string(), &[self.vocab, hidden]);
        for index in 0..self.layers.get() {
            for (name, shape, here) in [
                ("input_layernorm", &[hidden][..], true),
                ("self_attn.q_proj", &[q, hidden], true),
                ("self_attn.k_proj", &[kv, hidden], true),
                ("self_attn.v_proj", &[kv, hidden], true),
                ("self_attn.o_proj", &[hidden, q], true),
                ("self_attn.q_norm", &[head], gemma),
                ("self_attn.k_norm", &[head], gemma),
                ("post_attention_layernorm", &[hidden], true),
                ("pre_feedforward_layernorm", &[hidden], gemma),
                ("mlp.gate_proj", &[wide, hidden], true),
                ("mlp.up_proj", &[wide, hidden], true),
                ("mlp.down_proj", &[hidden, wide], true),
                ("post_feedforward_layernorm", &[hidden], gemma),
            ] {
                if here {
                    add(format!("model.layers.{index}.{name}"), shape);
                }
            }
        }
        add("model.norm".to_string(), &[hidden]);
        if !gemma {
            add("lm_head".to_string(), &[self.vocab, hidden]);
        }
        tensors
    }

    /// Whether norm weights are factors, rather than offsets from a factor of 1.
    pub(super) fn norms_are_factors(&self) -> bool {
        self.family == ShapeFamily::Llama
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
        let mut config = json!({
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocab,
            "max_position_embeddings": self.positions,
            "rope_theta": self.rope_theta,
            "attention_bias": false,
            "initializer_range": DEVIATION,
            "use_cache": true,
            "torch_dtype": dtype.name(),
            "bos_token_id": BOS,
            "eos_token_id": EOS,
        });
        let factor = self.rope_factor;
        let own = match self.family {
            ShapeFamily::Llama => json!({
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "rms_norm_eps": 1e-5,
                "rope_scaling": factor.map(|factor| json!({"type": "linear", "factor": factor})),
                "hidden_act": "silu",
                "mlp_bias": false,
                "tie_word_embeddings": false,
            }),
            ShapeFamily::Gemma3 {
                window,
                score_width,
            } => json!({
                "architectures": ["Gemma3ForCausalLM"],
                "model_type": "gemma3_text",
                "head_dim": self.head_dim,
                "rms_norm_eps": 1e-6,
                "rope_scaling":
                    factor.map(|factor| json!({"rope_type": "linear", "factor": factor})),
                "rope_local_base_freq": GEMMA_LOCAL_ROPE_THETA,
                "sliding_window": window,
                "sliding_window_pattern": GEMMA_PERIOD,
                "layer_types": self.windowed_blocks(),
                "query_pre_attn_scalar": score_width,
                "attn_logit_softcapping": null,
                "final_logit_softcapping": null,
                "hidden_activation": "gelu_pytorch_tanh",
                "tie_word_embeddings": true,
            }),
        };
        if let (Json::Object(config), Json::Object(own)) = (&mut config, own) {
            config.extend(own);
        }
        config
    }

    fn windowed_blocks(&self) -> Vec<&'static str> {
        let kind = |block: usize| match (block + 1).is_multiple_of(GEMMA_PERIOD) {
            true => "full_attention",
            false => "sliding_attention",
        };
        (0..usize::from(self.layers.get())).map(kind).collect()
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
