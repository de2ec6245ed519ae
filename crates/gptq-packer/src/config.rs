//! Quantization settings as AutoGPTQ, transformers, GPTQModel and auto-round write them.
//!
//! Reading is lenient about keys on how a checkpoint was made and strict about those that determine how
//! its bytes are read. Settings are in `quantize_config.json`, in the `quantization_config` of
//! `config.json`, or in both. Readers differ in which they open first, so a checkpoint whose two files
//! disagree gives them different weights and is refused.

use std::fmt::Display;

use gptq_types::outside_name::shown;
use gptq_types::{Bits, CheckpointFormat, GroupSize, SpecError};
use serde_json::{Map, Value};

use crate::config_keys::Keys;

const QUANTIZE_CONFIG: &str = "quantize_config.json";
const MODEL_CONFIG: &str = "config.json";
pub(crate) const SETTINGS_KEY: &str = "quantization_config";
pub(crate) const TEXT_CONFIG: &str = "text_config";
const TEXT_SETTINGS: &str = "text_config.quantization_config";
/// Characters of a value shown in an error.
const SHOWN_CHARACTERS: usize = 80;

/// Settings that cannot be read or used.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum ConfigError {
    #[error("`{file}` is not a JSON object: {source}")]
    Json {
        file: &'static str,
        source: serde_json::Error,
    },
    #[error("`{file}`: `{key}` is missing")]
    Missing {
        file: &'static str,
        key: &'static str,
    },
    #[error("`{file}`: `{key}` is {value}, expected {expected}")]
    Type {
        file: &'static str,
        key: &'static str,
        value: String,
        expected: &'static str,
    },
    #[error("`{file}`: {source}")]
    Value {
        file: &'static str,
        source: SpecError,
    },
    #[error("`{file}`: `{key}` {value} is not supported")]
    Unsupported {
        file: &'static str,
        key: &'static str,
        value: String,
    },
    #[error("`{file}`: `{first_key}` is {first}, but `{second_key}` is {second}")]
    Alias {
        file: &'static str,
        first_key: &'static str,
        first: String,
        second_key: &'static str,
        second: String,
    },
    #[error("`{key}` is {first} in `{QUANTIZE_CONFIG}`, but {second} in `{MODEL_CONFIG}`")]
    Conflict {
        key: &'static str,
        first: String,
        second: String,
    },
    #[error(
        "`{file}`: `dynamic` rule `{rule}` sets `{key}` to {value}, which differs from the rest"
    )]
    DynamicRule {
        file: &'static str,
        rule: String,
        key: String,
        value: String,
    },
    #[error("`{file}` lists `{key}` twice")]
    Repeated { file: &'static str, key: String },
}

impl ConfigError {
    /// The file is sound, but describes another way to store weights than those read here.
    pub fn is_unsupported(&self) -> bool {
        matches!(
            self,
            ConfigError::Unsupported { .. } | ConfigError::DynamicRule { .. }
        )
    }
}

/// Settings that a reader needs, and settings known about how the checkpoint was made.
#[derive(Clone, Debug, PartialEq)]
pub struct QuantizeConfig {
    /// Width of a code.
    pub bits: Bits,
    /// Channels that share a scale.
    pub group_size: GroupSize,
    /// Symmetric grid.
    pub sym: bool,
    /// Whether `g_idx` may be a permutation.
    pub desc_act: bool,
    /// Zero-point convention as declared; the data may say otherwise
    /// ([`crate::zero_convention`]).
    pub format: CheckpointFormat,
    /// Whether the output head is quantized too.
    pub lm_head: bool,
    /// Group grids were fixed before the columns were ordered, if known.
    pub static_groups: Option<bool>,
    /// Scales were searched for the least error, if known.
    pub scale_search: Option<bool>,
    /// Stages of a block were quantized one after the other, if known.
    pub true_sequential: Option<bool>,
    /// Share of the mean Hessian diagonal that was added, if known.
    pub damp_percent: Option<f64>,
    /// Per-module rules of GPTQModel, verbatim; those here skip modules or repeat the settings.
    pub dynamic: Option<Map<String, Value>>,
    /// All settings as read, `config.json` first; keys of `quantize_config.json` prevail.
    pub raw: Map<String, Value>,
    /// Assumptions made where the files are silent.
    pub notes: Vec<String>,
}

