//! Untrained models of every architecture, small enough to be made by each test.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use gptq_packer::write_safetensors;
use gptq_types::{Dtype, TensorInfo};
use half::{bf16, f16};
use serde_json::{Map, Value, json};

use super::random::Random;

/// The `model_type`s.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    Llama,
    Mistral,
    /// With biases on queries, keys and values.
    Qwen2,
    /// With norms on queries and keys, and a head width that is not `hidden / heads`.
    Qwen3,
}

impl Family {
    pub const ALL: [Family; 4] = [Family::Llama, Family::Mistral, Family::Qwen2, Family::Qwen3];

    pub fn model_type(self) -> &'static str {
        match self {
            Family::Llama => "llama",
            Family::Mistral => "mistral",
            Family::Qwen2 => "qwen2",
            Family::Qwen3 => "qwen3",
        }
    }
}

/// Shapes and storage of a model; weights follow from the seed.
#[derive(Clone, Debug)]
pub struct TinyModel {
    pub family: Family,
    pub dtype: Dtype,
    pub hidden: usize,
    pub ffn: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Entries of the embedding and of the tokenizer.
    pub vocab: usize,
    pub tied: bool,
    /// 1 writes `model.safetensors`; more write an index too.
    pub shards: usize,
    pub seed: u64,
}

/// One tensor before it is written.
pub struct Tensor {
    pub name: String,
    pub shape: Vec<usize>,
    pub values: Vec<f32>,
}

impl TinyModel {
    /// Two blocks whose shapes every reader takes; bf16, untied, one file.
    pub fn new(family: Family) -> Self {
        TinyModel {
            family,
            dtype: Dtype::BF16,
            hidden: 64,
            ffn: 96,
            layers: 2,
            heads: 4,
            kv_heads: 2,
            head_dim: if family == Family::Qwen3 { 32 } else { 16 },
            vocab: 128,
            tied: false,
            shards: 1,
            seed: 1,
        }
    }

    /// Writes `config.json`, the weights and `tokenizer.json` into a new folder.
    pub fn write(&self, folder: &Path) {
        self.write_changed(folder, |_| {});
    }

    /// Writes the model after `change` has edited its tensors.
    pub fn write_changed(&self, folder: &Path, change: impl FnOnce(&mut Vec<Tensor>)) {
        fs::create_dir_all(folder).unwrap();
        let mut tensors = self.tensors();
        change(&mut tensors);
        write_json(&folder.join("config.json"), &self.config());
        write_tokenizer(folder, self.vocab);
        if self.shards == 1 {
            let all: Vec<&Tensor> = tensors.iter().collect();
            write_tensors(&folder.join("model.safetensors"), &all, self.dtype);
            return;
        }
        let mut weight_map = Map::new();
        for shard in 0..self.shards {
            let file = format!("model-{:05}-of-{:05}.safetensors", shard + 1, self.shards);
            let part: Vec<&Tensor> = tensors.iter().skip(shard).step_by(self.shards).collect();
            weight_map.extend(part.iter().map(|t| (t.name.clone(), json!(file))));
            write_tensors(&folder.join(file), &part, self.dtype);
        }
        let index = json!({"metadata": {}, "weight_map": weight_map});
        write_json(&folder.join("model.safetensors.index.json"), &index);
    }

    fn config(&self) -> Value {
        let mut config = json!({
            "model_type": self.family.model_type(),
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocab,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": self.tied,
            "bos_token_id": 1,
        });
        if self.head_dim * self.heads != self.hidden {
            config["head_dim"] = json!(self.head_dim);
        }
        config
    }

