//! The two configs that go with a checkpoint, so that every reader finds its own.

use std::fmt;

use gptq_types::{CheckpointFormat, ColumnOrder, Method, QuantSpec};
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};

use crate::config::{ConfigError, SETTINGS_KEY, TEXT_CONFIG};

const MODEL_CONFIG: &str = "config.json";
/// Names of the element type: before and since transformers 5.
const TYPE_KEYS: [&str; 2] = ["torch_dtype", "dtype"];

/// The type that the config tells readers to compute in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeclaredType {
    /// `float16`, which keeps scales as they are stored.
    #[default]
    F16,
    /// `bfloat16`, for models whose activations overflow f16. Most readers round scales to it;
    /// docs/FORMAT.md lists them.
    Bf16,
}

impl DeclaredType {
    /// The name in config.json.
    pub fn name(self) -> &'static str {
        match self {
            DeclaredType::F16 => "float16",
            DeclaredType::Bf16 => "bfloat16",
        }
    }
}

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
/// Modules that stay float beside packed ones are told by `dynamic`, if there are any.
fn settings(
    spec: &QuantSpec,
    tool: &str,
    extra_meta: &Map<String, Value>,
    exclusions: &[String],
) -> Map<String, Value> {
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
    });
    let mut settings = into_object(settings);
    if !exclusions.is_empty() {
        let skipped = exclusions
            .iter()
            .map(|pattern| (pattern.clone(), json!({})));
        settings.insert("dynamic".into(), skipped.collect());
    }
    settings.insert("meta".into(), meta);
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
        if spec.trains() {
            let epochs = Value::from(spec.training_epochs);
            meta.insert("training_epochs".into(), epochs);
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
/// `tool` is name and version, `gptq-rs:0.1.0`; `extra_meta` is added to `meta` and prevails there;
/// `exclusions` are those of [`crate::exclusions`].
/// `desc_act` is true only for [`QuantSpec::permutes_g_idx`]: else `g_idx` is trivial, and readers that see `desc_act` would be slower or refuse for nothing.
pub fn quantize_config_json(
    spec: &QuantSpec,
    tool: &str,
    model_name: &str,
    extra_meta: &Map<String, Value>,
    exclusions: &[String],
) -> String {
    let mut settings = settings(spec, tool, extra_meta, exclusions);
    settings.insert("model_name_or_path".into(), Value::from(model_name));
    settings.insert("model_file_base_name".into(), Value::from("model"));
    format!("{:#}\n", Value::Object(settings))
}

/// A model's `config.json` with `quantization_config` put in (or replaced) and its element type set
/// to `declared`; every other member is copied character by character.
///
/// The type says in what a reader computes, not what is stored: plain tensors keep the type of the
/// source, scales are f16. `bfloat16` makes readers round scales, so it is for models that overflow
/// f16; vLLM's older GPTQ kernel refused all but `float16`.
///
/// The element type stands under `torch_dtype` or, since transformers 5, `dtype`; both are set if
/// both are there, and `torch_dtype` is added if neither is. In the `text_config` of a multimodal
/// model those that are there are set too. What a part of the model, `text_config` or another, declares
/// of a quantization is taken out, since readers look for it there. `exclusions` are those of [`crate::exclusions`]; they are
/// the same in both files, or readers disagree.
///
/// # Errors
/// Text that is not a JSON object, or that lists a key twice.
pub fn config_json_with_quantization(
    config_json: &str,
    spec: &QuantSpec,
    tool: &str,
    extra_meta: &Map<String, Value>,
    exclusions: &[String],
    declared: DeclaredType,
) -> Result<String, ConfigError> {
    let mut members = (members(config_json)?.into_iter())
        .map(|(key, value)| Ok((key, without_settings(value)?)))
        .collect::<Result<Vec<(String, String)>, ConfigError>>()?;
    let typed = members.iter_mut().filter(|(key, _)| is_type(key));
    let typed = typed.map(|(_, value)| *value = quoted(declared)).count();
    if typed == 0 {
        members.push((TYPE_KEYS[0].to_string(), quoted(declared)));
    }
    if let Some((_, value)) = members.iter_mut().find(|(key, _)| key == TEXT_CONFIG)
        && value.starts_with('{')
    {
        *value = with_type(value, declared)?;
    }
    let settings = Value::Object(settings(spec, tool, extra_meta, exclusions));
    put(&mut members, SETTINGS_KEY, indented(&settings));
    Ok(render(&members))
}

fn is_type(key: &str) -> bool {
    TYPE_KEYS.contains(&key)
}

fn quoted(declared: DeclaredType) -> String {
    format!("\"{}\"", declared.name())
}

/// The text of an object with another element type where it states one, and the same otherwise.
fn with_type(object: &str, declared: DeclaredType) -> Result<String, ConfigError> {
    let mut text = String::with_capacity(object.len() + 8);
    let mut copied = 0;
    for (key, value) in members(object)? {
        if is_type(&key) {
            // a borrowed value lies inside the text
            let start = value.as_ptr() as usize - object.as_ptr() as usize;
            text.push_str(&object[copied..start]);
            text.push_str(&quoted(declared));
            copied = start + value.len();
        }
    }
    text.push_str(&object[copied..]);
    Ok(text)
}

/// The text of a value, without what objects in it declare of a quantization; all else is as it was.
fn without_settings(value: &str) -> Result<String, ConfigError> {
    if !value.starts_with('{') {
        return Ok(value.to_string());
    }
    let mut text = String::with_capacity(value.len());
    let (mut copied, mut is_first) = (0, true);
    for (key, member) in members(value)? {
        // a borrowed value lies inside the text
        let start = member.as_ptr() as usize - value.as_ptr() as usize;
        let end = start + member.len();
        if key != SETTINGS_KEY {
            text.push_str(&value[copied..start]);
            text.push_str(&without_settings(member)?);
            (copied, is_first) = (end, false);
            continue;
        }
        // with the comma before it, or behind it
        copied = end;
        if is_first {
            text.push('{');
            let behind = value[end..].trim_start();
            copied = value.len() - behind.strip_prefix(',').unwrap_or(behind).len();
        }
    }
    text.push_str(&value[copied..]);
    Ok(text)
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

/// The members of an object in order, values as they are written: numbers such as `1e-05` would
/// change their look on the way through a parsed value. Fails on a key that is there twice.
fn members(object: &str) -> Result<Vec<(String, &str)>, ConfigError> {
    let json = |source| ConfigError::Json {
        file: MODEL_CONFIG,
        source,
    };
    let Members(members) = serde_json::from_str(object).map_err(json)?;
    let mut seen = std::collections::HashSet::new();
    match members.iter().find(|(key, _)| !seen.insert(key)) {
        None => Ok((members.into_iter())
            .map(|(key, value)| (key, value.get()))
            .collect()),
        Some((key, _)) => Err(ConfigError::Repeated {
            file: MODEL_CONFIG,
            key: key.clone(),
        }),
    }
}

struct Members<'a>(Vec<(String, &'a RawValue)>);

