//! EXAONE 4 (`Exaone4ForCausalLM`, arXiv:2507.11407): norms behind attention and feed-forward only and on
//! every query and key head; where some blocks have a window, only those have RoPE.

use super::parts::norms_of_heads;
use super::relative::{Layout, Relative, name_unlike};
use super::rotaries::Rotaries;
use super::sizes::Defaults;
use super::{Reader, Sizes, windows};
use crate::config::ConfigError;
use crate::config_keys::Honoured;
use crate::spec::ModelSpec;

const HONOURED: Honoured = Honoured::reads(&["sliding_window_pattern"]);

pub(super) fn read(reader: &Reader<'_>) -> Result<ModelSpec, ConfigError> {
    let defaults = Defaults {
        eps: ("rms_norm_eps", 1e-5),
        ..Defaults::LLAMA
    };
    let mut sizes = Sizes::read(reader, &HONOURED, &defaults)?;
    name_unlike(
        &mut sizes,
        reader,
        &[("attention_bias", false), ("mlp_bias", false)],
    )?;
    let blocks = sizes.blocks;
    // `null` means that no block has a window; what is not there means 4096.
    let default = windows::width(reader, Some(4096))?;
    let windowed = match default {
        Some(_) => windows::all_but_each(reader, blocks, "sliding_window_pattern", 4)?,
        None => windows::layer_types(reader, blocks)?.unwrap_or(vec![false; blocks]),
    };
    let has_rope = windowed
        .clone()
        .into_iter()
        .map(|windowed| windowed || default.is_none());
    let rotaries = Rotaries::one(reader, &sizes)?.only_where(has_rope);
    let relative = Relative {
        layout: Layout::AFTER,
        head_norms: norms_of_heads,
        ..Relative::new(windows::by_block(reader, windowed, default)?)
    };
    Ok(relative.model(reader, &sizes, rotaries))
}

#[cfg(test)]
mod tests {
    use crate::arch;

    /// Windows and whether there is RoPE, of four blocks.
    fn blocks(settings: &str) -> Vec<(Option<usize>, bool)> {
        let text = format!(
            r#"{{"model_type": "exaone4", "hidden_size": 64, "intermediate_size": 96,
                "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 64{settings}}}"#
        );
        let model = arch::read(&text, &[]).unwrap();
        (model.blocks.iter().flat_map(|block| block.attention()))
            .map(|attention| (attention.shape.window, attention.rotary.is_some()))
            .collect()
    }

    #[test]
    fn blocks_without_a_window_turn_only_where_no_block_has_one() {
        let (sliding, full) = ((Some(8), true), (None, false));
        let three_of_four = [sliding, sliding, sliding, full];
        assert_eq!(blocks(r#", "sliding_window": 8"#), three_of_four);
        let every_other = r#", "sliding_window": 8, "sliding_window_pattern": 2"#;
        assert_eq!(blocks(every_other), [sliding, full, sliding, full]);
        let letters = r#", "sliding_window": 8, "sliding_window_pattern": "LLLG", "layer_types":
            ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]"#;
        assert_eq!(blocks(letters), three_of_four);
        assert_eq!(
            blocks(""),
            [
                (Some(4096), true),
                (Some(4096), true),
                (Some(4096), true),
                full
            ]
        );
        let none = r#", "sliding_window": null, "sliding_window_pattern": 4"#;
        assert_eq!(blocks(none), [(None, true); 4]);
    }
}
