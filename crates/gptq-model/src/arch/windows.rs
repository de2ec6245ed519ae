//! Sliding windows of attention, block by block.

use super::Reader;
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

/// `sliding_window` in the blocks that `windowed` names.
pub(crate) fn by_block(
    reader: &Reader<'_>,
    windowed: Vec<bool>,
    default: Option<usize>,
) -> Result<Vec<Option<usize>>, ConfigError> {
    let window = reader.fields.optional_size("sliding_window")?.or(default);
    if window.is_none() && windowed.contains(&true) {
        return Err(ConfigError::Missing("sliding_window"));
    }
    Ok((windowed.into_iter())
        .map(|windowed| window.filter(|_| windowed))
        .collect())
}

/// One window for all blocks, if there is any; `layer_types` may exempt some.
pub(crate) fn everywhere(
    reader: &Reader<'_>,
    blocks: usize,
) -> Result<Vec<Option<usize>>, ConfigError> {
    let window = reader.fields.optional_size("sliding_window")?;
    Ok(match layer_types(reader, blocks)? {
        Some(windowed) => windowed
            .into_iter()
            .map(|is| window.filter(|_| is))
            .collect(),
        None => vec![window; blocks],
    })
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
        if kinds.is_some_and(|kinds| kinds.contains(&true)) {
            let found = fields
                .get("layer_types")
                .map_or(String::new(), ToString::to_string);
            let expected = "full attention alone, since use_sliding_window is false";
            return Err(ConfigError::value("layer_types", found, expected));
        }
        return Ok(vec![None; blocks]);
    }
    let window = match fields.0.get("sliding_window") {
        None => Some(WINDOW),
        Some(_) => fields.optional_size("sliding_window")?,
    };
    let kinds = kinds.unwrap_or_else(|| (0..blocks).map(|index| index >= first).collect());
    Ok(kinds
        .into_iter()
        .map(|windowed| window.filter(|_| windowed))
        .collect())
}
