//! Renames the tensors of decoders saved by other programs to `model.*` and `lm_head.*`.
//!
//! A text model taken out of a multimodal one has names `language_model.model.*` or
//! `model.language_model.*`, a bare decoder lacks `model.`, wrappers leave `_orig_mod.` (a compiled
//! module), `module.` or `base_model.model.`. The name of the embedding reveals the prefix of all
//! names.
//!
//! A multimodal checkpoint, one whose `config.json` has a `text_config`, is not renamed: its modules
//! keep the paths that its readers expect, and only wrappers are removed.

use std::collections::BTreeMap;

use gptq_types::outside_name::shown;

const EMBEDDING: &str = "embed_tokens.weight";
const DECODER: &str = "model.";
const HEAD: &str = "lm_head.";
/// Left inside names by `torch.compile`, checkpointed activations and sharded training.
const WRAPPERS: [&str; 3] = [
    "_orig_mod.",
    "_checkpoint_wrapped_module.",
    "_fsdp_wrapped_module.",
];
/// Left before all names by data-parallel training and by adapters that were merged.
const LEADING: [&str; 2] = ["module.", "base_model.model."];
/// Characters of a stored name shown in an error.
const SHOWN_CHARACTERS: usize = 96;

/// Names of a checkpoint as the rest of the program knows them.
#[derive(Debug, PartialEq)]
pub(crate) struct Renamed<T> {
    pub tensors: BTreeMap<String, T>,
    /// A note on the removed prefix, if there was one.
    pub note: Option<String>,
}

/// Removes prefixes from the names; `Err` describes what was found instead of a decoder.
///
/// With `multimodal` the decoder is one part of a larger model, and names lose only their wrappers.
/// Names without an embedding among them are unchanged: the reader that lacks a tensor reports it.
pub(crate) fn canonical<T>(
    tensors: BTreeMap<String, T>,
    multimodal: bool,
) -> Result<Renamed<T>, String> {
    if multimodal {
        return without_wrappers(tensors);
    }
    let embeddings: Vec<String> = tensors
        .keys()
        .map(|name| unwrapped(name))
        .filter(|name| is_embedding(name))
        .collect();
    let plain = format!("{DECODER}{EMBEDDING}");
    if tensors.contains_key(&plain) || embeddings.is_empty() {
        let note = None;
        return Ok(Renamed { tensors, note });
    }
    let [embedding] = &embeddings[..] else {
        let found = |at: usize| shown(&embeddings[at], SHOWN_CHARACTERS);
        return Err(format!("has both `{}` and `{}`", found(0), found(1)));
    };
    let prefix = &embedding[..embedding.len() - EMBEDDING.len()];
    let mut renamed = BTreeMap::new();
    let mut example = None;
    for (name, tensor) in tensors {
        let Some(new) = renamed_one(&name, prefix) else {
            return Err(format!(
                "has its decoder at `{}*` and beside it `{}`, which is part of no decoder",
                shown(prefix, SHOWN_CHARACTERS),
                shown(&name, SHOWN_CHARACTERS)
            ));
        };
        if is_embedding(&new) {
            example = Some(name.clone());
        }
        if renamed.insert(new.clone(), tensor).is_some() {
            return Err(both_mean(&new));
        }
    }
    let example = shown(&example.unwrap_or_default(), SHOWN_CHARACTERS);
    Ok(Renamed {
        tensors: renamed,
        note: Some(format!(
            "tensors are named as `{example}` is; they are read, and written, as `{plain}`"
        )),
    })
}

fn without_wrappers<T>(tensors: BTreeMap<String, T>) -> Result<Renamed<T>, String> {
    let mut leading = String::new();
    let every = |start: &str| {
        let mut names = tensors.keys().map(|name| unwrapped(name));
        !tensors.is_empty() && names.all(|name| name.starts_with(start))
    };
    while let Some(more) = LEADING
        .iter()
        .find(|more| every(&format!("{leading}{more}")))
    {
        leading.push_str(more);
    }
    let mut renamed = BTreeMap::new();
    let mut note = None;
    for (name, tensor) in tensors {
        let new = unwrapped(&name)[leading.len()..].to_string();
        if new != name && note.is_none() {
            let [old, kept] = [&name, &new].map(|name| shown(name, SHOWN_CHARACTERS));
            note = Some(format!(
                "tensors are named as `{old}` is; they are read, and written, as `{kept}`"
            ));
        }
        if renamed.insert(new.clone(), tensor).is_some() {
            return Err(both_mean(&new));
        }
    }
    let tensors = renamed;
    Ok(Renamed { tensors, note })
}

fn both_mean(name: &str) -> String {
    let name = shown(name, SHOWN_CHARACTERS);
    format!("has two tensors that both mean `{name}`")
}

fn renamed_one(name: &str, prefix: &str) -> Option<String> {
    let name = unwrapped(name);
    if let Some(head) = name.find(HEAD)
        && (head == 0 || name[..head].ends_with('.'))
    {
        return Some(name[head..].to_string());
    }
    let rest = name.strip_prefix(prefix)?;
    let own = rest.starts_with("layers.") || rest == EMBEDDING || rest.starts_with("norm.");
    own.then(|| format!("{DECODER}{rest}"))
}

