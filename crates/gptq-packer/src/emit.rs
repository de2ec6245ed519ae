//! The two configs that go with a checkpoint, so that every reader finds its own.

use std::fmt;

use gptq_types::{CheckpointFormat, ColumnOrder, Method, QuantSpec};
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};

use crate::config::ConfigError;

const MODEL_CONFIG: &str = "config.json";
const SETTINGS_KEY: &str = "quantization_config";

/// The settings that both files carry.
///
/// `desc_act` is true only where `g_idx` is a real permutation, [`QuantSpec::permutes_g_idx`]. The
/// other orders, and one group a row, leave a trivial `g_idx`, and readers pay for the word alone: vLLM replicates scales
/// over tensor-parallel ranks and reorders activations, AutoGPTQ's Marlin and BitBLAS refuse it.
/// (AutoGPTQ itself writes true with static groups, though its `g_idx` is trivial too.)
/// [`ColumnOrder::ActOrderStaticGroups`] is told by `static_groups`, [`ColumnOrder::GroupAware`] by
/// `meta.act_group_aware`, and how scales were chosen by `meta.scale_search`
/// and, where there is something to tell, `meta.full_range`, `meta.input_mismatch` and
/// `meta.descent_passes`; [`ColumnOrder::Folded`] and [`ColumnOrder::Auto`] by `meta.order`.
fn settings(spec: &QuantSpec, tool: &str, extra_meta: &Map<String, Value>) -> Map<String, Value> {
    let solver = match spec.method {
        Method::Gptq => "gptq",
        Method::Rtn => "rtn",
    };
    let static_groups = spec.order == ColumnOrder::ActOrderStaticGroups;
    let meta = json!({
        "quantizer": quantizers(spec, tool),
        "solver": solver,
        "damp_percent": spec.damp_percent,
        "static_groups": static_groups,
        "true_sequential": true,
        "act_group_aware": spec.order == ColumnOrder::GroupAware,
        "scale_search": spec.scale_search,
    });
    let settings = json!({
        "bits": spec.bits,
        "group_size": spec.group_size,
        "desc_act": spec.permutes_g_idx(),
        "sym": spec.sym,
        "static_groups": static_groups,
        "true_sequential": true,
        "damp_percent": spec.damp_percent,
        "lm_head": false,
        "quant_method": "gptq",
        "checkpoint_format": spec.format,
        "pack_dtype": "int32",
        "meta": meta,
    });
    let mut settings = into_object(settings);
    if let Some(Value::Object(meta)) = settings.get_mut("meta") {
        if spec.full_range {
            meta.insert("full_range".into(), Value::from(true));
        }
        if spec.input_mismatch != 0.0 {
            let share = Value::from(spec.input_mismatch);
            meta.insert("input_mismatch".into(), share);
        }
        if spec.order.may_fold() {
            meta.insert("order".into(), Value::from(spec.order.name()));
        }
        if spec.descent_passes != 0 {
            let passes = Value::from(spec.descent_passes);
            meta.insert("descent_passes".into(), passes);
        }
        meta.extend(extra_meta.clone());
    }
    settings
}

/// The tool, and for asymmetric v1 files a mark of compatibility.
///
/// GPTQModel refuses asymmetric v1 files unless `meta.quantizer` names its own version 0.9.0 or
/// later, since older writers let a zero of 0 borrow from its neighbour. Our zeros are at least 1
/// there, which is what the mark stands for; without it the file would load nowhere but in
/// AutoGPTQ.
fn quantizers(spec: &QuantSpec, tool: &str) -> Vec<String> {
    let mut quantizers = vec![tool.to_string()];
    if !spec.sym && spec.format == CheckpointFormat::Gptq {
        quantizers.push("gptqmodel:0.9.0".to_string());
    }
    quantizers
}

fn into_object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(object) => object,
        _ => Map::new(),
    }
}

/// The text of `quantize_config.json`: the settings, and the two keys by which AutoGPTQ 0.2 to 0.4
/// finds `model.safetensors`.
///
/// `tool` is name and version, `gptq-rs:0.1.0`; `extra_meta` is added to `meta` and prevails there.
/// `desc_act` is true only for [`QuantSpec::permutes_g_idx`]: else `g_idx` is trivial, and readers that see `desc_act` would be slower or refuse for nothing.
pub fn quantize_config_json(
    spec: &QuantSpec,
    tool: &str,
    model_name: &str,
    extra_meta: &Map<String, Value>,
) -> String {
    let mut settings = settings(spec, tool, extra_meta);
    settings.insert("model_name_or_path".into(), Value::from(model_name));
    settings.insert("model_file_base_name".into(), Value::from("model"));
    format!("{:#}\n", Value::Object(settings))
}

