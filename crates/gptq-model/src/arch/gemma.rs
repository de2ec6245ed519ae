//! Gemma (`GemmaForCausalLM`, arXiv:2403.08295): embeddings times the root of their width, norms that
//! store the difference of their weight from 1, a head that is the embedding.

use super::parts::AttentionBias;
use super::relative::Relative;
use super::rotaries::Rotaries;
use super::sizes::{Defaults, NormStyle};
use super::{Reader, Sizes, windows};
use crate::config::ConfigError;
use crate::config_keys::Honoured;
use crate::spec::{ModelSpec, NormKind};

/// Defaults that Gemma 1 to 4 share.
pub(super) const GEMMA: Defaults = Defaults {
    activation: ("hidden_activation", "gelu_pytorch_tanh"),
    tied: true,
    positions: 8192,
    head_dim: Some(256),
    norm: NormStyle {
        kind: NormKind::Rms,
        offset: 1.0,
        bias: false,
    },
    ..Defaults::LLAMA
};

pub(super) fn read(reader: &Reader<'_>) -> Result<ModelSpec, ConfigError> {
    // The first files have `gelu` in `hidden_act`, which readers take for different functions.
    let defaults = Defaults {
        activation: ("hidden_act", "gelu_pytorch_tanh"),
        kv_heads: Some(16),
        ..GEMMA
    };
    reader.text_is("hidden_activation", &["gelu_pytorch_tanh"])?;
    let mut sizes = Sizes::read(reader, &Honoured::reads(&["hidden_activation"]), &defaults)?;
    let relative = Relative {
        attention_bias: AttentionBias::all(reader.fields.flag("attention_bias", false)?),
        ..Relative::new(windows::nowhere(reader, &mut sizes)?)
    };
    let model = relative.model(reader, &sizes, Rotaries::one(reader, &sizes)?);
    Ok(with_scaled_embedding(model))
}

/// Gemma scales its embeddings, and its texts begin with BOS.
pub(super) fn with_scaled_embedding(mut model: ModelSpec) -> ModelSpec {
    model.embedding.factor = (model.hidden_size as f64).sqrt() as f32;
    model.embedding.rounds_factor = true;
    model.begins_with_bos = true;
    model.overflows_f16 = true;
    model
}

#[cfg(test)]
mod tests {
    use gptq_types::Dtype;

    use crate::arch;

    /// The root of 2560 is 50.596: transformers rounds it with the embedding, and here it stayed f32.
    #[test]
    fn the_factor_is_rounded_to_the_type_that_the_model_runs_in() {
        let read = |more: &str| {
            let text = format!(
                r#"{{"hidden_size": 2560, "intermediate_size": 64, "num_hidden_layers": 1,
                    "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 64, {more}}}"#
            );
            arch::read(&text, &[]).unwrap()
        };
        let factors = |more: &str, dtype| {
            let embedding = read(more).computed_in(dtype).embedding;
            let rows = embedding.per_block.map(|inputs| inputs.row_factor);
            (embedding.factor, rows)
        };
        for family in ["gemma", "gemma2", "gemma3_text"] {
            let family = format!(r#""model_type": "{family}""#);
            assert_eq!(factors(&family, Dtype::BF16), (50.5, None));
            assert_eq!(factors(&family, Dtype::F16), (50.59375, None));
            assert_eq!(factors(&family, Dtype::F32), (2560f32.sqrt(), None));
        }
        let gemma4 = r#""model_type": "gemma4_text", "hidden_size_per_layer_input": 300"#;
        assert_eq!(factors(gemma4, Dtype::BF16), (50.5, Some(17.375)));
        assert_eq!(factors(gemma4, Dtype::F32).1, Some(300f32.sqrt()));
        // That of Granite is a number of the program, which multiplies in f32.
        let granite = r#""model_type": "granite", "embedding_multiplier": 12.01"#;
        assert_eq!(factors(granite, Dtype::BF16), (12.01, None));
    }
}
