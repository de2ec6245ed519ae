//! Granite 3 (`GraniteForCausalLM`): Llama with factors on embeddings, scores, what a step adds, and
//! logits.

use super::parts::AttentionBias;
use super::relative::Relative;
use super::rotaries::Rotaries;
use super::sizes::{Defaults, factor};
use super::{Reader, Sizes, windows};
use crate::config::ConfigError;
use crate::config_keys::Honoured;
use crate::spec::ModelSpec;

const HONOURED: Honoured = Honoured::reads(&[
    "attention_multiplier",
    "embedding_multiplier",
    "logits_scaling",
    "residual_multiplier",
]);

pub(super) fn read(reader: &Reader<'_>) -> Result<ModelSpec, ConfigError> {
    let fields = &reader.fields;
    let mut sizes = Sizes::read(reader, &HONOURED, &Defaults::LLAMA)?;
    let relative = Relative {
        attention_bias: AttentionBias::all(fields.flag("attention_bias", false)?),
        mlp_bias: fields.flag("mlp_bias", false)?,
        scale: Some(factor(fields, "attention_multiplier", 1.0)?),
        residual_factor: factor(fields, "residual_multiplier", 1.0)?,
        ..Relative::new(windows::nowhere(reader, &mut sizes)?)
    };
    let mut model = relative.model(reader, &sizes, Rotaries::one(reader, &sizes)?);
    model.embedding.factor = factor(fields, "embedding_multiplier", 1.0)?;
    model.head.factor = 1.0 / factor(fields, "logits_scaling", 1.0)?;
    Ok(model)
}

#[cfg(test)]
mod tests {
    use crate::arch;

    #[test]
    fn logits_are_divided_and_all_else_is_multiplied() {
        let model = arch::read(
            r#"{"model_type": "granite", "hidden_size": 64, "intermediate_size": 96,
                "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64,
                "embedding_multiplier": 12.0, "attention_multiplier": 0.25, "logits_scaling": 8.0,
                "residual_multiplier": 0.5}"#,
            &[],
        )
        .unwrap();
        assert_eq!((model.embedding.factor, model.head.factor), (12.0, 0.125));
        let block = &model.blocks[0];
        assert!(block.steps.iter().all(|step| step.residual_factor == 0.5));
        assert!(
            block
                .attention()
                .all(|attention| attention.shape.scale == 0.25)
        );
    }
}
