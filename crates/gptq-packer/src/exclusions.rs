//! Modules that stay float, as GPTQModel, vLLM and SGLang read them: keys of `dynamic` that begin with
//! `-:`, each a regular expression matched against the beginning of a module's path.
//!
//! Paths at run time may differ from those in the file: readers add or remove `model.` before a part of a
//! multimodal model. So a whole part is excluded with and without it, and a module that occurs in every
//! block is excluded by the end of its path.

use std::collections::{BTreeMap, BTreeSet};

use gptq_types::TensorSource;

/// The prefix that some readers put before all parts of a model.
const ROOT: &str = "model.";
const SKIPS: &str = "-:";
/// Linears that readers make one of, under a name of their own. SGLang looks for that name alone.
const MERGED: [(&str, &[&str]); 4] = [
    ("qkv_proj", &["q_proj", "k_proj", "v_proj"]),
    ("gate_up_proj", &["gate_proj", "up_proj"]),
    ("in_proj_qkvz", &["in_proj_qkv", "in_proj_z"]),
    ("in_proj_ba", &["in_proj_b", "in_proj_a"]),
];

/// The exclusions of a checkpoint made of `source` in which the modules `quantized` are packed and
/// all other tensors are copied; none for a decoder whose linears are all packed.
///
/// Only what a reader would build as a linear is looked at: weights with two sides, but for
/// embeddings, heads and norms.
pub fn exclusions(source: &dyn TensorSource, quantized: &[String]) -> Vec<String> {
    let packed: BTreeSet<&str> = quantized.iter().map(String::as_str).collect();
    let names = source.names();
    let float = names.iter().filter_map(|name| {
        let module = name.strip_suffix(".weight")?;
        let sides = source.info(name)?.shape.len();
        let linear = sides == 2 && is_linear(module) && !packed.contains(module);
        linear.then(|| module.to_string())
    });
    exclusion_patterns(&float.collect::<Vec<_>>(), quantized)
}

/// Patterns that match every module of `float` and none of `quantized`, sorted and as few as the
/// paths allow.
///
/// ```
/// let float = ["vision_tower.layers.0.q_proj", "model.layers.0.mlp.gate"].map(String::from);
/// let quantized = ["model.layers.0.mlp.experts.0.up_proj".to_string()];
/// assert_eq!(
///     gptq_packer::exclusion_patterns(&float, &quantized),
///     [r"-:.*\.mlp\.gate$", r"-:^(model\.)?vision_tower\."]
/// );
/// ```
pub fn exclusion_patterns(float: &[String], quantized: &[String]) -> Vec<String> {
    let packed: BTreeSet<&str> = quantized.iter().map(|name| rootless(name)).collect();
    let mut ends = BTreeMap::new();
    let mut patterns = BTreeSet::new();
    for module in float {
        patterns.insert(match free_part(rootless(module), &packed) {
            Some(part) => format!("{SKIPS}^(model\\.)?{}\\.", escaped(part)),
            None => by_its_end(module, &packed, &mut ends),
        });
    }
    let merged = merged(&patterns);
    patterns.extend(merged);
    patterns.into_iter().collect()
}

/// For modules that are all excluded by the ends of their paths, the same of what is made of them.
fn merged(patterns: &BTreeSet<String>) -> Vec<String> {
    let mut more = Vec::new();
    for (whole, parts) in MERGED {
        let stem = |pattern: &String| {
            let stem = pattern.strip_suffix(&format!("{}$", parts[0]))?;
            let all = (parts.iter()).all(|part| patterns.contains(&format!("{stem}{part}$")));
            (all && stem.ends_with('.')).then(|| format!("{stem}{whole}$"))
        };
        more.extend(patterns.iter().filter_map(stem));
    }
    more
}

