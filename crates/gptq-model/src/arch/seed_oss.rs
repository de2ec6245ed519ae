//! Seed-OSS (`SeedOssForCausalLM`): Llama with biases on queries, keys and values, and a head width of
//! its own.

use super::parts::AttentionBias;
use super::relative::Relative;
use super::rotaries::Rotaries;
use super::sizes::Defaults;
use super::{Reader, Sizes, windows};
use crate::config::ConfigError;
use crate::config_keys::Honoured;
use crate::spec::ModelSpec;

const DEFAULTS: Defaults = Defaults {
    positions: 524_288,
    head_dim: Some(128),
    kv_heads: Some(8),
    ..Defaults::LLAMA
};

pub(super) fn read(reader: &Reader<'_>) -> Result<ModelSpec, ConfigError> {
    let fields = &reader.fields;
    let mut sizes = Sizes::read(reader, &Honoured::reads(&["attention_out_bias"]), &DEFAULTS)?;
    let relative = Relative {
        attention_bias: AttentionBias {
            input: fields.flag("attention_bias", true)?,
            output: fields.flag("attention_out_bias", false)?,
        },
        mlp_bias: fields.flag("mlp_bias", false)?,
        ..Relative::new(windows::nowhere(reader, &mut sizes)?)
    };
    Ok(relative.model(reader, &sizes, Rotaries::one(reader, &sizes)?))
}

#[cfg(test)]
mod tests {
    use crate::arch;

    #[test]
    fn biases_and_the_width_of_a_head_where_the_file_does_not_say() {
        let model = arch::read(
            r#"{"model_type": "seed_oss", "hidden_size": 64, "intermediate_size": 96,
                "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
                "vocab_size": 64}"#,
            &[],
        )
        .unwrap();
        let attention = &model.blocks[0].steps[0].branches[0];
        assert!(attention.input.iter().all(|linear| linear.bias));
        assert!(!attention.output.bias);
        assert_eq!(attention.output.in_features, 4 * 128);
    }
}
