//! Which keys of `config.json` mean what: honoured, harmless, or refused by name.
//!
//! A key that changes the function and is passed over gives other numbers without a word: a head of
//! which half is rotated, logits that are capped, a residual that is scaled. So every key is in one of
//! these tables, or it is named to the user.

use serde_json::Value;

use crate::config::{ConfigError, Fields};

/// Keys that `arch` and `rope` read.
const READ: [&str; 24] = [
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "tie_word_embeddings",
    "hidden_act",
    "attention_bias",
    "mlp_bias",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
    // The reader of packed files reads it.
    "quantization_config",
    "query_pre_attn_scalar",
    "v_head_dim",
];

/// Keys without an effect on the logits: how a model is stored, trained, sampled from and named.
const HARMLESS: [&str; 76] = [
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_commit_hash",
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "attn_implementation",
    "attn_pdrop",
    "bad_words_ids",
    "begin_suppress_tokens",
    "bos_token_id",
    "cache_implementation",
    "chunk_size_feed_forward",
    "cls_token_id",
    "cross_attention_hidden_size",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "dtype",
    "early_stopping",
    "embd_pdrop",
    "embedding_dropout",
    "encoder_no_repeat_ngram_size",
    "eod_token_id",
    "eos_token_id",
    "exponential_decay_length_penalty",
    "finetuning_task",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "gradient_checkpointing",
    "hidden_dropout",
    "id2label",
    "initializer_range",
    "is_decoder",
    "label2id",
    "length_penalty",
    "mask_token_id",
    "max_length",
    "max_new_tokens",
    "min_length",
    "name_or_path",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "pad_token_id",
    "prefix",
    "problem_type",
    "remove_invalid_values",
    "repetition_penalty",
    "resid_pdrop",
    "residual_dropout",
    "return_dict",
    "return_dict_in_generate",
    "sep_token_id",
    "suppress_tokens",
    "task_specific_params",
    "temperature",
    "tf_legacy_loss",
    "tie_encoder_decoder",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torch_dtype",
    "torchscript",
    "transformers_version",
    "typical_p",
    "unk_token_id",
    "unsloth_fixed",
    "unsloth_version",
    "use_bfloat16",
    "use_cache",
    "use_flash_attn",
];

/// The only value of a key under which the model is the one computed here; `null` and an absent key
/// mean the same.
#[derive(Clone, Copy)]
enum Only {
    /// This number.
    Number(f64),
    /// This flag.
    Flag(bool),
    /// One of these strings.
    Text(&'static [&'static str]),
    /// An empty list or object.
    Empty,
    /// No value at all.
    Absent,
    /// A list of this number alone.
    Each(f64),
}

impl Only {
    fn allows(self, value: &Value) -> bool {
        match self {
            Only::Number(number) => value.as_f64() == Some(number),
            Only::Flag(flag) => value.as_bool() == Some(flag),
            Only::Text(words) => value.as_str().is_some_and(|word| words.contains(&word)),
            Only::Empty => match value {
                Value::Array(list) => list.is_empty(),
                Value::Object(map) => map.is_empty(),
                _ => false,
            },
            Only::Absent => false,
            Only::Each(number) => (value.as_array())
                .is_some_and(|list| list.iter().all(|value| value.as_f64() == Some(number))),
        }
    }

    fn expected(self) -> &'static str {
        match self {
            Only::Number(0.0) => "0, since it changes the model",
            Only::Number(_) => "1, since it changes the model",
            Only::Flag(false) => "false, since it changes the model",
            Only::Flag(true) => "true, since it changes the model",
            Only::Text(_) => "that of Llama, since it changes the model",
            Only::Empty => "an empty list, since it changes the model",
            Only::Absent => "no such key, since it changes the model",
            Only::Each(_) => "a list of ones, since it changes the model",
        }
    }
}

const SILU: Only = Only::Text(&["silu", "swish"]);

