//! Architectures of GGUF files, and `config.json` rebuilt from their keys.
//!
//! Keys below the architecture's name change what a model computes. Those that are not known here
//! are refused by name, because a model that ignores one of them would be silently wrong.

use serde_json::{Value as Json, json};

use crate::HubError;
use crate::gguf::Value;
use crate::gguf::read::GgufFile;
use crate::gguf::rope::{llama3_scaling, scaling_from_keys};

/// What llama.cpp takes when the key is absent.
const DEFAULT_ROPE_THETA: f64 = 10_000.0;
/// Far above any model, far below what could overflow.
const MAX_DIMENSION: u64 = 1 << 24;
const MAX_LAYERS: u64 = 1 << 12;

const KNOWN_KEYS: [&str; 22] = [
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "expert_count",
    "expert_used_count",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.factor",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "vocab_size",
    "attention.causal",
];

/// Decoders that can be imported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Architecture {
    /// Llama and Mistral.
    Llama,
    Qwen2,
    Qwen3,
}

impl Architecture {
    /// The prefix of its keys.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Architecture::Llama => "llama",
            Architecture::Qwen2 => "qwen2",
            Architecture::Qwen3 => "qwen3",
        }
    }

    fn class(self) -> &'static str {
        match self {
            Architecture::Llama => "LlamaForCausalLM",
            Architecture::Qwen2 => "Qwen2ForCausalLM",
            Architecture::Qwen3 => "Qwen3ForCausalLM",
        }
    }
}

/// Sizes of a decoder.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Dimensions {
    pub architecture: Architecture,
    pub layers: usize,
    pub hidden: usize,
    pub feed_forward: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub vocab: usize,
    pub context: usize,
    pub rms_epsilon: f64,
    pub rope_theta: f64,
}

/// What the tensors, not the keys, say about a model.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Presence {
    pub tied: bool,
    pub attention_bias: bool,
    pub feed_forward_bias: bool,
}

/// Ids of the tokens that a configuration names.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct SpecialIds {
    pub bos: Option<u64>,
    pub eos: Option<u64>,
    /// Ends a turn of a chat; a second end of the text.
    pub eot: Option<u64>,
    pub pad: Option<u64>,
    pub unk: Option<u64>,
}

impl Dimensions {
    /// Reads and checks the sizes.
    pub(crate) fn read(file: &GgufFile) -> Result<Self, HubError> {
        refuse_other_layouts(file)?;
        let architecture = architecture(file)?;
        refuse_unknown_keys(file, architecture.name())?;
        let key = |name: &str| format!("{}.{name}", architecture.name());
        let size = |name: &str| required_size(file, &key(name), MAX_DIMENSION);
        let hidden = size("embedding_length")?;
        let heads = size("attention.head_count")?;
        let kv_key = key("attention.head_count_kv");
        let kv_heads = match file.metadata().contains_key(&kv_key) {
            true => size("attention.head_count_kv")?,
            false => heads,
        };
        if !heads.is_multiple_of(kv_heads) {
            return Err(
                file.metadata_error(&kv_key, format!("{kv_heads} does not divide {heads} heads"))
            );
        }
        let epsilon_key = key("attention.layer_norm_rms_epsilon");
        let epsilon = file.optional_f64(&epsilon_key)?;
        let theta = file.optional_f64(&key("rope.freq_base"))?;
        Ok(Dimensions {
            architecture,
            layers: required_size(file, &key("block_count"), MAX_LAYERS)?,
            hidden,
            feed_forward: size("feed_forward_length")?,
            heads,
            kv_heads,
            head_dim: head_dim(file, &key, hidden, heads)?,
            vocab: vocabulary(file, &key("vocab_size"), hidden)?,
            context: size("context_length")?,
            rms_epsilon: file.require(&epsilon_key, epsilon)?,
            rope_theta: theta.unwrap_or(DEFAULT_ROPE_THETA),
        })
    }
}

fn architecture(file: &GgufFile) -> Result<Architecture, HubError> {
    let key = "general.architecture";
    let name = file.require(key, file.optional_str(key)?)?;
    [
        Architecture::Llama,
        Architecture::Qwen2,
        Architecture::Qwen3,
    ]
    .into_iter()
    .find(|architecture| architecture.name() == name)
    .ok_or_else(|| {
        file.metadata_error(
            key,
            format!("`{name}` is not one of `llama`, `qwen2`, `qwen3`"),
        )
    })
}

fn refuse_other_layouts(file: &GgufFile) -> Result<(), HubError> {
    let parts = file.optional_u64("split.count")?.unwrap_or(1);
    if parts > 1 {
        let reason = format!("is {parts}: files in several parts are not read");
        return Err(file.metadata_error("split.count", reason));
    }
    let key = "general.quantization_version";
    match file.optional_u64(key)? {
        None | Some(2) => Ok(()),
        Some(version) => Err(file.metadata_error(key, format!("{version} is not 2"))),
    }
}

fn refuse_unknown_keys(file: &GgufFile, arch: &str) -> Result<(), HubError> {
    let prefix = format!("{arch}.");
    for (key, value) in file.metadata() {
        let Some(name) = key.strip_prefix(&prefix) else {
            continue;
        };
        let reason = match name {
            "expert_count" | "expert_used_count" if value.as_u64() != Some(0) => {
                "is not 0: mixtures of experts are not supported"
            }
            "attention.causal" if *value != Value::Bool(true) => "is not true",
            name if !KNOWN_KEYS.contains(&name) => "is not supported",
            _ => continue,
        };
        return Err(file.metadata_error(key, reason));
    }
    Ok(())
}