impl<'de> Deserialize<'de> for Members<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(MembersVisitor)
    }
}

struct MembersVisitor;

impl<'de> Visitor<'de> for MembersVisitor {
    type Value = Members<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Members<'de>, A::Error> {
        let mut members = Vec::new();
        while let Some(member) = map.next_entry()? {
            members.push(member);
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

    fn with_settings(config: &str, spec: &QuantSpec) -> Result<String, ConfigError> {
        let declared = DeclaredType::F16;
        config_json_with_quantization(config, spec, "t:1", &no_meta(), &[], declared)
    }

    /// GPTQModel 7.7.0 answered "only supported if produced by gptqmodel version >= 0.9.0".
    #[test]
    fn asymmetric_v1_files_bear_the_mark_that_readers_ask_for() {
        let mut spec = QuantSpec {
            sym: false,
            ..QuantSpec::published()
        };
        let marked = |spec: &QuantSpec| {
            quantize_config_json(spec, "t:1", "m", &no_meta(), &[]).contains("gptqmodel:0.9.0")
        };
        assert!(marked(&spec));
        spec.format = CheckpointFormat::GptqV2;
        assert!(!marked(&spec));
    }

    #[test]
    fn the_published_settings_are_this_text() {
        let extra = into_object(json!({"uri": "u"}));
        let text =
            quantize_config_json(&QuantSpec::published(), "gptq-rs:0.1.0", "a/b", &extra, &[]);
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
        let own = quantize_config_json(spec, "t:1", "m", &no_meta(), &[]);
        let model = with_settings("{}", spec).unwrap();
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
        let text = with_settings(original, &spec).unwrap();
        let before = original
            .replace("bfloat16", "float16")
            .replace("\"z\\u00e9\"", "\"zé\"");
        let kept = before.trim_end().trim_end_matches('}').trim_end();
        assert!(text.starts_with(&format!(
            "{kept},\n  \"quantization_config\": {{\n    \"bits\": 4,"
        )));
        assert!(text.ends_with("    }\n  }\n}\n"));
        let again = with_settings(&text, &spec).unwrap();
        assert_eq!(again, text);
    }

    #[test]
    fn the_element_type_is_set_wherever_it_stands() {
        let spec = QuantSpec::published();
        let emit = |text| -> Value {
            let text = with_settings(text, &spec).unwrap();
            serde_json::from_str(&text).unwrap()
        };
        assert_eq!(emit(r#"{"dtype":"bfloat16"}"#)["dtype"], "float16");
        assert_eq!(emit(r#"{"dtype":"bfloat16"}"#).get("torch_dtype"), None);
        assert_eq!(emit("{}")["torch_dtype"], "float16");
    }

    /// The float source's declaration was once copied along with the checkpoint's own settings.
    #[test]
    fn settings_inside_the_parts_of_a_model_are_taken_out() {
        for (part, left) in [
            (
                r#"{"quantization_config": {"bits": 8}, "a" :1}"#,
                r#"{ "a" :1}"#,
            ),
            (
                r#"{"a": 1e-06,  "quantization_config":{"b":{}} }"#,
                r#"{"a": 1e-06 }"#,
            ),
            (
                r#"{"a": 1, "quantization_config": null, "b": 2}"#,
                r#"{"a": 1, "b": 2}"#,
            ),
            (r#"{ "quantization_config": [] }"#, "{}"),
            (
                r#"{"x": {"quantiz\u0061tion_config": 1}, "y": [{}]}"#,
                r#"{"x": {}, "y": [{}]}"#,
            ),
            (
                r#"{"quantization_configs": {"a":1}}"#,
                r#"{"quantization_configs": {"a":1}}"#,
            ),
        ] {
            for key in ["text_config", "vision_config"] {
                let config = format!(r#"{{"{key}": {part}, "eps": 1e-05}}"#);
                let text = with_settings(&config, &QuantSpec::published()).unwrap();
                let kept = format!("{{\n  \"{key}\": {left},\n  \"eps\": 1e-05,\n");
                assert!(text.starts_with(&kept), "{text}");
                serde_json::from_str::<Value>(&text).unwrap();
            }
        }
    }

    /// Gemma 3 overflows to infinities in f16, yet the copy of the type in text_config once stayed f16.
    #[test]
    fn both_parts_of_a_multimodal_config_declare_the_same() {
        let original = r#"{
  "dtype": "float16",
  "text_config": {"eps": 1e-06, "dtype" :  "float16", "torch_dtype":null,
    "nested": {"dtype": "float32"}},
  "vision_config": {"dtype": "float32"}
}"#;
        let spec = QuantSpec::published();
        let text = config_json_with_quantization(
            original,
            &spec,
            "t:1",
            &no_meta(),
            &[],
            DeclaredType::Bf16,
        );
        let text = text.unwrap();
        let kept = r#"{
  "dtype": "bfloat16",
  "text_config": {"eps": 1e-06, "dtype" :  "bfloat16", "torch_dtype":"bfloat16",
    "nested": {"dtype": "float32"}},
  "vision_config": {"dtype": "float32"},
  "quantization_config": {"#;
        assert!(text.starts_with(kept), "{text}");
        let parsed: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(parsed.get("torch_dtype"), None);

        // a part without a type follows the whole model
        for silent in [r#"{"text_config":{"a":[1]}}"#, r#"{"text_config":null}"#] {
            let text = with_settings(silent, &spec).unwrap();
            assert!(text.contains(r#"  "torch_dtype": "float16","#), "{text}");
            assert_eq!(text.matches("float16").count(), 1);
        }
        assert!(matches!(
            with_settings(r#"{"text_config":{"a":1,"a":2}}"#, &spec),
            Err(ConfigError::Repeated { key, .. }) if key == "a"
        ));
    }

    #[test]
    fn what_stays_float_is_told_in_both_files_and_read_back() {
        let spec = QuantSpec::published();
        let skipped = [r"-:.*\.router\.proj$", r"-:^(model\.)?visual\."].map(String::from);
        let own = quantize_config_json(&spec, "t:1", "m", &no_meta(), &skipped);
        let declared = DeclaredType::F16;
        let model =
            config_json_with_quantization("{}", &spec, "t:1", &no_meta(), &skipped, declared);
        let model = model.unwrap();
        let told = r#"  "pack_dtype": "int32",
  "dynamic": {
    "-:.*\\.router\\.proj$": {},
    "-:^(model\\.)?visual\\.": {}
  },
  "meta": {"#;
        assert!(own.contains(told), "{own}");
        assert!(model.contains(&told.replace('\n', "\n  ")), "{model}");
        let config = QuantizeConfig::from_files(Some(&own), Some(&model));
        let rules = config.unwrap().unwrap().dynamic.unwrap();
        assert!(rules.keys().eq(skipped.iter()));
    }

    #[test]
    fn text_that_is_no_config_is_refused() {
        let spec = QuantSpec::published();
        let emit = |text| with_settings(text, &spec);
        assert!(matches!(emit("[]"), Err(ConfigError::Json { .. })));
        assert!(matches!(
            emit(r#"{"a":1,"a":2}"#),
            Err(ConfigError::Repeated { key, .. }) if key == "a"
        ));
    }
}
