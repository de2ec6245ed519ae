//! Sliding windows of attention, block by block.

use serde_json::Value;

use super::{Reader, Sizes};
use crate::config::ConfigError;

/// `layer_types` of the file: whether attention of each block is windowed.
pub(crate) fn layer_types(
    reader: &Reader<'_>,
    blocks: usize,
) -> Result<Option<Vec<bool>>, ConfigError> {
    const KEY: &str = "layer_types";
    let Some(list) = reader.fields.list(KEY, blocks)? else {
        return Ok(None);
    };
    let windowed = |kind: &serde_json::Value| match kind.as_str() {
        Some("full_attention") => Ok(false),
        Some("sliding_attention") => Ok(true),
        _ => {
            let expected = "full_attention or sliding_attention";
            Err(ConfigError::unsupported(KEY, kind, expected))
        }
    };
    list.iter()
        .map(windowed)
        .collect::<Result<_, _>>()
        .map(Some)
}

/// `layer_types`; without them, every block but each `n`-th is windowed, `n` being under `key` or `default`.
pub(crate) fn all_but_each(
    reader: &Reader<'_>,
    blocks: usize,
    key: &'static str,
    default: usize,
) -> Result<Vec<bool>, ConfigError> {
    if let Some(windowed) = layer_types(reader, blocks)? {
        return Ok(windowed);
    }
    match reader.fields.optional_size(key)?.unwrap_or(default) {
        0 => Err(ConfigError::value(key, 0, "at least 1")),
        n => Ok((1..=blocks).map(|count| count % n != 0).collect()),
    }
}

/// `sliding_window` of the file; `default` where it does not say, none where it says `null`.
pub(crate) fn width(
    reader: &Reader<'_>,
    default: Option<usize>,
) -> Result<Option<usize>, ConfigError> {
    match reader.fields.0.get("sliding_window") {
        None => Ok(default),
        Some(_) => reader.fields.optional_size("sliding_window"),
    }
}

/// `sliding_window` in the blocks that `windowed` names, which needs one.
pub(crate) fn by_block(
    reader: &Reader<'_>,
    windowed: Vec<bool>,
    default: Option<usize>,
) -> Result<Vec<Option<usize>>, ConfigError> {
    let window = width(reader, default)?;
    if window.is_none() && windowed.contains(&true) {
        return Err(ConfigError::Missing("sliding_window"));
    }
    Ok((windowed.into_iter())
        .map(|windowed| window.filter(|_| windowed))
        .collect())
}

/// The same window in all blocks, where there is one; `default` where the file does not say. Of
/// `layer_types` transformers reads nothing in these families, and other readers do: it has to say the same.
pub(crate) fn everywhere(
    reader: &Reader<'_>,
    sizes: &mut Sizes,
    default: Option<usize>,
) -> Result<Vec<Option<usize>>, ConfigError> {
    let window = width(reader, default)?;
    let kinds = layer_types(reader, sizes.blocks)?.unwrap_or_default();
    if kinds.iter().any(|windowed| *windowed != window.is_some()) {
        let found = reader.fields.get("layer_types").unwrap_or(&Value::Null);
        let expected = match window {
            Some(_) => "sliding_attention alone, since the family has its window in all blocks",
            None => "full_attention alone, since there is no sliding_window",
        };
        return Err(ConfigError::unsupported("layer_types", found, expected));
    }
    name_switch(reader, sizes, window.is_some())?;
    Ok(vec![window; sizes.blocks])
}

/// No windows, in families that have none. A file that asks for them has keys that are not read, as in
/// transformers: they are named.
pub(crate) fn nowhere(
    reader: &Reader<'_>,
    sizes: &mut Sizes,
) -> Result<Vec<Option<usize>>, ConfigError> {
    let kinds = layer_types(reader, sizes.blocks)?.unwrap_or_default();
    let is_off = reader.fields.get("use_sliding_window") == Some(&Value::Bool(false));
    let has_width = width(reader, None)?.is_some_and(|width| width > 0);
    for (key, asks) in [
        ("layer_types", kinds.contains(&true)),
        ("sliding_window", has_width && !is_off),
    ] {
        if asks {
            sizes.unread_keys.push(key.to_string());
        }
    }
    name_switch(reader, sizes, false)?;
    Ok(vec![None; sizes.blocks])
}

/// Names `use_sliding_window` where the family does not read it and it says otherwise.
fn name_switch(reader: &Reader<'_>, sizes: &mut Sizes, windowed: bool) -> Result<(), ConfigError> {
    const KEY: &str = "use_sliding_window";
    if reader.fields.flag(KEY, windowed)? != windowed {
        sizes.unread_keys.push(KEY.to_string());
    }
    Ok(())
}

/// Qwen's rule, as transformers has it: `layer_types` where given; else, if `use_sliding_window`, the
/// blocks from `max_window_layers` on.
pub(crate) fn of_qwen(
    reader: &Reader<'_>,
    blocks: usize,
) -> Result<Vec<Option<usize>>, ConfigError> {
    const WINDOW: usize = 4096;
    const MAX_WINDOW_LAYERS: usize = 28;
    let fields = &reader.fields;
    let kinds = layer_types(reader, blocks)?;
    let first = (fields.optional_size("max_window_layers")?).unwrap_or(MAX_WINDOW_LAYERS);
    if !fields.flag("use_sliding_window", false)? {
        refuse_switched_off(reader, kinds.as_deref())?;
        return Ok(vec![None; blocks]);
    }
    let window = width(reader, Some(WINDOW))?;
    if window.is_none() && kinds.as_ref().is_some_and(|kinds| kinds.contains(&true)) {
        return Err(ConfigError::Missing("sliding_window"));
    }
    let kinds = kinds.unwrap_or_else(|| (0..blocks).map(|index| index >= first).collect());
    Ok(kinds
        .into_iter()
        .map(|windowed| window.filter(|_| windowed))
        .collect())
}

