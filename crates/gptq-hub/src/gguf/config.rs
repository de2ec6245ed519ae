//! Sizes of the models in GGUF files, and `config.json` rebuilt from their keys.
//!
//! Keys below the architecture's name change what a model computes. Those that are not known here
//! are refused by name, because a model that ignores one of them would be silently wrong.

use gptq_types::outside_name::shown;
use serde_json::{Value as Json, json};

use crate::HubError;
use crate::gguf::Value;
use crate::gguf::architecture::Architecture;
use crate::gguf::read::GgufFile;
use crate::gguf::rope::{RopeTensors, llama3_scaling, longrope_scaling, scaling_from_keys};
use crate::gguf::windows::Windows;

/// The default of llama.cpp for an absent key.
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
    /// The part of each head that rotary embeddings turn.
    pub rotary: usize,
    pub vocab: usize,
    pub context: usize,
    pub rms_epsilon: f64,
    pub rope_theta: f64,
}

/// Facts about a model that follow from its tensors, not from its keys.
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
        refuse_unknown_keys(file, architecture)?;
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
        let head_dim = head_dim(file, &key, hidden, heads)?;
        Ok(Dimensions {
            architecture,
            layers: required_size(file, &key("block_count"), MAX_LAYERS)?,
            hidden,
            feed_forward: size("feed_forward_length")?,
            heads,
            kv_heads,
            head_dim,
            rotary: rotary(file, &key("rope.dimension_count"), architecture, head_dim)?,
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
    let mut all = Architecture::ALL.into_iter();
    all.find(|known| known.name() == name).ok_or_else(|| {
        let known = Architecture::ALL.map(|known| format!("`{}`", known.name()));
        let name = shown(name, 40);
        file.metadata_error(key, format!("`{name}` is not one of {}", known.join(", ")))
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

fn refuse_unknown_keys(file: &GgufFile, architecture: Architecture) -> Result<(), HubError> {
    let prefix = format!("{}.", architecture.name());
    let known = |name: &str| KNOWN_KEYS.contains(&name) || architecture.own_keys().contains(&name);
    for (key, value) in file.metadata() {
        let Some(name) = key.strip_prefix(&prefix) else {
            continue;
        };
        let reason = match name {
            "expert_count" | "expert_used_count" if value.as_u64() != Some(0) => {
                "is not 0: mixtures of experts are not supported"
            }
            "attention.causal" if *value != Value::Bool(true) => "is not true",
            name if !known(name) => "is not supported",
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
    let value_key = key("attention.value_length");
    let value = file.optional_u64(&value_key)?;
    match value.is_some_and(|value| value != head_dim as u64) {
        true => Err(file.metadata_error(&value_key, differs(head_dim))),
        false => Ok(head_dim),
    }
}

fn differs(head_dim: usize) -> String {
    format!("differs from the head size {head_dim}")
}

/// Number of the `head_dim` components of a head that RoPE rotates.
fn rotary(
    file: &GgufFile,
    key: &str,
    architecture: Architecture,
    head_dim: usize,
) -> Result<usize, HubError> {
    let rotary = match file.metadata().contains_key(key) {
        true => required_size(file, key, MAX_DIMENSION)?,
        false => head_dim,
    };
    match architecture.turns_a_part() {
        false if rotary != head_dim => Err(file.metadata_error(key, differs(head_dim))),
        true if rotary > head_dim || !rotary.is_multiple_of(2) => {
            let reason = format!("{rotary} is no even part of the head size {head_dim}");
            Err(file.metadata_error(key, reason))
        }
        _ => Ok(rotary),
    }
}

/// Rows of the embedding; the key must agree, if present.
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

/// `config.json`. `rope` is what the file holds of rotary embeddings among its tensors.
pub(crate) fn config_json(
    file: &GgufFile,
    dims: &Dimensions,
    presence: Presence,
    rope: &RopeTensors,
    ids: SpecialIds,
) -> Result<Json, HubError> {
    let architecture = dims.architecture;
    let mut config = json!({
        "architectures": [architecture.class()],
        "model_type": architecture.model_type(),
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
        "rope_scaling": rope_scaling(file, dims, rope)?,
        "hidden_act": "silu",
        "tie_word_embeddings": presence.tied,
        "use_cache": true,
        "torch_dtype": architecture.half().name(),
        "bos_token_id": ids.bos,
        "eos_token_id": ids.eos,
    });
    if let Some(pad) = ids.pad {
        config["pad_token_id"] = json!(pad);
    }
    let own = match architecture {
        Architecture::Llama => json!({
            "attention_bias": presence.attention_bias,
            "mlp_bias": presence.feed_forward_bias,
        }),
        Architecture::Qwen2 => json!({"use_sliding_window": false}),
        Architecture::Qwen3 => json!({
            "attention_bias": presence.attention_bias,
            "use_sliding_window": false,
        }),
        Architecture::Gemma3 => gemma3(file, dims, presence)?,
        Architecture::Phi3 => phi3(file, dims)?,
        Architecture::Glm4 => json!({
            "attention_bias": presence.attention_bias,
            "partial_rotary_factor": dims.rotary as f64 / dims.head_dim as f64,
        }),
    };
    if let (Json::Object(config), Json::Object(own)) = (&mut config, own) {
        if architecture == Architecture::Gemma3 {
            config.shift_remove("hidden_act");
        }
        config.extend(own);
    }
    Ok(config)
}

/// Blocks of the model whose scores are scaled by the width of a head that its hidden size implies,
/// 168, and not by that of its heads, 128: the file tells it by nothing else.
const GEMMA3_27B_LAYERS: usize = 62;

fn gemma3(file: &GgufFile, dims: &Dimensions, presence: Presence) -> Result<Json, HubError> {
    let arch = dims.architecture.name();
    let windows = Windows::read(file, arch, dims.layers)?;
    let cap = file.optional_f64(&format!("{arch}.final_logit_softcapping"))?;
    let scalar = match dims.layers {
        GEMMA3_27B_LAYERS => dims.hidden / dims.heads,
        _ => dims.head_dim,
    };
    let mut own = json!({
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scalar,
        "attention_bias": presence.attention_bias,
        "attn_logit_softcapping": null,
        "final_logit_softcapping": cap.filter(|&cap| cap != 0.0),
        "rope_local_base_freq": windows.rope_theta,
        "sliding_window": windows.width,
        "layer_types": windows.layer_types(),
    });
    if let Some(period) = windows.period {
        own["sliding_window_pattern"] = json!(period);
    }
    Ok(own)
}

fn phi3(file: &GgufFile, dims: &Dimensions) -> Result<Json, HubError> {
    let arch = dims.architecture.name();
    let window = file.optional_u64(&format!("{arch}.attention.sliding_window"))?;
    let original = file.optional_u64(&original_context_key(arch))?;
    Ok(json!({
        "attention_bias": false,
        "partial_rotary_factor": dims.rotary as f64 / dims.head_dim as f64,
        "original_max_position_embeddings": original.unwrap_or(dims.context as u64),
        "sliding_window": window.filter(|&window| window > 0),
        "attention_dropout": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }))
}

fn original_context_key(arch: &str) -> String {
    format!("{arch}.rope.scaling.original_context_length")
}

fn rope_scaling(
    file: &GgufFile,
    dims: &Dimensions,
    tensors: &RopeTensors,
) -> Result<Json, HubError> {
    let arch = dims.architecture.name();
    let method = file.optional_str(&format!("{arch}.rope.scaling.type"))?;
    let from_keys = match tensors {
        // some converters name what the lists say
        RopeTensors::Factors { .. } if method == Some("longrope") => Json::Null,
        _ => scaling_from_keys(file, arch)?,
    };
    let Some(name) = tensors.name() else {
        return Ok(from_keys);
    };
    if !from_keys.is_null() {
        let reason = "comes with `rope.scaling` keys that say otherwise";
        return Err(file.tensor_error(name, reason));
    }
    match tensors {
        RopeTensors::None => Ok(from_keys),
        RopeTensors::Divisors(divisors) => {
            let reason = "holds frequency divisors that are not those of Llama 3";
            llama3_scaling(divisors, dims.rope_theta).ok_or_else(|| file.tensor_error(name, reason))
        }
        RopeTensors::Factors { long, short } => {
            let key = original_context_key(arch);
            let original = file.require(&key, file.optional_u64(&key)?)?;
            let attention = file.optional_f64(&format!("{arch}.rope.scaling.attn_factor"))?;
            Ok(longrope_scaling(
                long,
                short,
                dims.context as u64,
                original,
                attention,
            ))
        }
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
