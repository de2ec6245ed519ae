//! `tokenizer.json` and `tokenizer_config.json` rebuilt from the vocabulary in a GGUF file.
//!
//! Two kinds are known: `gpt2` (byte-level BPE with its merges; `tokenizer.ggml.pre` names the
//! pre-tokenizer) and `llama` (SentencePiece; merges follow from the scores). The file does not
//! record whether a special token strips adjacent spaces; here none does.

use gptq_types::outside_name::shown;
use serde_json::{Map, Value as Json, json};

use crate::HubError;
use crate::gguf::config::SpecialIds;
use crate::gguf::pretokenizer::{FAMILIES, Family, family};
use crate::gguf::read::GgufFile;
use crate::gguf::sentencepiece;
use crate::gguf::vocabulary::{MERGES, TOKENS, Vocabulary};

const TEMPLATE: &str = "tokenizer.chat_template";

/// A tokenizer as files of a model folder.
#[derive(Debug)]
pub(crate) struct TokenizerFiles {
    /// `tokenizer.json`.
    pub tokenizer: Json,
    /// `tokenizer_config.json`.
    pub config: Json,
    /// Ids for `config.json`.
    pub ids: SpecialIds,
    /// Assumptions and omissions.
    pub notes: Vec<String>,
}

/// Rebuilds the tokenizer of a model whose embedding has `rows` rows and whose context is `context`.
///
/// Fails on kinds of tokenizers that are not known, on vocabularies larger than the embedding, on
/// repeated tokens and on merges of tokens that do not exist.
pub(crate) fn rebuild(
    file: &GgufFile,
    rows: usize,
    context: usize,
) -> Result<TokenizerFiles, HubError> {
    let vocabulary = Vocabulary::read(file, rows)?;
    let model_key = "tokenizer.ggml.model";
    let parts = match file.require(model_key, file.optional_str(model_key)?)? {
        "gpt2" => byte_level_parts(&vocabulary)?,
        "llama" => sentencepiece_parts(&vocabulary)?,
        other => {
            let reason = format!("`{other}` is not one of `gpt2`, `llama`");
            return Err(file.metadata_error(model_key, reason));
        }
    };
    let frame = frame(&vocabulary, &parts)?;
    let mut notes = parts.notes;
    let config = tokenizer_config(&vocabulary, parts.ids, frame, context, &mut notes)?;
    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": vocabulary.added_tokens(),
        "normalizer": parts.family.normalizer,
        "pre_tokenizer": parts.family.pre_tokenizer,
        "post_processor": post_processor(&vocabulary, parts.family.post_processor, frame),
        "decoder": parts.family.decoder,
        "model": parts.model,
    });
    Ok(TokenizerFiles {
        tokenizer,
        config,
        ids: parts.ids,
        notes,
    })
}

/// Parts that differ between the two kinds of tokenizers.
struct Parts {
    family: Family,
    model: Json,
    ids: SpecialIds,
    notes: Vec<String>,
}

fn byte_level_parts(vocabulary: &Vocabulary) -> Result<Parts, HubError> {
    let file = vocabulary.file;
    let key = "tokenizer.ggml.pre";
    let stored = file.optional_str(key)?;
    let pre = stored.unwrap_or("default");
    let prefix = file.optional_bool("tokenizer.ggml.add_space_prefix")?;
    let family = family(pre, prefix.unwrap_or(false)).ok_or_else(|| {
        let pre = shown(pre, 40);
        file.metadata_error(key, format!("`{pre}` is not one of {FAMILIES}"))
    })?;
    let mut notes = Vec::new();
    if pre == "default" {
        // files from before May 2024 have no such key
        let is = stored.map_or("is missing", |_| "is `default`");
        notes.push(format!("`{key}` {is}: text is cut as GPT-2 does"));
    }
    let merges = file.require(MERGES, vocabulary.stored_merges()?)?;
    Ok(Parts {
        model: bpe(vocabulary, merges, None, family.ignore_merges),
        ids: special_ids(vocabulary, SpecialIds::default())?,
        family,
        notes,
    })
}

fn sentencepiece_parts(vocabulary: &Vocabulary) -> Result<Parts, HubError> {
    let file = vocabulary.file;
    refuse_normalization(file)?;
    if let Some(byte) = sentencepiece::missing_byte(&vocabulary.ids) {
        return Err(file.metadata_error(TOKENS, format!("lacks the byte token `{byte}`")));
    }
    // what llama.cpp takes when the keys are absent
    let defaults = SpecialIds {
        bos: Some(1),
        eos: Some(2),
        unk: Some(0),
        ..SpecialIds::default()
    };
    let ids = special_ids(vocabulary, defaults)?;
    let merges = match vocabulary.stored_merges()? {
        Some(merges) => merges,
        None => vocabulary.merges_from_scores()?,
    };
    let unknown = ids.unk.map(|id| vocabulary.tokens[id as usize]);
    let prefix = file.optional_bool("tokenizer.ggml.add_space_prefix")?;
    let prefix = prefix.unwrap_or(true);
    Ok(Parts {
        model: bpe(vocabulary, merges, unknown, false),
        ids,
        family: Family {
            normalizer: sentencepiece::normalizer(prefix),
            pre_tokenizer: Json::Null,
            post_processor: Json::Null,
            decoder: sentencepiece::decoder(prefix),
            ignore_merges: false,
            adds_bos: true,
        },
        notes: Vec::new(),
    })
}

