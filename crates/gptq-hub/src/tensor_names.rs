//! The names under which other programs save a decoder, brought back to `model.*` and `lm_head.*`.
//!
//! A text model taken out of a multimodal one is called `language_model.model.*` or
//! `model.language_model.*`, a bare decoder has no `model.`, wrappers leave `_orig_mod.` (a compiled
//! module), `module.` or `base_model.model.`. Where the embedding is found says what was put before
//! all names.

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
/// Of a name out of a file, in an error.
const SHOWN_CHARACTERS: usize = 96;

/// Names of a checkpoint as the rest of the program knows them.
#[derive(Debug, PartialEq)]
pub(crate) struct Renamed<T> {
    pub tensors: BTreeMap<String, T>,
    /// What stood before the names, where anything did.
    pub note: Option<String>,
}

/// Takes what was put before the names away; `Err` says what was found instead of a decoder.
///
/// Names without an embedding among them stay as they are: whoever misses a tensor names it.
pub(crate) fn canonical<T>(tensors: BTreeMap<String, T>) -> Result<Renamed<T>, String> {
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
            let new = shown(&new, SHOWN_CHARACTERS);
            return Err(format!("has two tensors that both mean `{new}`"));
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
        canonical(named(&names))
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
        let error = canonical(named(&names)).unwrap_err();
        assert!(error.contains("`language_model.model.*`"), "{error}");
        assert!(
            error.contains("`vision_tower.patch_embed.weight`"),
            "{error}"
        );

        let two = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"];
        let error = canonical(named(&two.map(String::from))).unwrap_err();
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
            canonical(named(&twice.map(String::from)))
                .unwrap_err()
                .contains("both mean")
        );
        // nothing that looks like a decoder: whoever misses a tensor says so
        let other = ["transformer.wte.weight".to_string()];
        assert_eq!(canonical(named(&other)).unwrap().note, None);
    }
}
