//! `config.json` of a decoder, read strictly: what cannot be honoured is refused by name.

use gptq_types::outside_name::shown;
use serde_json::Value;

use crate::arch;

/// A configuration that this crate cannot run.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum ConfigError {
    #[error("config.json is not valid: {0}")]
    Json(#[from] serde_json::Error),
    #[error("config.json has no `{0}`")]
    Missing(&'static str),
    #[error("config.json has `{key}` = {value}, expected {expected}")]
    Value {
        key: &'static str,
        value: String,
        expected: &'static str,
    },
    #[error("config.json has `{key}` = {value}, expected {expected}")]
    Unsupported {
        key: &'static str,
        value: String,
        expected: &'static str,
    },
    #[error("config.json has `{key}` twice: {found}")]
    Conflict { key: &'static str, found: String },
    #[error(
        "config.json has `{key}` = {outer} outside of text_config, and {inner} inside: readers differ in \
         which they take"
    )]
    Outside {
        key: String,
        outer: String,
        inner: String,
    },
    #[error("architecture `{0}` is not one of {known}", known = arch::known())]
    UnknownArchitecture(String),
}

/// Characters of a value from the file that an error repeats.
const SHOWN_CHARACTERS: usize = 80;

impl ConfigError {
    /// The file is sound, but describes a model that is not computed here.
    pub fn is_unsupported(&self) -> bool {
        matches!(
            self,
            ConfigError::Unsupported { .. }
                | ConfigError::Outside { .. }
                | ConfigError::UnknownArchitecture(_)
        )
    }

    pub(crate) fn unsupported(
        key: &'static str,
        value: impl std::fmt::Display,
        expected: &'static str,
    ) -> Self {
        ConfigError::Unsupported {
            key,
            value: shown(&value.to_string(), SHOWN_CHARACTERS),
            expected,
        }
    }

    pub(crate) fn value(
        key: &'static str,
        value: impl std::fmt::Display,
        expected: &'static str,
    ) -> Self {
        ConfigError::Value {
            key,
            value: shown(&value.to_string(), SHOWN_CHARACTERS),
            expected,
        }
    }
}

/// Typed access to `config.json`; a present value of the wrong type is an error, never a default.
#[derive(Clone, Copy)]
pub(crate) struct Fields<'a>(pub &'a Value);

impl<'a> Fields<'a> {
    /// `null` counts as absent.
    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    fn wrong(key: &'static str, value: &Value, expected: &'static str) -> ConfigError {
        ConfigError::value(key, value, expected)
    }

    pub fn optional_size(&self, key: &'static str) -> Result<Option<usize>, ConfigError> {
        self.get(key)
            .map(|value| {
                value
                    .as_u64()
                    .and_then(|n| usize::try_from(n).ok())
                    .ok_or_else(|| Self::wrong(key, value, "a whole number"))
            })
            .transpose()
    }

    pub fn size(&self, key: &'static str) -> Result<usize, ConfigError> {
        self.optional_size(key)?.ok_or(ConfigError::Missing(key))
    }

    pub fn optional_number(&self, key: &'static str) -> Result<Option<f64>, ConfigError> {
        self.get(key)
            .map(|value| {
                value
                    .as_f64()
                    .filter(|number| number.is_finite())
                    .ok_or_else(|| Self::wrong(key, value, "a number"))
            })
            .transpose()
    }

    pub fn flag(&self, key: &'static str, default: bool) -> Result<bool, ConfigError> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => value
                .as_bool()
                .ok_or_else(|| Self::wrong(key, value, "true or false")),
        }
    }

    pub fn text(&self, key: &'static str) -> Result<Option<&'a str>, ConfigError> {
        self.get(key)
            .map(|value| {
                value
                    .as_str()
                    .ok_or_else(|| Self::wrong(key, value, "a string"))
            })
            .transpose()
    }

    /// A list of one entry a block.
    pub fn list(
        &self,
        key: &'static str,
        blocks: usize,
    ) -> Result<Option<&'a Vec<Value>>, ConfigError> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => (value.as_array())
                .filter(|list| list.len() == blocks)
                .map(Some)
                .ok_or_else(|| Self::wrong(key, value, "an entry for each block")),
        }
    }

    pub fn object(&self, key: &'static str) -> Result<Option<Fields<'a>>, ConfigError> {
        match self.get(key) {
            None => Ok(None),
            Some(value) if value.is_object() => Ok(Some(Fields(value))),
            Some(value) => Err(Self::wrong(key, value, "an object")),
        }
    }
}