/// A model's `config.json` with `quantization_config` put in (or replaced) and its element type set
/// to `float16`; every other member is copied character by character.
///
/// It says in what type a reader computes, not what is stored: plain tensors keep the type of the
/// source. Scales are f16, so bf16 would round them, and vLLM's older GPTQ kernel refuses all but
/// `float16`.
///
/// The element type stands under `torch_dtype` or, since transformers 5, `dtype`; both are set if
/// both are there, and `torch_dtype` is added if neither is.
///
/// # Errors
/// Text that is not a JSON object, or that lists a key twice.
pub fn config_json_with_quantization(
    config_json: &str,
    spec: &QuantSpec,
    tool: &str,
    extra_meta: &Map<String, Value>,
) -> Result<String, ConfigError> {
    let Members(mut members) =
        serde_json::from_str(config_json).map_err(|source| ConfigError::Json {
            file: MODEL_CONFIG,
            source,
        })?;
    refuse_repeated(&members)?;
    let float16 = "\"float16\"".to_string();
    let mut typed = false;
    for (key, value) in &mut members {
        if key == "torch_dtype" || key == "dtype" {
            value.clone_from(&float16);
            typed = true;
        }
    }
    if !typed {
        members.push(("torch_dtype".to_string(), float16));
    }
    let settings = Value::Object(settings(spec, tool, extra_meta));
    put(&mut members, SETTINGS_KEY, indented(&settings));
    Ok(render(&members))
}

fn put(members: &mut Vec<(String, String)>, key: &str, value: String) {
    match members.iter_mut().find(|(name, _)| name == key) {
        Some(member) => member.1 = value,
        None => members.push((key.to_string(), value)),
    }
}

/// Pretty-printed for a place one level down.
fn indented(value: &Value) -> String {
    format!("{value:#}").replace('\n', "\n  ")
}

fn render(members: &[(String, String)]) -> String {
    let lines: Vec<String> = members
        .iter()
        .map(|(key, value)| format!("  {}: {value}", Value::from(key.as_str())))
        .collect();
    format!("{{\n{}\n}}\n", lines.join(",\n"))
}

fn refuse_repeated(members: &[(String, String)]) -> Result<(), ConfigError> {
    let mut seen = std::collections::HashSet::new();
    match members.iter().find(|(key, _)| !seen.insert(key)) {
        None => Ok(()),
        Some((key, _)) => Err(ConfigError::Repeated {
            file: MODEL_CONFIG,
            key: key.clone(),
        }),
    }
}

/// The members of an object in order, values as they are written: numbers such as `1e-05` would
/// change their look on the way through a parsed value.
struct Members(Vec<(String, String)>);

impl<'de> Deserialize<'de> for Members {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(MembersVisitor)
    }
}

struct MembersVisitor;

impl<'de> Visitor<'de> for MembersVisitor {
    type Value = Members;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Members, A::Error> {
        let mut members = Vec::new();
        while let Some((key, value)) = map.next_entry::<String, Box<RawValue>>()? {
            members.push((key, value.get().to_string()));
        }
        Ok(Members(members))
    }
}

#[cfg(test)]
mod tests {
    use gptq_types::{Bits, GroupSize};

    use super::*;
    use crate::QuantizeConfig;

    fn no_meta() -> Map<String, Value> {
        Map::new()
    }

    /// GPTQModel 7.7.0 answered "only supported if produced by gptqmodel version >= 0.9.0".
    #[test]
    fn asymmetric_v1_files_bear_the_mark_that_readers_ask_for() {
        let mut spec = QuantSpec {
            sym: false,
            ..QuantSpec::published()
        };
        let marked = |spec: &QuantSpec| {
            quantize_config_json(spec, "t:1", "m", &no_meta()).contains("gptqmodel:0.9.0")
        };
        assert!(marked(&spec));
        spec.format = CheckpointFormat::GptqV2;
        assert!(!marked(&spec));
    }