impl QuantizeConfig {
    /// Reads the text of a `quantize_config.json` (or `quant_config.json`).
    pub fn from_quantize_config(text: &str) -> Result<Self, ConfigError> {
        Draft::read(QUANTIZE_CONFIG, object(QUANTIZE_CONFIG, text)?)?.finish()
    }

    /// Reads the `quantization_config` in the text of a `config.json`, or in its `text_config`; none if
    /// there is none.
    pub fn from_model_config(text: &str) -> Result<Option<Self>, ConfigError> {
        Draft::of_model(text)?.map(Draft::finish).transpose()
    }

    /// Reads both files, as far as they are there; none if neither has settings.
    ///
    /// # Errors
    /// Formats other than v1 and v2 (AWQ, Marlin, planar, ...), `dynamic` rules that change width
    /// or groups, and a [`ConfigError::Conflict`] when the files disagree in a key that decides how
    /// bytes are read. A key that only one of them has is taken from there.
    pub fn from_files(
        quantize_config: Option<&str>,
        model_config: Option<&str>,
    ) -> Result<Option<Self>, ConfigError> {
        let own = quantize_config
            .map(|text| Draft::read(QUANTIZE_CONFIG, object(QUANTIZE_CONFIG, text)?))
            .transpose()?;
        let embedded = match model_config {
            Some(text) => Draft::of_model(text)?,
            None => None,
        };
        let draft = match (own, embedded) {
            (Some(own), Some(embedded)) => Some(own.merge(embedded)?),
            (own, embedded) => own.or(embedded),
        };
        draft.map(Draft::finish).transpose()
    }
}

fn object(file: &'static str, text: &str) -> Result<Map<String, Value>, ConfigError> {
    serde_json::from_str(text).map_err(|source| ConfigError::Json { file, source })
}

/// The settings that an object of `config.json` declares; `place` is how an error calls them.
fn declared_in<'a>(
    object: &'a Map<String, Value>,
    place: &'static str,
) -> Result<Option<&'a Map<String, Value>>, ConfigError> {
    match object.get(SETTINGS_KEY) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Object(settings)) => Ok(Some(settings)),
        Some(other) => Err(ConfigError::Type {
            file: MODEL_CONFIG,
            key: place,
            value: shown(&other.to_string(), SHOWN_CHARACTERS),
            expected: "an object",
        }),
    }
}

/// Quantization settings declared in a `config.json` for the whole model or a part of it (`text_config`,
/// `vision_config`), the outermost first.
///
/// ```
/// let config = serde_json::json!({"text_config": {"quantization_config": {"bits": 4}}});
/// assert_eq!(gptq_packer::declared_settings(&config), [&serde_json::json!({"bits": 4})]);
/// ```
pub fn declared_settings(config: &Value) -> Vec<&Value> {
    let own = config.get(SETTINGS_KEY).filter(|value| !value.is_null());
    let members = config.as_object().into_iter().flatten();
    let parts = members.filter(|(key, _)| *key != SETTINGS_KEY);
    let of_parts = parts.flat_map(|(_, part)| declared_settings(part));
    own.into_iter().chain(of_parts).collect()
}

/// The settings of one file, each present or not.
struct Draft {
    file: &'static str,
    bits: Option<Bits>,
    group_size: Option<GroupSize>,
    sym: Option<bool>,
    desc_act: Option<bool>,
    format: Option<CheckpointFormat>,
    lm_head: Option<bool>,
    static_groups: Option<bool>,
    scale_search: Option<bool>,
    true_sequential: Option<bool>,
    damp_percent: Option<f64>,
    dynamic: Option<Map<String, Value>>,
    raw: Map<String, Value>,
}

impl Draft {
    /// Settings of the whole model, else those of the text model of a multimodal one.
    fn of_model(text: &str) -> Result<Option<Self>, ConfigError> {
        let model = object(MODEL_CONFIG, text)?;
        let [whole, text] = [
            declared_in(&model, SETTINGS_KEY)?,
            match model.get(TEXT_CONFIG) {
                Some(Value::Object(text)) => declared_in(text, TEXT_SETTINGS)?,
                _ => None,
            },
        ];
        if let (Some(whole), Some(text)) = (whole, text)
            && whole != text
        {
            let show = |settings: &Map<String, Value>| {
                shown(&Value::from(settings.clone()).to_string(), SHOWN_CHARACTERS)
            };
            return Err(ConfigError::Alias {
                file: MODEL_CONFIG,
                first_key: SETTINGS_KEY,
                first: show(whole),
                second_key: TEXT_SETTINGS,
                second: show(text),
            });
        }
        let settings = whole.or(text);
        (settings.map(|settings| Draft::read(MODEL_CONFIG, settings.clone()))).transpose()
    }

