//! The tokens of a GGUF file and what each is for.

use std::collections::HashMap;

use serde_json::{Map, Value as Json, json};

use crate::HubError;
use crate::gguf::Value;
use crate::gguf::read::GgufFile;
use crate::gguf::sentencepiece;

pub(crate) const TOKENS: &str = "tokenizer.ggml.tokens";
pub(crate) const TYPES: &str = "tokenizer.ggml.token_type";
pub(crate) const SCORES: &str = "tokenizer.ggml.scores";
pub(crate) const MERGES: &str = "tokenizer.ggml.merges";

/// The type of a token, by its number in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum TokenKind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

/// Tokens by id, with what each is for.
pub(crate) struct Vocabulary<'a> {
    pub file: &'a GgufFile,
    pub tokens: Vec<&'a str>,
    kinds: Vec<TokenKind>,
    pub ids: HashMap<&'a str, usize>,
}

impl<'a> Vocabulary<'a> {
    pub(crate) fn read(file: &'a GgufFile, rows: usize) -> Result<Self, HubError> {
        let strings = |key: &str| -> Result<Vec<&'a str>, HubError> {
            let values = file.require(key, file.optional_array(key)?)?;
            texts(file, key, values)
        };
        let tokens = strings(TOKENS)?;
        if tokens.is_empty() || tokens.len() > rows {
            let reason = format!("has {} tokens, the embedding {rows} rows", tokens.len());
            return Err(file.metadata_error(TOKENS, reason));
        }
        let mut ids = HashMap::with_capacity(tokens.len());
        for (id, &token) in tokens.iter().enumerate() {
            if let Some(first) = ids.insert(token, id) {
                let reason = format!("has `{token}` as {first} and as {id}");
                return Err(file.metadata_error(TOKENS, reason));
            }
        }
        let kinds = file.require(TYPES, file.optional_array(TYPES)?)?;
        let kinds = token_kinds(file, kinds, tokens.len())?;
        Ok(Vocabulary {
            file,
            tokens,
            kinds,
            ids,
        })
    }

    /// Merges as the file lists them, each of two tokens whose sum is a token.
    pub(crate) fn stored_merges(&self) -> Result<Option<Vec<(String, String)>>, HubError> {
        let Some(values) = self.file.optional_array(MERGES)? else {
            return Ok(None);
        };
        let merge = |text: &str| {
            let (left, right) = text.split_once(' ')?;
            let known = [left, right, &format!("{left}{right}")]
                .iter()
                .all(|token| self.ids.contains_key(token));
            known.then(|| (left.to_string(), right.to_string()))
        };
        texts(self.file, MERGES, values)?
            .into_iter()
            .map(|text| {
                merge(text).ok_or_else(|| {
                    let reason = format!("has `{text}`, which does not join two tokens to a third");
                    self.file.metadata_error(MERGES, reason)
                })
            })
            .collect::<Result<Vec<_>, _>>()
            .map(Some)
    }

    pub(crate) fn merges_from_scores(&self) -> Result<Vec<(String, String)>, HubError> {
        let values = self
            .file
            .require(SCORES, self.file.optional_array(SCORES)?)?;
        let scores: Vec<f64> = values.iter().filter_map(Value::as_f64).collect();
        if scores.len() != self.tokens.len() || values.len() != scores.len() {
            let reason = format!(
                "has {} numbers in {} values for {} tokens",
                scores.len(),
                values.len(),
                self.tokens.len()
            );
            return Err(self.file.metadata_error(SCORES, reason));
        }
        let normal = |id: usize| self.kinds[id] == TokenKind::Normal;
        let merges = sentencepiece::merges_from_scores(&self.tokens, &scores, normal);
        merges.ok_or_else(|| {
            let reason = "implies more merges than any vocabulary has";
            self.file.metadata_error(TOKENS, reason)
        })
    }

    /// Token to id, in the order of the ids. Rows that only pad the embedding have no token.
    pub(crate) fn as_json(&self) -> Map<String, Json> {
        (0..self.tokens.len())
            .filter(|&id| !self.is_padding(id))
            .map(|id| (self.tokens[id].to_string(), json!(id)))
            .collect()
    }

    /// Converters fill unused rows with tokens of this name.
    fn is_padding(&self, id: usize) -> bool {
        self.kinds[id] == TokenKind::Unused && self.tokens[id] == format!("[PAD{id}]")
    }

    /// Tokens that are found in the text before anything else.
    pub(crate) fn added_tokens(&self) -> Vec<Json> {
        let added = |id: usize, special: bool| {
            json!({
                "id": id,
                "content": self.tokens[id],
                "single_word": false,
                "lstrip": false,
                "rstrip": false,
                "normalized": false,
                "special": special,
            })
        };
        (0..self.tokens.len())
            .filter_map(|id| match self.kinds[id] {
                TokenKind::Control | TokenKind::Unknown => Some(added(id, true)),
                TokenKind::UserDefined => Some(added(id, false)),
                TokenKind::Normal | TokenKind::Unused | TokenKind::Byte => None,
            })
            .collect()
    }
}

fn texts<'a>(file: &GgufFile, key: &str, values: &'a [Value]) -> Result<Vec<&'a str>, HubError> {
    values
        .iter()
        .map(|value| {
            value
                .as_str()
                .ok_or_else(|| file.metadata_error(key, "holds other than text"))
        })
        .collect()
}

fn token_kinds(
    file: &GgufFile,
    values: &[Value],
    tokens: usize,
) -> Result<Vec<TokenKind>, HubError> {
    if values.len() != tokens {
        let reason = format!("has {} values for {tokens} tokens", values.len());
        return Err(file.metadata_error(TYPES, reason));
    }
    let kind = |value: &Value| {
        Some(match value.as_u64()? {
            1 => TokenKind::Normal,
            2 => TokenKind::Unknown,
            3 => TokenKind::Control,
            4 => TokenKind::UserDefined,
            5 => TokenKind::Unused,
            6 => TokenKind::Byte,
            _ => return None,
        })
    };
    values
        .iter()
        .enumerate()
        .map(|(id, value)| {
            kind(value).ok_or_else(|| {
                file.metadata_error(TYPES, format!("has {value:?} for token {id}, not 1 to 6"))
            })
        })
        .collect()
}