    fn tensors(&self) -> Vec<Tensor> {
        let mut weights = Weights {
            random: Random::new(self.seed),
            tensors: Vec::new(),
        };
        let (hidden, ffn) = (self.hidden, self.ffn);
        let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        weights.add("model.embed_tokens.weight", &[self.vocab, hidden], 1.0);
        weights.norm("model.norm.weight", hidden);
        if !self.tied {
            weights.linear("lm_head", self.vocab, hidden);
        }
        for index in 0..self.layers {
            let at = |name: &str| format!("model.layers.{index}.{name}");
            weights.norm(&at("input_layernorm.weight"), hidden);
            weights.norm(&at("post_attention_layernorm.weight"), hidden);
            for (name, outputs) in [("q_proj", q), ("k_proj", kv), ("v_proj", kv)] {
                let name = at(&format!("self_attn.{name}"));
                weights.linear(&name, outputs, hidden);
                if self.family == Family::Qwen2 {
                    weights.add(&format!("{name}.bias"), &[outputs], 0.5);
                }
            }
            weights.linear(&at("self_attn.o_proj"), hidden, q);
            weights.linear(&at("mlp.gate_proj"), ffn, hidden);
            weights.linear(&at("mlp.up_proj"), ffn, hidden);
            weights.linear(&at("mlp.down_proj"), hidden, ffn);
            if self.family == Family::Qwen3 {
                weights.norm(&at("self_attn.q_norm.weight"), self.head_dim);
                weights.norm(&at("self_attn.k_norm.weight"), self.head_dim);
            }
        }
        weights.tensors
    }
}

struct Weights {
    random: Random,
    tensors: Vec<Tensor>,
}

impl Weights {
    fn add(&mut self, name: &str, shape: &[usize], deviation: f32) {
        let elements = shape.iter().product();
        let values = (0..elements).map(|_| self.random.normal() * deviation);
        self.tensors.push(Tensor {
            name: name.to_string(),
            shape: shape.to_vec(),
            values: values.collect(),
        });
    }

    /// Outputs as large as inputs.
    fn linear(&mut self, name: &str, outputs: usize, inputs: usize) {
        let deviation = 1.0 / (inputs as f32).sqrt();
        self.add(&format!("{name}.weight"), &[outputs, inputs], deviation);
    }

    /// Around 1.
    fn norm(&mut self, name: &str, width: usize) {
        self.add(name, &[width], 0.1);
        let norm = self.tensors.last_mut().unwrap();
        norm.values.iter_mut().for_each(|value| *value += 1.0);
    }
}

/// Writes tensors into one file, rounded to `dtype`.
pub fn write_tensors(path: &Path, tensors: &[&Tensor], dtype: Dtype) {
    let encoded: Vec<Vec<u8>> = tensors.iter().map(|t| encode(&t.values, dtype)).collect();
    let named: Vec<(&str, TensorInfo, &[u8])> = tensors
        .iter()
        .zip(&encoded)
        .map(|(tensor, bytes)| {
            let shape = tensor.shape.clone();
            let info = TensorInfo { dtype, shape };
            (tensor.name.as_str(), info, bytes.as_slice())
        })
        .collect();
    write_safetensors(path, &named, &BTreeMap::new()).unwrap();
}

fn encode(values: &[f32], dtype: Dtype) -> Vec<u8> {
    let values = values.iter();
    match dtype {
        Dtype::F32 => values.flat_map(|v| v.to_le_bytes()).collect(),
        Dtype::F16 => values
            .flat_map(|&v| f16::from_f32(v).to_le_bytes())
            .collect(),
        Dtype::BF16 => values
            .flat_map(|&v| bf16::from_f32(v).to_le_bytes())
            .collect(),
        other => panic!("{other} holds no weights"),
    }
}

/// Writes a `tokenizer.json`. Word level: `w0 w1 ...` and, last, `<unk>`.
pub fn write_tokenizer(folder: &Path, vocab: usize) {
    let mut words: Map<String, Value> = (0..vocab - 1)
        .map(|id| (format!("w{id}"), json!(id)))
        .collect();
    words.insert("<unk>".to_string(), json!(vocab - 1));
    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [],
        "normalizer": null,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": null,
        "decoder": null,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"},
    });
    write_json(&folder.join("tokenizer.json"), &tokenizer);
}

fn write_json(path: &Path, value: &Value) {
    fs::write(path, serde_json::to_vec_pretty(value).unwrap()).unwrap();
}