/// Keys by which relatives of Llama differ from it, each with the value under which they do not.
const CHANGES: &[(&str, Only)] = &[
    // How much of a head is rotated, and which layers.
    ("partial_rotary_factor", Only::Number(1.0)),
    ("rotary_pct", Only::Number(1.0)),
    ("rotary_percent", Only::Number(1.0)),
    ("rope_pct", Only::Number(1.0)),
    ("rope_percentage", Only::Number(1.0)),
    ("rotary_dim", Only::Absent),
    ("rope_dim", Only::Absent),
    ("rotary_emb_base", Only::Absent),
    ("rope_local_base_freq", Only::Absent),
    ("local_rope_theta", Only::Absent),
    ("global_rope_theta", Only::Absent),
    ("no_rope_layers", Only::Each(1.0)),
    ("no_rope_layer_interval", Only::Absent),
    ("nope_layer_interval", Only::Absent),
    ("use_rope", Only::Flag(true)),
    ("rope_interleave", Only::Flag(false)),
    ("rope_interleaved", Only::Flag(false)),
    ("use_mrope", Only::Flag(false)),
    ("mrope_section", Only::Empty),
    ("alibi", Only::Flag(false)),
    ("use_alibi", Only::Flag(false)),
    ("position_embedding_type", Only::Text(&["rope", "rotary"])),
    ("learned_pos_emb", Only::Flag(false)),
    // Which keys a query sees.
    ("sliding_window_pattern", Only::Absent),
    ("attention_chunk_size", Only::Absent),
    ("attn_temperature_tuning", Only::Flag(false)),
    ("is_causal", Only::Flag(true)),
    ("use_bidirectional_attention", Only::Flag(false)),
    ("use_attention_sinks", Only::Flag(false)),
    ("num_kv_shared_layers", Only::Number(0.0)),
    ("attention_k_eq_v", Only::Flag(false)),
    ("per_layer_config", Only::Empty),
    ("global_head_dim", Only::Absent),
    ("num_global_key_value_heads", Only::Absent),
    ("cla_share_factor", Only::Number(1.0)),
    ("use_cla", Only::Flag(false)),
    // Caps and factors.
    ("attn_logit_softcapping", Only::Absent),
    ("attn_logit_softcap", Only::Absent),
    ("attention_logit_softcapping", Only::Absent),
    ("attention_logit_cap", Only::Absent),
    ("final_logit_softcapping", Only::Absent),
    ("final_logit_softcap", Only::Absent),
    ("logits_soft_cap", Only::Absent),
    ("clip_qkv", Only::Absent),
    ("qkv_clip", Only::Absent),
    ("attention_multiplier", Only::Absent),
    ("attention_scale", Only::Absent),
    ("attn_scale", Only::Absent),
    ("softmax_scale", Only::Absent),
    ("scale_attn_weights", Only::Flag(true)),
    ("scale_attn_by_inverse_layer_idx", Only::Flag(false)),
    ("embedding_multiplier", Only::Number(1.0)),
    ("embedding_scale", Only::Number(1.0)),
    ("scale_embeddings", Only::Flag(false)),
    ("scale_emb", Only::Number(1.0)),
    ("scale_depth", Only::Absent),
    ("dim_model_base", Only::Absent),
    ("residual_multiplier", Only::Number(1.0)),
    ("residual_scale", Only::Number(1.0)),
    ("logits_scaling", Only::Number(1.0)),
    ("logit_scale", Only::Number(1.0)),
    ("logits_scale", Only::Number(1.0)),
    ("output_multiplier", Only::Number(1.0)),
    ("output_multiplier_scale", Only::Number(1.0)),
    ("lm_head_multiplier", Only::Number(1.0)),
    ("key_multiplier", Only::Number(1.0)),
    ("attention_in_multiplier", Only::Number(1.0)),
    ("attention_out_multiplier", Only::Number(1.0)),
    ("mlp_multipliers", Only::Each(1.0)),
    ("mup_enabled", Only::Flag(false)),
    ("use_mup", Only::Flag(false)),
    // Norms.
    ("qk_norm", Only::Flag(false)),
    ("use_qk_norm", Only::Flag(false)),
    ("qk_layernorm", Only::Flag(false)),
    ("use_post_norm", Only::Flag(false)),
    ("use_pre_norm", Only::Flag(true)),
    ("norm_after", Only::Flag(false)),
    ("apply_layernorm_1p", Only::Flag(false)),
    ("norm_type", Only::Text(&["rms_norm", "rmsnorm", "RMSNorm"])),
    (
        "layer_norm_type",
        Only::Text(&["rms", "rms_norm", "rmsnorm"]),
    ),
    ("use_parallel_residual", Only::Flag(false)),
    ("use_parallel_block", Only::Flag(false)),
    ("parallel_attn", Only::Flag(false)),
    ("parallel_attention", Only::Flag(false)),
    // Biases and activations.
    ("use_bias", Only::Flag(false)),
    ("bias", Only::Flag(false)),
    ("use_qkv_bias", Only::Flag(false)),
    ("qkv_bias", Only::Flag(false)),
    ("o_bias", Only::Flag(false)),
    ("attention_out_bias", Only::Flag(false)),
    ("lm_head_bias", Only::Flag(false)),
    ("add_bias_linear", Only::Flag(false)),
    ("hidden_activation", SILU),
    ("mlp_hidden_act", SILU),
    ("activation_function", SILU),
    ("activation", SILU),
    ("activation_sparsity_pattern", Only::Absent),
    ("use_gated_activation", Only::Flag(true)),
    ("hidden_size_per_layer_input", Only::Number(0.0)),
    ("use_double_wide_mlp", Only::Flag(false)),
    // Experts, latent attention, state spaces: other tensors too.
    ("enable_moe_block", Only::Flag(false)),
    ("num_experts", Only::Number(0.0)),
    ("num_local_experts", Only::Number(0.0)),
    ("n_routed_experts", Only::Number(0.0)),
    ("n_shared_experts", Only::Number(0.0)),
    ("num_shared_experts", Only::Number(0.0)),
    ("moe_num_experts", Only::Number(0.0)),
    ("num_experts_per_tok", Only::Number(0.0)),
    ("num_experts_per_token", Only::Number(0.0)),
    ("moe_intermediate_size", Only::Number(0.0)),
    ("moe_layers", Only::Empty),
    ("kv_lora_rank", Only::Absent),
    ("q_lora_rank", Only::Absent),
    ("qk_rope_head_dim", Only::Absent),
    ("qk_nope_head_dim", Only::Absent),
    ("mamba_d_state", Only::Absent),
    ("ssm_state_size", Only::Absent),
    ("layers_block_type", Only::Absent),
    ("block_configs", Only::Absent),
    ("num_nextn_predict_layers", Only::Number(0.0)),
    ("vision_config", Only::Absent),
    ("text_config", Only::Absent),
    ("audio_config", Only::Absent),
    // Another kind of model.
    ("is_encoder_decoder", Only::Flag(false)),
    ("add_cross_attention", Only::Flag(false)),
    ("pruned_heads", Only::Empty),
];

