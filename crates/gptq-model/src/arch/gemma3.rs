//! Gemma 3 (`Gemma3ForCausalLM`, and the text model of `Gemma3ForConditionalGeneration`,
//! arXiv:2503.19786): Gemma 2 with norms of every query and key head instead of a cap on scores, and
//! another rotary base in the blocks with a window, five of six.

use super::gemma::{GEMMA, with_scaled_embedding};
use super::gemma2::scale;
use super::parts::{AttentionBias, norms_of_heads};
use super::relative::{Layout, Relative};
use super::rotaries::Rotaries;
use super::sizes::{Defaults, cap};
use super::{Reader, Sizes, windows};
use crate::config::ConfigError;
use crate::config_keys::Honoured;
use crate::rope::{self, Reads};
use crate::spec::ModelSpec;

const HONOURED: Honoured = Honoured::reads(&[
    "_sliding_window_pattern",
    "final_logit_softcapping",
    "hidden_activation",
    "query_pre_attn_scalar",
    "rope_local_base_freq",
    "sliding_window_pattern",
]);

/// The published files of the multimodal models leave out heads and vocabulary.
const DEFAULTS: Defaults = Defaults {
    positions: 131_072,
    kv_heads: Some(4),
    heads_and_vocab: Some((8, 262_208)),
    ..GEMMA
};

pub(super) fn read(reader: &Reader<'_>) -> Result<ModelSpec, ConfigError> {
    let sizes = Sizes::read(reader, &HONOURED, &DEFAULTS)?;
    let windowed = windows::all_but_each(reader, sizes.blocks, "sliding_window_pattern", 6)?;
    let windows = windows::by_block(reader, windowed, Some(4096))?;
    let reads = [10_000.0, 1_000_000.0].map(|theta| Reads {
        theta,
        ..Reads::LLAMA
    });
    let local = Some("rope_local_base_freq");
    let kinds = rope::read_kinds(&reader.fields, sizes.positions, reads.each_ref(), local)?;
    let rotaries = Rotaries::by_kind(kinds, [sizes.head_dim; 2], &windows);
    let relative = Relative {
        layout: Layout::AROUND,
        attention_bias: AttentionBias::all(reader.fields.flag("attention_bias", false)?),
        head_norms: norms_of_heads,
        scale: Some(scale(reader)?),
        ..Relative::new(windows)
    };
    let mut model = relative.model(reader, &sizes, rotaries);
    model.head.soft_cap = cap(&reader.fields, "final_logit_softcapping", None)?;
    Ok(with_scaled_embedding(model))
}

#[cfg(test)]
mod tests {
    use crate::arch;
    use crate::rope::RopeScaling;

    /// The text block of a published multimodal checkpoint, which leaves out what the class has anyway.
    #[test]
    fn the_older_spelling_has_two_rotary_tables_and_a_pattern() {
        let model = arch::read(
            r#"{"model_type": "gemma3", "text_config": {"model_type": "gemma3_text",
                "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 8,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
                "rope_local_base_freq": 20000.0, "rope_theta": 500000.0,
                "sliding_window_pattern": 4}}"#,
            &[],
        )
        .unwrap();
        let bases: Vec<f64> = model.rotaries.iter().map(|table| table.theta).collect();
        assert_eq!(bases, [20_000.0, 500_000.0]);
        assert_eq!(model.rotaries[0].scaling, RopeScaling::None);
        assert_eq!(
            model.rotaries[1].scaling,
            RopeScaling::Linear { factor: 8.0 }
        );
        let attention: Vec<_> = (model.blocks.iter().flat_map(|block| block.attention()))
            .map(|attention| (attention.shape.window, attention.rotary))
            .collect();
        let (sliding, full) = ((Some(1024), Some(0)), (None, Some(1)));
        assert_eq!(attention[..4], [sliding, sliding, sliding, full]);
        assert_eq!(attention[4..], attention[..4]);
        assert_eq!((model.vocab_size, model.head.tied), (262_208, true));
    }
}
