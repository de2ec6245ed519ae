//! One file a family: what its `config.json` says beyond the common part.

mod llama;
mod mistral;
mod qwen2;
mod qwen3;

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
        other => Err(ConfigError::UnknownArchitecture(other.to_string())),
    }
}

/// Qwen's window only counts where `use_sliding_window` says so.
fn qwen_window(fields: &Fields<'_>) -> Result<Option<usize>, ConfigError> {
    if fields.flag("use_sliding_window", false)? {
        return fields.optional_size("sliding_window");
    }
    Ok(None)
}