fn required_size(file: &GgufFile, key: &str, limit: u64) -> Result<usize, HubError> {
    let value = file.require(key, file.optional_u64(key)?)?;
    if value == 0 || value > limit {
        return Err(file.metadata_error(key, format!("{value} is not between 1 and {limit}")));
    }
    Ok(value as usize)
}

fn head_dim(
    file: &GgufFile,
    key: &dyn Fn(&str) -> String,
    hidden: usize,
    heads: usize,
) -> Result<usize, HubError> {
    let length_key = key("attention.key_length");
    let head_dim = match file.metadata().contains_key(&length_key) {
        true => required_size(file, &length_key, MAX_DIMENSION)?,
        false if hidden.is_multiple_of(heads) => hidden / heads,
        false => {
            return Err(file.metadata_error(
                &key("attention.head_count"),
                format!("{heads} does not divide the hidden size {hidden}"),
            ));
        }
    };
    if !head_dim.is_multiple_of(2) {
        return Err(file.metadata_error(&length_key, format!("{head_dim} is odd")));
    }
    for name in ["attention.value_length", "rope.dimension_count"] {
        let value = file.optional_u64(&key(name))?;
        if value.is_some_and(|value| value != head_dim as u64) {
            let reason = format!("differs from the head size {head_dim}");
            return Err(file.metadata_error(&key(name), reason));
        }
    }
    Ok(head_dim)
}

/// The rows of the embedding; the key, where present, must say the same.
fn vocabulary(file: &GgufFile, key: &str, hidden: usize) -> Result<usize, HubError> {
    let name = "token_embd.weight";
    let embedding = file.tensors().iter().find(|tensor| tensor.name == name);
    let rows = match embedding.map(|tensor| &tensor.shape[..]) {
        Some(&[rows, columns]) if columns == hidden => rows,
        Some(shape) => {
            let reason = format!("has shape {shape:?}, expected [vocabulary, {hidden}]");
            return Err(file.tensor_error(name, reason));
        }
        None => return Err(file.tensor_error(name, "is missing")),
    };
    match file.optional_u64(key)? {
        Some(size) if size != rows as u64 => Err(file.metadata_error(
            key,
            format!("{size} differs from the {rows} rows of `{name}`"),
        )),
        _ => Ok(rows),
    }
}

/// `config.json`. `divisors` are the values of `rope_freqs.weight`, if the file has it.
pub(crate) fn config_json(
    file: &GgufFile,
    dims: &Dimensions,
    presence: Presence,
    divisors: Option<&[f32]>,
    ids: SpecialIds,
) -> Result<Json, HubError> {
    let mut config = json!({
        "architectures": [dims.architecture.class()],
        "model_type": dims.architecture.name(),
        "hidden_size": dims.hidden,
        "intermediate_size": dims.feed_forward,
        "num_hidden_layers": dims.layers,
        "num_attention_heads": dims.heads,
        "num_key_value_heads": dims.kv_heads,
        "head_dim": dims.head_dim,
        "vocab_size": dims.vocab,
        "max_position_embeddings": dims.context,
        "rms_norm_eps": dims.rms_epsilon,
        "rope_theta": dims.rope_theta,
        "rope_scaling": rope_scaling(file, dims, divisors)?,
        "hidden_act": "silu",
        "tie_word_embeddings": presence.tied,
        "use_cache": true,
        "torch_dtype": "float16",
        "bos_token_id": ids.bos,
        "eos_token_id": ids.eos,
    });
    if let Some(pad) = ids.pad {
        config["pad_token_id"] = json!(pad);
    }
    match dims.architecture {
        Architecture::Llama => {
            config["attention_bias"] = json!(presence.attention_bias);
            config["mlp_bias"] = json!(presence.feed_forward_bias);
        }
        Architecture::Qwen2 => config["use_sliding_window"] = json!(false),
        Architecture::Qwen3 => {
            config["attention_bias"] = json!(presence.attention_bias);
            config["use_sliding_window"] = json!(false);
        }
    }
    Ok(config)
}

fn rope_scaling(
    file: &GgufFile,
    dims: &Dimensions,
    divisors: Option<&[f32]>,
) -> Result<Json, HubError> {
    let from_keys = scaling_from_keys(file, dims.architecture.name())?;
    let name = "rope_freqs.weight";
    match divisors {
        None => Ok(from_keys),
        Some(_) if !from_keys.is_null() => {
            Err(file.tensor_error(name, "comes with `rope.scaling` keys that say otherwise"))
        }
        Some(divisors) => llama3_scaling(divisors, dims.rope_theta).ok_or_else(|| {
            file.tensor_error(
                name,
                "holds frequency divisors that are not those of Llama 3",
            )
        }),
    }
}

/// `generation_config.json`: where to begin and where to stop.
pub(crate) fn generation_json(ids: SpecialIds) -> Json {
    let mut config = json!({"_from_model_config": true, "bos_token_id": ids.bos});
    config["eos_token_id"] = match (ids.eos, ids.eot) {
        (Some(eos), Some(eot)) if eos != eot => json!([eos, eot]),
        (eos, eot) => json!(eos.or(eot)),
    };
    if let Some(pad) = ids.pad {
        config["pad_token_id"] = json!(pad);
    }
    config
}