    #[test]
    fn the_published_settings_are_this_text() {
        let extra = into_object(json!({"uri": "u"}));
        let text = quantize_config_json(&QuantSpec::published(), "gptq-rs:0.1.0", "a/b", &extra);
        let expected = r#"{
  "bits": 4,
  "group_size": 128,
  "desc_act": false,
  "sym": true,
  "static_groups": false,
  "true_sequential": true,
  "damp_percent": 0.1,
  "lm_head": false,
  "quant_method": "gptq",
  "checkpoint_format": "gptq",
  "pack_dtype": "int32",
  "meta": {
    "quantizer": [
      "gptq-rs:0.1.0"
    ],
    "solver": "gptq",
    "damp_percent": 0.1,
    "static_groups": false,
    "true_sequential": true,
    "act_group_aware": false,
    "scale_search": true,
    "uri": "u"
  },
  "model_name_or_path": "a/b",
  "model_file_base_name": "model"
}
"#;
        assert_eq!(text, expected);
    }

    #[test]
    fn every_setting_is_read_back() {
        for (bits, scale_search) in Bits::ALL.into_iter().zip([true, false].repeat(2)) {
            for group_size in [GroupSize::None, GroupSize::Channels(32)] {
                for format in [CheckpointFormat::Gptq, CheckpointFormat::GptqV2] {
                    for order in [
                        ColumnOrder::Natural,
                        ColumnOrder::ActOrder,
                        ColumnOrder::ActOrderStaticGroups,
                        ColumnOrder::GroupAware,
                    ] {
                        let spec = QuantSpec {
                            bits,
                            group_size,
                            format,
                            order,
                            scale_search,
                            sym: false,
                            ..QuantSpec::published()
                        };
                        read_back(&spec);
                    }
                }
            }
        }
    }

    fn read_back(spec: &QuantSpec) {
        let own = quantize_config_json(spec, "t:1", "m", &no_meta());
        let model = config_json_with_quantization("{}", spec, "t:1", &no_meta()).unwrap();
        let config = QuantizeConfig::from_files(Some(&own), Some(&model))
            .unwrap()
            .unwrap();
        assert_eq!(config.bits, spec.bits);
        assert_eq!(config.group_size, spec.group_size);
        assert_eq!(config.format, spec.format);
        assert_eq!(config.sym, spec.sym);
        let permuted = spec.order == ColumnOrder::ActOrder && spec.group_size != GroupSize::None;
        assert_eq!(config.desc_act, permuted);
        assert_eq!(
            config.static_groups,
            Some(spec.order == ColumnOrder::ActOrderStaticGroups)
        );
        assert_eq!(config.scale_search, Some(spec.scale_search));
        assert!(config.notes.is_empty());
    }

    #[test]
    fn the_rest_of_a_model_config_is_left_as_it_was() {
        let original = "{\n  \"rms_norm_eps\": 1e-05,\n  \"big\": 123456789012345678901234567890,\n  \"eos\": [\n    1,\n    2\n  ],\n  \"torch_dtype\": \"bfloat16\",\n  \"z\\u00e9\": \"\\u00e9\"\n}\n";
        let spec = QuantSpec::published();
        let text = config_json_with_quantization(original, &spec, "t:1", &no_meta()).unwrap();
        let before = original
            .replace("bfloat16", "float16")
            .replace("\"z\\u00e9\"", "\"zé\"");
        let kept = before.trim_end().trim_end_matches('}').trim_end();
        assert!(text.starts_with(&format!(
            "{kept},\n  \"quantization_config\": {{\n    \"bits\": 4,"
        )));
        assert!(text.ends_with("    }\n  }\n}\n"));
        let again = config_json_with_quantization(&text, &spec, "t:1", &no_meta()).unwrap();
        assert_eq!(again, text);
    }

    #[test]
    fn the_element_type_is_set_wherever_it_stands() {
        let spec = QuantSpec::published();
        let emit = |text| -> Value {
            let text = config_json_with_quantization(text, &spec, "t:1", &no_meta()).unwrap();
            serde_json::from_str(&text).unwrap()
        };
        assert_eq!(emit(r#"{"dtype":"bfloat16"}"#)["dtype"], "float16");
        assert_eq!(emit(r#"{"dtype":"bfloat16"}"#).get("torch_dtype"), None);
        assert_eq!(emit("{}")["torch_dtype"], "float16");
    }

    #[test]
    fn text_that_is_no_config_is_refused() {
        let spec = QuantSpec::published();
        let emit = |text| config_json_with_quantization(text, &spec, "t:1", &no_meta());
        assert!(matches!(emit("[]"), Err(ConfigError::Json { .. })));
        assert!(matches!(
            emit(r#"{"a":1,"a":2}"#),
            Err(ConfigError::Repeated { key, .. }) if key == "a"
        ));
    }
}