/// The shortest prefix of a path below which no module is packed: a part of the model, or a whole
/// block. `None` where each block would need an entry of its own.
fn free_part<'a>(module: &'a str, packed: &BTreeSet<&str>) -> Option<&'a str> {
    let mut inside_a_block = false;
    for (end, _) in module.match_indices('.') {
        let part = &module[..end];
        if inside_a_block {
            return None;
        }
        if !leads_to_packed(part, packed) {
            return Some(part);
        }
        inside_a_block = is_index(last(part));
    }
    None
}

fn leads_to_packed(part: &str, packed: &BTreeSet<&str>) -> bool {
    let below = format!("{part}.");
    let next = packed.range(below.as_str()..).next();
    packed.contains(part) || next.is_some_and(|name| name.starts_with(&below))
}

/// The path behind the number of the block, and as much before it as tells the module from the
/// packed ones.
fn by_its_end(module: &str, packed: &BTreeSet<&str>, known: &mut BTreeMap<String, bool>) -> String {
    let starts: Vec<usize> = (module.match_indices('.').map(|(at, _)| at + 1)).collect();
    let parent = starts.last().map_or("", |&at| &module[..at - 1]);
    let behind_block = (parent.split('.').rev()).position(is_index);
    for &start in starts.iter().rev().skip(behind_block.unwrap_or(0)) {
        let end = &module[start..];
        let taken = *known
            .entry(end.to_string())
            .or_insert_with(|| packed.iter().any(|name| ends_with_path(name, end)));
        if !taken && !is_index(end.split('.').next().unwrap_or(end)) {
            return format!("{SKIPS}.*\\.{}$", escaped(end));
        }
    }
    format!("{SKIPS}^{}$", escaped(module))
}

fn ends_with_path(name: &str, end: &str) -> bool {
    let before = name.strip_suffix(end);
    before.is_some_and(|before| before.is_empty() || before.ends_with('.'))
}

fn rootless(module: &str) -> &str {
    module.strip_prefix(ROOT).unwrap_or(module)
}

fn last(path: &str) -> &str {
    path.rsplit('.').next().unwrap_or(path)
}

fn is_index(component: &str) -> bool {
    !component.is_empty() && component.bytes().all(|byte| byte.is_ascii_digit())
}

fn is_linear(module: &str) -> bool {
    let name = last(module);
    name != "lm_head" && !name.contains("embed") && !name.contains("norm")
}

fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 8);
    for character in text.chars() {
        if !character.is_alphanumeric() && character != '_' && character != '-' {
            out.push('\\');
        }
        out.push(character);
    }
    out
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use gptq_types::{Dtype, SourceError, TensorInfo};

    use super::*;

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| name.to_string()).collect()
    }

    fn patterns(float: &[&str], quantized: &[&str]) -> Vec<String> {
        exclusion_patterns(&names(float), &names(quantized))
    }

    #[test]
    fn parts_beside_the_decoder_are_one_pattern_each() {
        let float = [
            "model.visual.blocks.0.attn.qkv",
            "model.visual.blocks.1.attn.qkv",
            "model.visual.merger.linear_fc1",
            "mtp.fc",
            "mtp.layers.0.mlp.up_proj",
            "multi_modal_projector.0",
        ];
        let quantized = ["model.language_model.layers.0.mlp.up_proj"];
        assert_eq!(
            patterns(&float, &quantized),
            [
                r"-:^(model\.)?mtp\.",
                r"-:^(model\.)?multi_modal_projector\.",
                r"-:^(model\.)?visual\.",
            ]
        );
        // a prediction block may stand as one more block of the decoder
        assert_eq!(
            patterns(
                &["model.layers.46.eh_proj", "model.layers.46.mlp.up_proj"],
                &["model.layers.4.mlp.up_proj"]
            ),
            [r"-:^(model\.)?layers\.46\."]
        );
    }

    #[test]
    fn what_every_block_has_is_told_once() {
        let float = [
            "model.layers.0.per_layer_input_gate",
            "model.layers.1.per_layer_input_gate",
            "model.layers.0.router.proj",
            "model.layers.10.router.proj",
            "model.layers.1.linear_attn.in_proj_a",
            "model.per_layer_model_projection",
            "odd",
        ];
        let quantized = [
            "model.layers.0.mlp.up_proj",
            "model.layers.1.mlp.experts.0.up_proj",
            "model.layers.1.linear_attn.in_proj_z",
            "model.layers.10.mlp.up_proj",
        ];
        assert_eq!(
            patterns(&float, &quantized),
            [
                r"-:.*\.linear_attn\.in_proj_a$",
                r"-:.*\.per_layer_input_gate$",
                r"-:.*\.per_layer_model_projection$",
                r"-:.*\.router\.proj$",
                "-:^odd$",
            ]
        );
    }

    #[test]
    fn what_readers_merge_is_excluded_under_its_own_name_too() {
        let attention = ["q_proj", "k_proj", "v_proj", "o_proj"];
        let float = attention.map(|name| format!("model.layers.0.self_attn.{name}"));
        let quantized = names(&["model.layers.0.mlp.up_proj"]);
        let ends = ["k_proj", "o_proj", "q_proj", "qkv_proj", "v_proj"];
        let expected = ends.map(|end| format!(r"-:.*\.self_attn\.{end}$"));
        assert_eq!(exclusion_patterns(&float, &quantized), expected);
        let without = exclusion_patterns(&float[1..], &quantized);
        assert!(!without.iter().any(|pattern| pattern.contains("qkv")));
    }

    #[test]
    fn no_packed_module_is_excluded() {
        // one of many is float
        let quantized = ["model.layers.1.mlp.up_proj", "model.layers.3.mlp.gate_proj"];
        assert_eq!(
            patterns(&["model.layers.3.mlp.up_proj"], &quantized),
            [r"-:.*\.layers\.3\.mlp\.up_proj$"]
        );
        assert_eq!(
            patterns(&["layers.3.up"], &["x.layers.3.up", "layers.3.down"]),
            [r"-:^layers\.3\.up$"]
        );
        // nothing that a name holds is a rule
        assert_eq!(
            patterns(&["a+(b).c.d"], &["e"]),
            [r"-:^(model\.)?a\+\(b\)\."]
        );
    }

    #[derive(Debug)]
    struct Shapes(BTreeMap<String, Vec<usize>>);

    impl TensorSource for Shapes {
        fn place(&self) -> String {
            "shapes".into()
        }

        fn names(&self) -> Vec<String> {
            self.0.keys().cloned().collect()
        }

        fn info(&self, name: &str) -> Option<TensorInfo> {
            let shape = self.0.get(name)?.clone();
            let dtype = Dtype::F16;
            Some(TensorInfo { dtype, shape })
        }

        fn bytes(&self, name: &str) -> Result<Vec<u8>, SourceError> {
            Err(SourceError::Missing {
                name: name.into(),
                place: self.place(),
            })
        }
    }

    fn source(tensors: &[(&str, &[usize])]) -> Shapes {
        let tensors = tensors.iter();
        Shapes(tensors.map(|(n, s)| (n.to_string(), s.to_vec())).collect())
    }

    #[test]
    fn only_linears_that_are_copied_count() {
        let plain = [
            ("model.embed_tokens.weight", &[8, 4][..]),
            ("model.embed_tokens_per_layer.weight", &[8, 4]),
            ("model.layers.0.input_layernorm.weight", &[4]),
            ("model.layers.0.mlp.up_proj.weight", &[4, 4]),
            ("model.layers.0.mlp.up_proj.bias", &[4]),
            ("model.layers.0.linear_attn.conv1d.weight", &[4, 1, 4]),
            ("lm_head.weight", &[8, 4]),
        ];
        let quantized = names(&["model.layers.0.mlp.up_proj"]);
        assert!(exclusions(&source(&plain), &quantized).is_empty());
        let more = [
            ("model.visual.patch_embed.proj.weight", &[4, 3, 2, 2][..]),
            ("model.visual.merger.fc.weight", &[4, 4]),
        ];
        let source = source(&[&plain[..], &more].concat());
        assert_eq!(exclusions(&source, &quantized), [r"-:^(model\.)?visual\."]);
    }
}