fn unwrapped(name: &str) -> String {
    let strip = |name: String, wrapper: &&str| name.replace(*wrapper, "");
    WRAPPERS.iter().fold(name.to_string(), strip)
}

fn is_embedding(name: &str) -> bool {
    let before = name.strip_suffix(EMBEDDING);
    before.is_some_and(|before| before.is_empty() || before.ends_with('.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: [&str; 4] = [
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.norm.weight",
    ];

    fn named(names: &[String]) -> BTreeMap<String, usize> {
        let pairs = names.iter().cloned().enumerate();
        pairs.map(|(at, name)| (name, at)).collect()
    }

    fn each(change: impl Fn(&str) -> String) -> Result<Renamed<usize>, String> {
        let names: Vec<String> = PLAIN.iter().map(|name| change(name)).collect();
        canonical(named(&names), false)
    }

    #[test]
    fn every_known_way_of_naming_comes_out_the_same() {
        // each was once "tensor `model.embed_tokens.weight` is missing"
        let ways: [fn(&str) -> String; 8] = [
            |name| format!("language_model.{name}"),
            |name| name.replacen("model.", "model.language_model.", 1),
            |name| name.replacen("model.", "", 1),
            |name| format!("_orig_mod.{name}"),
            |name| format!("base_model.model.{name}"),
            |name| format!("model.{name}"),
            |name| {
                name.replacen("layers.0.", "layers.0._orig_mod.", 1)
                    .replacen("model.", "", 1)
            },
            |name| format!("module.{name}"),
        ];
        for (at, way) in ways.into_iter().enumerate() {
            let renamed = each(way).unwrap();
            assert!(renamed.tensors.keys().eq(PLAIN.iter()), "{at}: {renamed:?}");
            assert!(renamed.note.unwrap().contains("embed_tokens.weight"));
            assert!(renamed.tensors.values().eq([0, 1, 2, 3].iter()), "{at}");
        }
        let plain = each(str::to_string).unwrap();
        assert_eq!(plain.note, None);
    }

    #[test]
    fn what_lies_beside_a_decoder_is_named() {
        let mut names: Vec<String> = PLAIN.map(|name| format!("language_model.{name}")).to_vec();
        names.push("vision_tower.patch_embed.weight".into());
        let error = canonical(named(&names), false).unwrap_err();
        assert!(error.contains("`language_model.model.*`"), "{error}");
        assert!(
            error.contains("`vision_tower.patch_embed.weight`"),
            "{error}"
        );

        let two = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"];
        let error = canonical(named(&two.map(String::from)), false).unwrap_err();
        assert!(
            error.contains("`decoder.embed_tokens.weight` and"),
            "{error}"
        );
        let twice = [
            "a.embed_tokens.weight",
            "a.norm.weight",
            "a.norm._orig_mod.weight",
        ];
        assert!(
            canonical(named(&twice.map(String::from)), false)
                .unwrap_err()
                .contains("both mean")
        );
        // nothing looks like a decoder: the reader that lacks a tensor reports it
        let other = ["transformer.wte.weight".to_string()];
        assert_eq!(canonical(named(&other), false).unwrap().note, None);
    }
    #[test]
    fn modules_of_a_multimodal_model_keep_their_paths() {
        // all but the last once ended in "part of no decoder", or lost the path that readers know
        let ways: [&[&str]; 4] = [
            &[
                "lm_head.weight",
                "model.language_model.embed_tokens.weight",
                "model.language_model.layers.0.mlp.up_proj.weight",
                "model.multi_modal_projector.linear.weight",
                "model.vision_tower.blocks.0.attn.qkv.weight",
                "mtp.layers.0.mlp.up_proj.weight",
            ],
            &[
                "language_model.lm_head.weight",
                "language_model.model.embed_tokens.weight",
                "vision_tower.patch_embed.weight",
            ],
            &["embed_tokens.weight", "layers.0.mlp.up_proj.weight"],
            &["model.embed_tokens.weight", "model.visual.merger.weight"],
        ];
        for way in ways {
            let names: Vec<String> = way.iter().map(|name| name.to_string()).collect();
            let renamed = canonical(named(&names), true).unwrap();
            assert_eq!(renamed.note, None);
            assert!(renamed.tensors.keys().eq(&names), "{renamed:?}");

            let wrappers: [fn(&String) -> String; 3] = [
                |name| format!("_orig_mod.{name}"),
                |name| format!("module._orig_mod.{name}"),
                |name| format!("base_model.model.module.{name}"),
            ];
            for wrap in wrappers {
                let wrapped: Vec<String> = names.iter().map(wrap).collect();
                let renamed = canonical(named(&wrapped), true).unwrap();
                assert!(renamed.tensors.keys().eq(&names), "{renamed:?}");
                let note = renamed.note.unwrap();
                assert!(note.contains(&format!("as `{}`", names[0])), "{note}");
            }
        }
        let twice = ["a._orig_mod.weight", "a.weight"].map(String::from);
        let error = canonical(named(&twice), true).unwrap_err();
        assert!(error.ends_with("both mean `a.weight`"), "{error}");
        // what stands before some names only is part of them
        let some = ["lm_head.weight", "module.a.weight"].map(String::from);
        assert!(canonical(named(&some), true).unwrap().note.is_none());
        assert!(canonical(named(&[]), true).unwrap().tensors.is_empty());
    }
}