    fn read(file: &'static str, raw: Map<String, Value>) -> Result<Self, ConfigError> {
        let keys = Keys { file, raw: &raw };
        keys.refuse_other_methods()?;
        let format = keys.format()?;
        let invalid = |source| ConfigError::Value { file, source };
        let bits = keys
            .integer("bits")?
            .map(|width| u8::try_from(width).map_err(|_| SpecError::Bits(width.to_string())))
            .transpose()
            .map_err(invalid)?;
        Ok(Draft {
            file,
            bits: bits.map(Bits::try_from).transpose().map_err(invalid)?,
            group_size: keys
                .integer("group_size")?
                .map(GroupSize::try_from)
                .transpose()
                .map_err(invalid)?,
            sym: keys.flag("sym")?,
            desc_act: keys.flag("desc_act")?,
            format,
            lm_head: keys.flag("lm_head")?,
            static_groups: keys.flag("static_groups")?,
            scale_search: keys.flag("scale_search")?,
            true_sequential: keys.flag("true_sequential")?,
            damp_percent: keys.number("damp_percent")?,
            dynamic: keys.dynamic()?,
            raw,
        })
    }

    fn merge(self, embedded: Draft) -> Result<Self, ConfigError> {
        let format_name = |format: &CheckpointFormat| format.to_string();
        let rules = |rules: &Map<String, Value>| Value::Object(rules.clone()).to_string();
        let mut raw = embedded.raw;
        raw.extend(self.raw);
        Ok(Draft {
            file: self.file,
            bits: agreed("bits", self.bits, embedded.bits, Bits::to_string)?,
            group_size: agreed(
                "group_size",
                self.group_size,
                embedded.group_size,
                GroupSize::to_string,
            )?,
            sym: agreed("sym", self.sym, embedded.sym, bool::to_string)?,
            desc_act: agreed(
                "desc_act",
                self.desc_act,
                embedded.desc_act,
                bool::to_string,
            )?,
            format: agreed(
                "checkpoint_format",
                self.format,
                embedded.format,
                format_name,
            )?,
            lm_head: agreed("lm_head", self.lm_head, embedded.lm_head, bool::to_string)?,
            dynamic: agreed("dynamic", self.dynamic, embedded.dynamic, rules)?,
            static_groups: self.static_groups.or(embedded.static_groups),
            scale_search: self.scale_search.or(embedded.scale_search),
            true_sequential: self.true_sequential.or(embedded.true_sequential),
            damp_percent: self.damp_percent.or(embedded.damp_percent),
            raw,
        })
    }

    fn finish(self) -> Result<QuantizeConfig, ConfigError> {
        let file = self.file;
        let missing = |key| ConfigError::Missing { file, key };
        let bits = self.bits.ok_or_else(|| missing("bits"))?;
        let group_size = self.group_size.ok_or_else(|| missing("group_size"))?;
        let mut notes = Vec::new();
        let mut assume = |key: &str, value: &dyn Display| {
            notes.push(format!("`{key}` is missing and taken as {value}"));
        };
        if self.sym.is_none() {
            assume("sym", &true);
        }
        if self.desc_act.is_none() {
            assume("desc_act", &false);
        }
        let format = self.format.unwrap_or(CheckpointFormat::Gptq);
        if let Some(rules) = &self.dynamic {
            refuse_changing_rules(file, rules, bits, group_size, format)?;
        }
        Ok(QuantizeConfig {
            bits,
            group_size,
            sym: self.sym.unwrap_or(true),
            desc_act: self.desc_act.unwrap_or(false),
            format,
            lm_head: self.lm_head.unwrap_or(false),
            static_groups: self.static_groups,
            scale_search: self.scale_search,
            true_sequential: self.true_sequential,
            damp_percent: self.damp_percent,
            dynamic: self.dynamic,
            raw: self.raw,
            notes,
        })
    }
}

