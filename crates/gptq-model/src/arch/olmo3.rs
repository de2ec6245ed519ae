//! OLMo 3 (`Olmo3ForCausalLM`, arXiv:2512.13961): OLMo 2 with a window in three of four blocks, which
//! keep their rotary frequencies where those of the others are scaled.

use super::olmo2::{DEFAULTS, relative};
use super::relative::name_unlike;
use super::rotaries::Rotaries;
use super::{Reader, Sizes, windows};
use crate::config::ConfigError;
use crate::config_keys::Honoured;
use crate::rope::{self, Reads};
use crate::spec::ModelSpec;

/// The base of both kinds of blocks where the file does not say.
const READS: Reads = Reads {
    theta: 500_000.0,
    ..Reads::LLAMA
};

pub(super) fn read(reader: &Reader<'_>) -> Result<ModelSpec, ConfigError> {
    let fields = &reader.fields;
    let mut sizes = Sizes::read(reader, &Honoured::NOTHING, &DEFAULTS)?;
    name_unlike(&mut sizes, reader, &[("mlp_bias", false)])?;
    let windowed = windows::all_but_each(reader, sizes.blocks, "sliding_window_pattern", 4)?;
    let windows = windows::by_block(reader, windowed, Some(4096))?;
    let kinds = rope::read_kinds(fields, sizes.positions, [&READS; 2], None)?;
    // Readers of the older spelling differ in whether this base holds for the blocks with a window.
    if let Some(theta) = fields.optional_number("rope_theta")?
        && theta != kinds.sliding.theta
    {
        let expected = "500000, or a base for each kind of layer in rope_parameters";
        return Err(ConfigError::unsupported("rope_theta", theta, expected));
    }
    let rotaries = Rotaries::by_kind(kinds, [sizes.head_dim; 2], &windows);
    Ok(relative(reader, windows)?.model(reader, &sizes, rotaries))
}

#[cfg(test)]
mod tests {
    use crate::arch;
    use crate::rope::RopeScaling;

    const SIZES: &str = r#""model_type": "olmo3", "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 64"#;

    #[test]
    fn the_older_spelling_scales_blocks_without_a_window_only() {
        let yarn = r#""rope_scaling": {"rope_type": "yarn", "factor": 8.0,
            "original_max_position_embeddings": 8192}"#;
        let text = format!(r#"{{{SIZES}, "rope_theta": 500000, {yarn}}}"#);
        let model = arch::read(&text, &[]).unwrap();
        assert_eq!(model.rotaries[0].scaling, RopeScaling::None);
        assert!(matches!(
            model.rotaries[1].scaling,
            RopeScaling::Yarn { .. }
        ));
        let windows: Vec<_> = (model.blocks.iter().flat_map(|block| block.attention()))
            .map(|attention| attention.shape.window)
            .collect();
        assert_eq!(windows, [Some(4096), Some(4096), Some(4096), None]);
    }

    #[test]
    fn a_base_that_readers_take_differently_is_refused() {
        let text = format!(r#"{{{SIZES}, "rope_theta": 10000}}"#);
        let error = arch::read(&text, &[]).unwrap_err().to_string();
        assert!(error.contains("rope_theta"), "{error}");
    }
}
