//! The keys of one settings file, each with its aliases, its type and what is refused of it.

use std::fmt::Display;

use gptq_types::CheckpointFormat;
use serde_json::{Map, Value};

use crate::config::ConfigError;

/// Typed access to the keys of one file; `null` counts as absent.
pub(crate) struct Keys<'a> {
    pub file: &'static str,
    pub raw: &'a Map<String, Value>,
}

impl Keys<'_> {
    fn get(&self, key: &str) -> Option<&Value> {
        self.raw.get(key).filter(|value| !value.is_null())
    }

    /// The key itself, or the same one in GPTQModel's `meta`.
    fn get_or_meta(&self, key: &str) -> Option<&Value> {
        let in_meta = || self.get("meta")?.get(key).filter(|value| !value.is_null());
        self.get(key).or_else(in_meta)
    }

    fn wrong_type(&self, key: &'static str, value: &Value, expected: &'static str) -> ConfigError {
        ConfigError::Type {
            file: self.file,
            key,
            value: value.to_string(),
            expected,
        }
    }

    pub fn integer(&self, key: &'static str) -> Result<Option<i64>, ConfigError> {
        self.get(key)
            .map(|value| {
                value
                    .as_i64()
                    .ok_or_else(|| self.wrong_type(key, value, "an integer"))
            })
            .transpose()
    }

    pub fn number(&self, key: &'static str) -> Result<Option<f64>, ConfigError> {
        self.get_or_meta(key)
            .map(|value| {
                value
                    .as_f64()
                    .ok_or_else(|| self.wrong_type(key, value, "a number"))
            })
            .transpose()
    }

    pub fn flag(&self, key: &'static str) -> Result<Option<bool>, ConfigError> {
        self.get_or_meta(key)
            .map(|value| {
                value
                    .as_bool()
                    .ok_or_else(|| self.wrong_type(key, value, "true or false"))
            })
            .transpose()
    }

    fn word(&self, key: &'static str) -> Result<Option<String>, ConfigError> {
        self.get(key)
            .map(|value| match value.as_str() {
                Some(text) => Ok(text.to_ascii_lowercase()),
                None => Err(self.wrong_type(key, value, "a string")),
            })
            .transpose()
    }

    fn aliased(
        &self,
        first_key: &'static str,
        second_key: &'static str,
    ) -> Result<Option<String>, ConfigError> {
        match (self.word(first_key)?, self.word(second_key)?) {
            (Some(first), Some(second)) if first != second => Err(ConfigError::Alias {
                file: self.file,
                first_key,
                first,
                second_key,
                second,
            }),
            (first, second) => Ok(first.or(second)),
        }
    }

    fn unsupported(&self, key: &'static str, value: impl Display) -> ConfigError {
        ConfigError::Unsupported {
            file: self.file,
            key,
            value: format!("`{value}`"),
        }
    }

    pub fn refuse_other_methods(&self) -> Result<(), ConfigError> {
        match self.aliased("quant_method", "method")? {
            None => {}
            Some(method) if method == "gptq" => {}
            Some(method) => return Err(self.unsupported("quant_method", method)),
        }
        // AutoAWQ's own file has these names and no method.
        for key in ["w_bit", "q_group_size"] {
            if let Some(value) = self.get(key) {
                return Err(self.unsupported(key, value));
            }
        }
        for key in ["is_marlin_format", "awq_gemm_checkpoint"] {
            if self.flag(key)? == Some(true) {
                return Err(self.unsupported(key, true));
            }
        }
        match self.word("pack_dtype")? {
            Some(dtype) if dtype != "int32" => Err(self.unsupported("pack_dtype", dtype)),
            _ => Ok(()),
        }
    }

    pub fn format(&self) -> Result<Option<CheckpointFormat>, ConfigError> {
        match self.aliased("checkpoint_format", "format")?.as_deref() {
            None => Ok(None),
            Some("gptq") => Ok(Some(CheckpointFormat::Gptq)),
            Some("gptq_v2") => Ok(Some(CheckpointFormat::GptqV2)),
            Some(other) => Err(self.unsupported("checkpoint_format", other)),
        }
    }

    pub fn dynamic(&self) -> Result<Option<Map<String, Value>>, ConfigError> {
        match self.get("dynamic") {
            None => Ok(None),
            Some(Value::Object(rules)) if rules.is_empty() => Ok(None),
            Some(Value::Object(rules)) => Ok(Some(rules.clone())),
            Some(other) => Err(self.wrong_type("dynamic", other, "an object")),
        }
    }
}
