//! One file a family: what its `config.json` says, as a [`ModelSpec`].
//!
//! A family reads the sizes that all share ([`Sizes::read`]), puts blocks together from the branches of
//! `parts.rs`, and changes what it has otherwise. Its line in [`FAMILIES`] registers it.

mod cohere;
mod exaone4;
mod gemma;
mod gemma2;
mod gemma3;
mod gemma4;
mod glm4;
mod granite;
mod hunyuan;
mod llama;
mod ministral3;
mod mistral;
mod olmo2;
mod olmo3;
mod outside;
mod parts;
mod paths;
mod phi3;
mod qwen2;
mod qwen3;
mod relative;
mod rotaries;
mod seed_oss;
mod sizes;
mod smollm3;
mod starcoder2;
mod windows;

use gptq_types::outside_name::shown;
use serde_json::Value;

use crate::config::{ConfigError, Fields};
use crate::config_keys::Honoured;
use crate::spec::ModelSpec;

pub(crate) use paths::Paths;
pub(crate) use sizes::Sizes;

/// Reads a family's `config.json`.
type Read = fn(&Reader<'_>) -> Result<ModelSpec, ConfigError>;

/// `model_type`s and their readers.
const FAMILIES: &[(&str, Read)] = &[
    ("cohere", cohere::read),
    ("cohere2", cohere::read_second),
    ("exaone4", exaone4::read),
    ("gemma", gemma::read),
    ("gemma2", gemma2::read),
    ("gemma3_text", gemma3::read),
    ("gemma4_text", gemma4::read),
    ("gemma4_unified_text", gemma4::read_unified),
    ("glm4", glm4::read),
    ("granite", granite::read),
    ("hunyuan_v1_dense", hunyuan::read),
    ("llama", llama::read),
    ("ministral3", ministral3::read),
    ("mistral", mistral::read),
    ("olmo2", olmo2::read),
    ("olmo3", olmo3::read),
    ("phi3", phi3::read),
    ("qwen2", qwen2::read),
    ("qwen3", qwen3::read),
    ("seed_oss", seed_oss::read),
    ("smollm3", smollm3::read),
    ("starcoder2", starcoder2::read),
];

/// The families, for error messages.
pub(crate) fn known() -> String {
    let names: Vec<&str> = FAMILIES.iter().map(|(name, _)| *name).collect();
    names.join(", ")
}

/// A config, and where the checkpoint's tensors lie.
pub(crate) struct Reader<'a> {
    /// Fields of the text model.
    pub fields: Fields<'a>,
    /// Fields of the whole file, if the text model is a part of it.
    pub outer: Option<Fields<'a>>,
    pub paths: Paths,
}

impl Reader<'_> {
    /// A flag of the text model, else of the whole file.
    pub fn flag(&self, key: &'static str, default: bool) -> Result<bool, ConfigError> {
        match (self.fields.get(key), self.outer) {
            (None, Some(outer)) => outer.flag(key, default),
            _ => self.fields.flag(key, default),
        }
    }

    /// Refuses a text other than these.
    pub fn text_is(&self, key: &'static str, words: &[&str]) -> Result<(), ConfigError> {
        match self.fields.text(key)?.filter(|text| !words.contains(text)) {
            Some(text) => {
                let expected = "what its family has, since it changes the model";
                Err(ConfigError::unsupported(key, text, expected))
            }
            None => Ok(()),
        }
    }

    /// Refuses keys that make another model than this family's, given those that it honours itself;
    /// returns those that nobody knows.
    pub fn check_keys(&self, honoured: &Honoured) -> Result<Vec<String>, ConfigError> {
        crate::config_keys::check(&self.fields, honoured)
    }
}

/// Reads the text of a `config.json`; `names` are those of the checkpoint's tensors.
pub(crate) fn read(text: &str, names: &[String]) -> Result<ModelSpec, ConfigError> {
    let json: Value = serde_json::from_str(text)?;
    let whole = Fields(&json);
    // The text model of a multimodal checkpoint describes itself in a block of its own.
    let inner = whole.object("text_config")?;
    let fields = inner.unwrap_or(whole);
    let model_type = fields
        .text("model_type")?
        .ok_or(ConfigError::Missing("model_type"))?;
    let family = FAMILIES.iter().find(|(name, _)| *name == model_type);
    let Some((_, read)) = family else {
        return Err(ConfigError::UnknownArchitecture(shown(model_type, 80)));
    };
    let reader = Reader {
        fields,
        outer: inner.map(|_| whole),
        paths: Paths::of(names, inner.is_some()),
    };
    let mut spec = read(&reader)?;
    spec.multimodal = inner.is_some();
    spec.check_sizes()?;
    outside::check(&reader, *read, &spec)?;
    Ok(spec)
}
