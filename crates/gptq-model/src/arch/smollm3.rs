//! SmolLM3 (`SmolLM3ForCausalLM`): Llama in which every fourth block has no RoPE.

use gptq_kernels::Pairing;

use super::parts::AttentionBias;
use super::relative::Relative;
use super::rotaries::Rotaries;
use super::sizes::Defaults;
use super::{Reader, Sizes, windows};
use crate::config::ConfigError;
use crate::config_keys::Honoured;
use crate::rope::Reads;
use crate::spec::ModelSpec;

const HONOURED: Honoured = Honoured::reads(&["no_rope_layer_interval", "no_rope_layers"]);

const DEFAULTS: Defaults = Defaults {
    tied: true,
    positions: 32_768,
    kv_heads: Some(4),
    ..Defaults::LLAMA
};

pub(super) fn read(reader: &Reader<'_>) -> Result<ModelSpec, ConfigError> {
    let fields = &reader.fields;
    let sizes = Sizes::read(reader, &HONOURED, &DEFAULTS)?;
    let has_rope = read_has_rope(reader, sizes.blocks)?;
    let reads = Reads {
        theta: 2_000_000.0,
        ..Reads::LLAMA
    };
    let rotaries = Rotaries::one_of(reader, &sizes, &reads, Pairing::Halves)?;
    // Where the file does not say which blocks have a window, those without RoPE.
    let is_on = fields.flag("use_sliding_window", false)?;
    let has_window = is_on && fields.optional_size("sliding_window")?.is_some();
    let windowed = match windows::layer_types(reader, sizes.blocks)? {
        Some(windowed) => {
            if !is_on {
                windows::refuse_switched_off(reader, Some(&windowed))?;
            }
            windowed
        }
        None => (has_rope.iter())
            .map(|has_rope| has_window && !has_rope)
            .collect(),
    };
    let relative = Relative {
        attention_bias: AttentionBias::all(fields.flag("attention_bias", false)?),
        mlp_bias: fields.flag("mlp_bias", false)?,
        ..Relative::new(windows::by_block(reader, windowed, None)?)
    };
    let rotaries = rotaries.only_where(has_rope.into_iter());
    Ok(relative.model(reader, &sizes, rotaries))
}

/// Whether each block has RoPE: `no_rope_layers` has a 1 where it does.
fn read_has_rope(reader: &Reader<'_>, blocks: usize) -> Result<Vec<bool>, ConfigError> {
    const LIST: &str = "no_rope_layers";
    const INTERVAL: &str = "no_rope_layer_interval";
    let Some(list) = reader.fields.list(LIST, blocks)? else {
        let interval = reader.fields.optional_size(INTERVAL)?.unwrap_or(4);
        return match interval {
            0 => Err(ConfigError::value(INTERVAL, 0, "at least 1")),
            n => Ok((1..=blocks).map(|count| count % n != 0).collect()),
        };
    };
    let has_rope = |value: &serde_json::Value| match value.as_u64() {
        Some(number) => Ok(number != 0),
        None => Err(ConfigError::value(LIST, value, "a list of 0 and 1")),
    };
    list.iter().map(has_rope).collect()
}

#[cfg(test)]
mod tests {
    use crate::arch;
    use crate::config::ConfigError;

    /// Windows and whether there is RoPE, of four blocks.
    fn blocks(settings: &str) -> Result<Vec<(Option<usize>, bool)>, ConfigError> {
        let text = format!(
            r#"{{"model_type": "smollm3", "hidden_size": 64, "intermediate_size": 96,
                "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 64{settings}}}"#
        );
        let model = arch::read(&text, &[])?;
        Ok((model.blocks.iter().flat_map(|block| block.attention()))
            .map(|attention| (attention.shape.window, attention.rotary.is_some()))
            .collect())
    }

    #[test]
    fn blocks_that_do_not_turn_may_have_a_window() {
        let (rope, no_rope) = ((None, true), (None, false));
        assert_eq!(blocks("").unwrap(), [rope, rope, rope, no_rope]);
        let every_other = r#", "no_rope_layer_interval": 2"#;
        assert_eq!(blocks(every_other).unwrap(), [rope, no_rope, rope, no_rope]);
        let windowed = r#", "no_rope_layers": [0, 1, 1, 1], "use_sliding_window": true,
            "sliding_window": 8"#;
        assert_eq!(
            blocks(windowed).unwrap(),
            [(Some(8), false), rope, rope, rope]
        );
        let unused = r#", "no_rope_layers": [0, 1, 1, 1], "sliding_window": 8"#;
        assert_eq!(blocks(unused).unwrap(), [no_rope, rope, rope, rope]);
        for refused in [
            r#", "no_rope_layers": [0, 1]"#,
            r#", "no_rope_layers": [0, 1, 1, "x"]"#,
            r#", "no_rope_layer_interval": 0"#,
        ] {
            let error = blocks(refused).unwrap_err().to_string();
            assert!(error.contains("no_rope_layer"), "{error}");
        }
    }
}