/// Changes a sum's order and no more, or what this program reads from the weights anyway: named, not
/// refused.
const NAMED: &[(&str, Only)] = &[("pretraining_tp", Only::Number(1.0))];

/// Keys that a family honours: of those that change a model, the ones that it reads itself, or has one
/// value for that is not Llama's.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Honoured {
    /// Keys that it reads.
    pub reads: &'static [&'static str],
    /// Keys with the only value that it has for them.
    pub means: &'static [(&'static str, bool)],
}

impl Honoured {
    /// None.
    pub const NOTHING: Honoured = Honoured {
        reads: &[],
        means: &[],
    };

    /// Keys that it reads.
    pub const fn reads(reads: &'static [&'static str]) -> Self {
        Honoured { reads, means: &[] }
    }

    /// Keys with another value than Llama's.
    pub const fn means(means: &'static [(&'static str, bool)]) -> Self {
        Honoured { reads: &[], means }
    }
}

/// Refuses keys that make another model than the one computed here; returns those that nobody here
/// knows, in the order of the alphabet.
pub(crate) fn check(fields: &Fields<'_>, honoured: &Honoured) -> Result<Vec<String>, ConfigError> {
    for &(key, only) in CHANGES {
        if honoured.reads.contains(&key) {
            continue;
        }
        let means = honoured.means.iter().find(|(named, _)| *named == key);
        let only = means.map_or(only, |&(_, flag)| Only::Flag(flag));
        if let Some(value) = fields.get(key)
            && !only.allows(value)
        {
            return Err(ConfigError::unsupported(key, value, only.expected()));
        }
    }
    let known = |key: &str| {
        READ.contains(&key)
            || HARMLESS.contains(&key)
            || honoured.reads.contains(&key)
            || CHANGES.iter().any(|(known, _)| *known == key)
    };
    let mut unread: Vec<String> = (fields.0.as_object().into_iter().flatten())
        .filter(|(key, value)| {
            let named = NAMED.iter().find(|(named, _)| named == key);
            !value.is_null() && named.map_or(!known(key), |(_, only)| !only.allows(value))
        })
        .map(|(key, _)| gptq_types::outside_name::shown(key, SHOWN_CHARACTERS))
        .collect();
    unread.sort();
    unread.truncate(SHOWN_KEYS);
    Ok(unread)
}