fn agreed<T: PartialEq>(
    key: &'static str,
    own: Option<T>,
    embedded: Option<T>,
    show: impl Fn(&T) -> String,
) -> Result<Option<T>, ConfigError> {
    match (&own, &embedded) {
        (Some(first), Some(second)) if first != second => Err(ConfigError::Conflict {
            key,
            first: show(first),
            second: show(second),
        }),
        _ => Ok(own.or(embedded)),
    }
}

/// Rules prefixed with `-:` skip modules, which shows in the tensors; others override settings.
fn refuse_changing_rules(
    file: &'static str,
    rules: &Map<String, Value>,
    bits: Bits,
    group_size: GroupSize,
    format: CheckpointFormat,
) -> Result<(), ConfigError> {
    let format = Value::from(format.to_string());
    let settings = [
        ("bits", Value::from(bits.width())),
        ("group_size", Value::from(i64::from(group_size))),
        ("pack_dtype", Value::from("int32")),
        ("format", format.clone()),
        ("checkpoint_format", format),
    ];
    for (rule, overrides) in rules {
        if rule.starts_with("-:") {
            continue;
        }
        for (key, base) in &settings {
            match overrides.get(key) {
                None | Some(Value::Null) => {}
                Some(value) if value == base => {}
                Some(value) => {
                    return Err(ConfigError::DynamicRule {
                        file,
                        rule: rule.clone(),
                        key: key.to_string(),
                        value: value.to_string(),
                    });
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: &str = r#"{"bits":4,"group_size":128,"desc_act":false,"sym":true}"#;

    fn with(extra: &str) -> String {
        PLAIN.replacen('}', &format!(",{extra}}}"), 1)
    }

    fn embedded(settings: &str) -> String {
        format!(r#"{{"model_type":"llama","quantization_config":{settings}}}"#)
    }

    fn refused(settings: &str) -> String {
        QuantizeConfig::from_quantize_config(settings)
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn the_least_config_is_v1() {
        let config = QuantizeConfig::from_quantize_config(PLAIN).unwrap();
        assert_eq!(config.format, CheckpointFormat::Gptq);
        assert_eq!(config.group_size, GroupSize::Channels(128));
        assert!(config.notes.is_empty());
        let config = QuantizeConfig::from_quantize_config(r#"{"bits":3,"group_size":-1}"#).unwrap();
        assert!(config.sym);
        assert_eq!(config.group_size, GroupSize::None);
        assert_eq!(
            config.notes,
            [
                "`sym` is missing and taken as true",
                "`desc_act` is missing and taken as false"
            ]
        );
    }

    #[test]
    fn aliases_are_one_key() {
        for alias in ["format", "checkpoint_format"] {
            let text = with(&format!(r#""{alias}":"gptq_v2","method":"GPTQ""#));
            let config = QuantizeConfig::from_quantize_config(&text).unwrap();
            assert_eq!(config.format, CheckpointFormat::GptqV2);
        }
        assert_eq!(
            refused(&with(r#""format":"gptq","checkpoint_format":"gptq_v2""#)),
            "`quantize_config.json`: `checkpoint_format` is gptq_v2, but `format` is gptq"
        );
    }

    #[test]
    fn meta_tells_what_the_top_does_not() {
        let text =
            with(r#""meta":{"damp_percent":0.05,"static_groups":true,"scale_search":false}"#);
        let config = QuantizeConfig::from_quantize_config(&text).unwrap();
        assert_eq!(config.damp_percent, Some(0.05));
        assert_eq!(config.static_groups, Some(true));
        assert_eq!(config.scale_search, Some(false));
        assert_eq!(config.true_sequential, None);
        let silent = QuantizeConfig::from_quantize_config(PLAIN).unwrap();
        assert_eq!(silent.scale_search, None);
    }

    #[test]
    fn other_formats_are_refused_by_name() {
        for (extra, named) in [
            (r#""is_marlin_format":true"#, "`is_marlin_format` `true`"),
            (r#""checkpoint_format":"marlin""#, "`marlin`"),
            (r#""checkpoint_format":"awq_gemm""#, "`awq_gemm`"),
            (r#""format":"gptq_p""#, "`gptq_p`"),
            (r#""quant_method":"awq""#, "`awq`"),
            (r#""quant_method":"auto-round""#, "`auto-round`"),
            (r#""w_bit":4"#, "`w_bit`"),
            (r#""pack_dtype":"int16""#, "`int16`"),
        ] {
            let error = refused(&with(extra));
            assert!(error.contains(named), "{error}");
            assert!(error.ends_with("is not supported"), "{error}");
        }
    }

    #[test]
    fn values_outside_the_field_are_refused() {
        assert!(refused(r#"{"bits":5,"group_size":128}"#).contains("bits `5`"));
        assert!(refused(r#"{"bits":-4,"group_size":128}"#).contains("bits `-4`"));
        assert!(refused(r#"{"bits":4,"group_size":0}"#).contains("group size `0`"));
        assert!(refused(r#"{"bits":"4","group_size":128}"#).contains("expected an integer"));
        assert!(refused(r#"{"bits":4,"group_size":128,"sym":1}"#).contains("`sym` is 1"));
        assert!(refused(r#"{"group_size":128}"#).contains("`bits` is missing"));
        assert!(refused(r#"{"bits":4}"#).contains("`group_size` is missing"));
        assert!(refused("[]").contains("not a JSON object"));
    }

    #[test]
    fn files_that_disagree_are_refused_and_gaps_are_filled() {
        let conflict = |other: &str| {
            QuantizeConfig::from_files(Some(PLAIN), Some(&embedded(other)))
                .unwrap_err()
                .to_string()
        };
        assert_eq!(
            conflict(r#"{"bits":4,"group_size":64}"#),
            "`group_size` is 128 in `quantize_config.json`, but 64 in `config.json`"
        );
        for other in [r#"{"bits":3}"#, r#"{"sym":false}"#, r#"{"desc_act":true}"#] {
            let key = other.split('"').nth(1).unwrap();
            assert!(conflict(other).starts_with(&format!("`{key}`")));
        }
        let other = embedded(r#"{"checkpoint_format":"gptq_v2","damp_percent":0.1}"#);
        let config = QuantizeConfig::from_files(Some(PLAIN), Some(&other))
            .unwrap()
            .unwrap();
        assert_eq!(config.format, CheckpointFormat::GptqV2);
        assert_eq!(config.damp_percent, Some(0.1));
        assert_eq!(config.raw["bits"], 4);
        assert_eq!(QuantizeConfig::from_files(None, Some("{}")).unwrap(), None);
        assert_eq!(QuantizeConfig::from_files(None, None).unwrap(), None);
    }

    /// The settings of a text model, which readers look for in its own block, were passed over.
    #[test]
    fn settings_may_stand_in_the_text_model() {
        let of = |text: &str| QuantizeConfig::from_model_config(text);
        let inner = r#""text_config":{"quantization_config":{"bits":4,"group_size":64}}"#;
        let config = of(&format!("{{{inner}}}")).unwrap().unwrap();
        assert_eq!(config.group_size, GroupSize::Channels(64));
        let same = r#""quantization_config":{"group_size":64,"bits":4}"#;
        assert_eq!(of(&format!("{{{same},{inner}}}")).unwrap(), Some(config));
        let other = r#""quantization_config":{"bits":8,"group_size":64}"#;
        let error = of(&format!("{{{other},{inner}}}")).unwrap_err().to_string();
        assert!(
            error.contains("`text_config.quantization_config`"),
            "{error}"
        );
        let error = of(r#"{"text_config":{"quantization_config":4}}"#).unwrap_err();
        assert!(error.to_string().contains("expected an object"), "{error}");
        let vision = r#"{"vision_config":{"quantization_config":{"bits":4}}}"#;
        assert_eq!(of(vision).unwrap(), None);
    }

    #[test]
    fn dynamic_rules_are_kept_unless_they_change_the_bytes() {
        let rules = r#""dynamic":{"-:.*gate.*":{},"+:.*":{"bits":4,"desc_act":true}}"#;
        let config = QuantizeConfig::from_quantize_config(&with(rules)).unwrap();
        assert_eq!(config.dynamic.unwrap().len(), 2);
        assert_eq!(
            refused(&with(r#""dynamic":{".*down.*":{"bits":8}}"#)),
            "`quantize_config.json`: `dynamic` rule `.*down.*` sets `bits` to 8, which differs from the rest"
        );
        assert!(refused(&with(r#""dynamic":{"+:x":{"group_size":32}}"#)).contains("group_size"));
        let empty = QuantizeConfig::from_quantize_config(&with(r#""dynamic":{}"#)).unwrap();
        assert_eq!(empty.dynamic, None);
    }
}