/// Llama's SentencePiece models leave the text as it is; others do not.
fn refuse_normalization(file: &GgufFile) -> Result<(), HubError> {
    let spaces = "tokenizer.ggml.remove_extra_whitespaces";
    if file.optional_bool(spaces)? == Some(true) {
        return Err(file.metadata_error(spaces, "is true, which is not supported"));
    }
    let charsmap = "tokenizer.ggml.precompiled_charsmap";
    match file.optional_array(charsmap)? {
        Some(map) if !map.is_empty() => Err(file.metadata_error(charsmap, "is not supported")),
        _ => Ok(()),
    }
}

fn special_ids(vocabulary: &Vocabulary, defaults: SpecialIds) -> Result<SpecialIds, HubError> {
    let file = vocabulary.file;
    let id = |name: &str, default: Option<u64>| -> Result<Option<u64>, HubError> {
        let key = format!("tokenizer.ggml.{name}_token_id");
        let id = file.optional_u64(&key)?.or(default);
        let count = vocabulary.tokens.len();
        match id {
            Some(id) if id >= count as u64 => {
                Err(file.metadata_error(&key, format!("{id} is not below the {count} tokens")))
            }
            id => Ok(id),
        }
    };
    Ok(SpecialIds {
        bos: id("bos", defaults.bos)?,
        eos: id("eos", defaults.eos)?,
        eot: id("eot", defaults.eot)?,
        pad: id("padding", defaults.pad)?,
        unk: id("unknown", defaults.unk)?,
    })
}

fn bpe(
    vocabulary: &Vocabulary,
    merges: Vec<(String, String)>,
    unknown: Option<&str>,
    ignore_merges: bool,
) -> Json {
    json!({
        "type": "BPE",
        "dropout": null,
        "unk_token": unknown,
        "continuing_subword_prefix": null,
        "end_of_word_suffix": null,
        "fuse_unk": unknown.is_some(),
        "byte_fallback": unknown.is_some(),
        "ignore_merges": ignore_merges,
        "vocab": vocabulary.as_json(),
        "merges": merges,
    })
}

/// Ids that are put around every text.
#[derive(Clone, Copy)]
struct Frame {
    bos: Option<u64>,
    eos: Option<u64>,
}

fn frame(vocabulary: &Vocabulary, parts: &Parts) -> Result<Frame, HubError> {
    let file = vocabulary.file;
    let wanted = |key: &str, default: bool, id: Option<u64>, name: &str| {
        if !file.optional_bool(key)?.unwrap_or(default) {
            return Ok(None);
        }
        file.require(&format!("tokenizer.ggml.{name}_token_id"), id)
            .map(Some)
    };
    let (bos, eos) = (parts.ids.bos, parts.ids.eos);
    let adds_bos = parts.family.adds_bos;
    Ok(Frame {
        bos: wanted("tokenizer.ggml.add_bos_token", adds_bos, bos, "bos")?,
        eos: wanted("tokenizer.ggml.add_eos_token", false, eos, "eos")?,
    })
}

fn post_processor(vocabulary: &Vocabulary, first: Json, frame: Frame) -> Json {
    if frame.bos.is_none() && frame.eos.is_none() {
        return first;
    }
    let token = |id: u64| vocabulary.tokens[id as usize];
    let around = |name: &str, sequence: u8| {
        let special = |id: u64| json!({"SpecialToken": {"id": token(id), "type_id": sequence}});
        let text = json!({"Sequence": {"id": name, "type_id": sequence}});
        let parts = [frame.bos.map(special), Some(text), frame.eos.map(special)];
        parts.into_iter().flatten().collect::<Vec<_>>()
    };
    let special_tokens: Map<String, Json> = [frame.bos, frame.eos]
        .into_iter()
        .flatten()
        .map(|id| {
            let name = token(id);
            let entry = json!({"id": name, "ids": [id], "tokens": [name]});
            (name.to_string(), entry)
        })
        .collect();
    let pair = [around("A", 0), around("B", 1)].concat();
    let template = json!({
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": pair,
        "special_tokens": special_tokens,
    });
    match first.is_null() {
        true => template,
        false => json!({"type": "Sequence", "processors": [first, template]}),
    }
}

fn tokenizer_config(
    vocabulary: &Vocabulary,
    ids: SpecialIds,
    frame: Frame,
    context: usize,
    notes: &mut Vec<String>,
) -> Result<Json, HubError> {
    let file = vocabulary.file;
    let mut config = json!({
        // reads `tokenizer.json` as it is, where the class of a family would rebuild parts of it
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": false,
        "add_bos_token": frame.bos.is_some(),
        "add_eos_token": frame.eos.is_some(),
    });
    let named = [
        ("bos_token", ids.bos),
        ("eos_token", ids.eos),
        ("unk_token", ids.unk),
        ("pad_token", ids.pad),
    ];
    for (name, id) in named {
        if let Some(id) = id {
            config[name] = json!(vocabulary.tokens[id as usize]);
        }
    }
    if let Some(template) = file.optional_str(TEMPLATE)? {
        config["chat_template"] = json!(template);
    }
    let others = file
        .metadata()
        .keys()
        .filter(|key| key.starts_with(TEMPLATE) && *key != TEMPLATE);
    notes.extend(others.map(|key| format!("`{key}` is left out")));
    Ok(config)
}

#[cfg(test)]
mod tests;