/// A key that says nothing about the logits.
pub(crate) fn is_harmless(key: &str) -> bool {
    HARMLESS.contains(&key)
}

/// Characters of an unknown key that an error shows.
const SHOWN_CHARACTERS: usize = 40;
/// Unknown keys that an error shows at most.
const SHOWN_KEYS: usize = 100;

/// Checks the keys of the rotary settings; `read` are those that their kind reads.
pub(crate) fn check_rope(fields: &Fields<'_>, read: &[&str]) -> Result<Vec<String>, ConfigError> {
    const ROPE_CHANGES: &[(&str, Only)] = &[
        ("partial_rotary_factor", Only::Number(1.0)),
        ("truncate", Only::Flag(true)),
        ("mrope_section", Only::Empty),
        ("mrope_interleaved", Only::Flag(false)),
        ("llama_4_scaling_beta", Only::Absent),
        ("long_factor", Only::Absent),
        ("short_factor", Only::Absent),
        ("alpha", Only::Absent),
    ];
    for &(key, only) in ROPE_CHANGES {
        if !read.contains(&key)
            && let Some(value) = fields.get(key)
            && !only.allows(value)
        {
            return Err(ConfigError::unsupported(key, value, only.expected()));
        }
    }
    let known = |key: &str| read.contains(&key) || ROPE_CHANGES.iter().any(|(k, _)| *k == key);
    Ok((fields.0.as_object().into_iter().flatten())
        .filter(|(key, value)| !value.is_null() && !known(key))
        .map(|(key, _)| gptq_types::outside_name::shown(key, SHOWN_CHARACTERS))
        .take(SHOWN_KEYS)
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(json: &str) -> Result<Vec<String>, ConfigError> {
        check(
            &Fields(&serde_json::from_str(json).unwrap()),
            &Honoured::NOTHING,
        )
    }

    #[test]
    fn no_key_stands_in_two_tables() {
        let changes = CHANGES.iter().chain(NAMED).map(|(key, _)| *key);
        let mut all: Vec<&str> = READ.into_iter().chain(HARMLESS).chain(changes).collect();
        let count = all.len();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), count);
    }

    /// All of these were passed over: the logits were those of another model.
    #[test]
    fn a_key_that_changes_the_model_is_refused_by_name() {
        for (json, key) in [
            (r#"{"partial_rotary_factor": 0.5}"#, "partial_rotary_factor"),
            (
                r#"{"final_logit_softcapping": 30.0}"#,
                "final_logit_softcapping",
            ),
            (r#"{"residual_multiplier": 0.22}"#, "residual_multiplier"),
            (r#"{"logit_scale": "x"}"#, "logit_scale"),
            (r#"{"clip_qkv": 8}"#, "clip_qkv"),
            (r#"{"no_rope_layers": [1, 1, 1, 0]}"#, "no_rope_layers"),
            (r#"{"use_qk_norm": true}"#, "use_qk_norm"),
            (r#"{"num_local_experts": 8}"#, "num_local_experts"),
            (r#"{"hidden_activation": "gelu"}"#, "hidden_activation"),
        ] {
            let error = checked(json).unwrap_err();
            assert!(error.is_unsupported(), "{error}");
            assert!(error.to_string().contains(&format!("`{key}`")), "{error}");
        }
        let neutral = r#"{"partial_rotary_factor": 1, "clip_qkv": null, "use_qk_norm": false,
            "no_rope_layers": [1, 1], "num_experts": 0, "pretraining_tp": 1}"#;
        assert_eq!(checked(neutral).unwrap(), [""; 0]);
    }

    #[test]
    fn keys_that_nobody_knows_are_named() {
        let json = r#"{"use_cache": true, "zeta": 1, "auto_map": {}, "nothing": null,
            "pretraining_tp": 2}"#;
        assert_eq!(
            checked(json).unwrap(),
            ["auto_map", "pretraining_tp", "zeta"]
        );
    }
}