/// Refuses blocks with a window where `use_sliding_window` says that there are none: readers differ then.
pub(crate) fn refuse_switched_off(
    reader: &Reader<'_>,
    kinds: Option<&[bool]>,
) -> Result<(), ConfigError> {
    if !kinds.is_some_and(|kinds| kinds.contains(&true)) {
        return Ok(());
    }
    let found = reader.fields.get("layer_types").unwrap_or(&Value::Null);
    let expected = "full attention alone, since use_sliding_window is false";
    Err(ConfigError::value("layer_types", found, expected))
}

#[cfg(test)]
mod tests {
    use crate::arch;

    /// The windows of two blocks, and the keys that are named.
    fn read(family: &str, more: &str) -> Result<(Vec<Option<usize>>, String), String> {
        let text = format!(
            r#"{{"model_type": "{family}", "hidden_size": 64, "intermediate_size": 96,
                "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
                "head_dim": 32, "vocab_size": 64{more}}}"#
        );
        let model = arch::read(&text, &[]).map_err(|error| error.to_string())?;
        let attention = model.blocks.iter().flat_map(|block| block.attention());
        let windows = attention.map(|attention| attention.shape.window).collect();
        Ok((windows, model.unread_keys.join(" ")))
    }

    const SLIDING: &str = r#", "layer_types": ["sliding_attention", "sliding_attention"]"#;
    const FULL: &str = r#", "layer_types": ["full_attention", "full_attention"]"#;
    const MIXED: &str = r#", "layer_types": ["sliding_attention", "full_attention"]"#;

    /// transformers has no window in these, whatever the file says. It was passed over in silence, and in a
    /// Llama the window was applied.
    #[test]
    fn a_family_without_windows_names_keys_that_ask_for_one() {
        for family in [
            "cohere",
            "gemma",
            "glm4",
            "granite",
            "hunyuan_v1_dense",
            "llama",
            "olmo2",
            "seed_oss",
        ] {
            let full = vec![None; 2];
            let read = |more: &str| read(family, more);
            for silent in [
                "",
                FULL,
                r#", "sliding_window": null, "use_sliding_window": false"#,
                r#", "sliding_window": 8, "use_sliding_window": false"#,
            ] {
                assert_eq!(
                    read(silent),
                    Ok((full.clone(), String::new())),
                    "{family} {silent}"
                );
            }
            for (more, named) in [
                (SLIDING, "layer_types"),
                (MIXED, "layer_types"),
                (r#", "sliding_window": 8"#, "sliding_window"),
                (
                    r#", "sliding_window": 8, "use_sliding_window": true"#,
                    "sliding_window use_sliding_window",
                ),
            ] {
                assert_eq!(
                    read(more),
                    Ok((full.clone(), named.to_string())),
                    "{family} {more}"
                );
            }
            for other in [
                r#", "layer_types": ["full_attention", "linear_attention"]"#,
                r#", "layer_types": ["full_attention"]"#,
            ] {
                let error = read(other).unwrap_err();
                assert!(error.contains("`layer_types`"), "{error}");
            }
        }
    }

    /// A Mistral that does not say has a window of 4096 in transformers, and had none here; where
    /// `layer_types` left blocks out, they had none here and have one there.
    #[test]
    fn a_family_with_one_window_has_it_in_all_blocks() {
        for (family, default) in [
            ("mistral", Some(4096)),
            ("ministral3", None),
            ("phi3", None),
            ("starcoder2", None),
        ] {
            let read = |more: &str| read(family, more);
            let all = |window, named: &str| Ok((vec![window; 2], named.to_string()));
            assert_eq!(read(""), all(default, ""));
            assert_eq!(read(r#", "sliding_window": null"#), all(None, ""));
            let eight = r#", "sliding_window": 8"#;
            assert_eq!(read(eight), all(Some(8), ""));
            assert_eq!(read(&format!("{eight}{SLIDING}")), all(Some(8), ""));
            let off = format!(r#"{eight}, "use_sliding_window": false"#);
            assert_eq!(read(&off), all(Some(8), "use_sliding_window"));
            let without = r#", "sliding_window": null"#;
            for (window, kinds) in [(eight, MIXED), (eight, FULL), (without, SLIDING)] {
                let error = read(&format!("{window}{kinds}")).unwrap_err();
                assert!(error.contains("`layer_types`"), "{error}");
            }
        }
    }

    /// `null` is no window, not the one that files mean which do not say; then blocks cannot have one.
    #[test]
    fn blocks_with_a_window_need_its_width() {
        for family in ["gemma2", "gemma3_text", "cohere2", "olmo3"] {
            let error = read(family, r#", "sliding_window": null"#).unwrap_err();
            assert!(error.contains("`sliding_window`"), "{family}: {error}");
            let full = format!(r#", "sliding_window": null{FULL}"#);
            assert_eq!(read(family, &full), Ok((vec![None; 2], String::new())));
        }
        for family in ["qwen2", "qwen3", "smollm3"] {
            let on = r#", "use_sliding_window": true"#;
            let without = format!(r#"{on}, "sliding_window": null{MIXED}"#);
            let error = read(family, &without).unwrap_err();
            assert!(error.contains("`sliding_window`"), "{family}: {error}");
            let off = format!(r#", "sliding_window": 8{MIXED}"#);
            let error = read(family, &off).unwrap_err();
            assert!(error.contains("`layer_types`"), "{family}: {error}");
            let both = format!(r#"{on}, "sliding_window": 8{MIXED}"#);
            assert_eq!(read(family, &both).unwrap().0, [Some(8), None]);
        }
    }
}
