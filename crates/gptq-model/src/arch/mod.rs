//! One file a family: what its `config.json` says beyond the common part.

mod llama;
mod mistral;
mod qwen2;
mod qwen3;

use gptq_types::outside_name::shown;

use crate::config::{ConfigError, DecoderConfig, Fields};

/// The families, for error messages.
pub(crate) const KNOWN: &str = "llama, mistral, qwen2, qwen3";

/// Reads the fields of a `model_type`.
pub(crate) fn read(model_type: &str, fields: &Fields<'_>) -> Result<DecoderConfig, ConfigError> {
    match model_type {
        "llama" => llama::read(fields),
        "mistral" => mistral::read(fields),
        "qwen2" => qwen2::read(fields),
        "qwen3" => qwen3::read(fields),
        other => Err(ConfigError::UnknownArchitecture(shown(other, 80))),
    }
}

/// `sliding_window` of the file, and what `layer_types` say of it: one list of one entry a block.
fn window(fields: &Fields<'_>) -> Result<Option<usize>, ConfigError> {
    layer_kinds(fields)?;
    fields.optional_size("sliding_window")
}

/// Qwen's rule, as transformers has it: `layer_types` where given; else, if `use_sliding_window`, the
/// blocks from `max_window_layers` on. One block with a window is enough to have one here: windows
/// that are longer are refused, and within it all blocks see the same.
fn qwen_window(fields: &Fields<'_>) -> Result<Option<usize>, ConfigError> {
    const WINDOW: usize = 4096;
    const MAX_WINDOW_LAYERS: usize = 28;
    let kinds = layer_kinds(fields)?;
    let layers = fields.size("num_hidden_layers")?;
    let first = (fields.optional_size("max_window_layers")?).unwrap_or(MAX_WINDOW_LAYERS);
    let windowed = match (fields.flag("use_sliding_window", false)?, kinds) {
        (false, Some(Kinds::Windowed)) => {
            let found = fields
                .get("layer_types")
                .map_or(String::new(), ToString::to_string);
            let expected = "full attention alone, since use_sliding_window is false";
            return Err(ConfigError::value("layer_types", found, expected));
        }
        (false, _) | (true, Some(Kinds::Full)) => false,
        (true, Some(Kinds::Windowed)) => true,
        (true, None) => first < layers,
    };
    match (windowed, fields.0.get("sliding_window")) {
        (false, _) => Ok(None),
        (true, None) => Ok(Some(WINDOW)),
        (true, Some(_)) => fields.optional_size("sliding_window"),
    }
}

/// What a list of `layer_types` comes to.
#[derive(Clone, Copy)]
enum Kinds {
    /// Every block sees all that came before.
    Full,
    /// Some look back as far as the window.
    Windowed,
}

fn layer_kinds(fields: &Fields<'_>) -> Result<Option<Kinds>, ConfigError> {
    const KEY: &str = "layer_types";
    let Some(value) = fields.get(KEY) else {
        return Ok(None);
    };
    let layers = fields.size("num_hidden_layers")?;
    let list = (value.as_array()).filter(|list| list.len() == layers);
    let Some(list) = list else {
        return Err(ConfigError::value(KEY, value, "a kind for each block"));
    };
    let mut kinds = Kinds::Full;
    for kind in list {
        match kind.as_str() {
            Some("full_attention") => {}
            Some("sliding_attention") => kinds = Kinds::Windowed,
            _ => {
                let expected = "full_attention or sliding_attention";
                return Err(ConfigError::unsupported(KEY, kind, expected));
            }
        }
    }
    Ok(Some(kinds))
}

/// Names a flag that the family does not read where it is not what the family does anyway, as
/// transformers has it: which tensors there are decides.
fn name_unlike(
    config: &mut DecoderConfig,
    fields: &Fields<'_>,
    flags: &[(&'static str, bool)],
) -> Result<(), ConfigError> {
    for &(key, does) in flags {
        if fields.flag(key, does)? != does {
            config.unread_keys.push(key.to_string());
        }
    }
    Ok(())
}
