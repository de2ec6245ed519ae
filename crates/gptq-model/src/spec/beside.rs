//! What lies beside the decoder of a multimodal checkpoint: parts that are carried along, and what looks
//! like the text model's.
//!
//! A carried tensor is copied unread. One of the text model that the spec does not name (a second lm_head,
//! the bias of one, a norm under another prefix) would change what readers compute, who do read it. So
//! what is carried belongs to a part with a name of its own, and nothing in its path is the text model's.

/// What the names of other parts hold: towers, what joins them to the text, blocks that predict further
/// tokens. A part with one of these may have layers, norms and heads of its own.
const OTHER_PARTS: [&str; 27] = [
    "vision",
    "visual",
    "vit",
    "image",
    "img",
    "pixel",
    "patch",
    "video",
    "audio",
    "speech",
    "sound",
    "acoustic",
    "tower",
    "encoder",
    "qformer",
    "project",
    "merger",
    "merging",
    "connector",
    "adapter",
    "aligner",
    "resampler",
    "perceiver",
    "multi_modal",
    "multimodal",
    "mtp",
    "nextn",
];

/// Modules of a text model, by the beginning of their names.
const OF_TEXT: [&str; 6] = [
    "lm_head",
    "embed_tokens",
    "embed_out",
    "norm",
    "layers",
    "rotary_emb",
];

/// What some models have before all parts.
const ROOT: &str = "model.";

/// Whether a tensor that is not the decoder's belongs to another part of the model. `decoder` stands before
/// the names of the decoder's tensors: `model.language_model.`.
pub(super) fn is_of_another_part(name: &str, decoder: &str) -> bool {
    if name.starts_with(decoder) {
        return false;
    }
    // The module that holds the decoder may hold its head, and other parts beside it.
    let mut around = (decoder.rmatch_indices('.')).map(|(at, _)| &decoder[..=at]);
    let holder = around.find(|around| name.starts_with(around));
    let path = &name[holder.map_or(0, str::len)..];
    let path = path.strip_prefix(ROOT).unwrap_or(path);
    let mut modules = path.split('.');
    let part = modules.next().unwrap_or_default().to_lowercase();
    let is_text = |module: &str| OF_TEXT.iter().any(|text| module.starts_with(text));
    if is_text(&part) {
        return false;
    }
    if OTHER_PARTS.iter().any(|word| part.contains(word)) {
        return true;
    }
    let in_the_text_model = holder.is_some_and(|holder| holder != ROOT);
    let is_its_name = decoder.split('.').any(|module| module == part);
    !in_the_text_model && !is_its_name && !modules.any(is_text)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PREFIXES: [&str; 4] = [
        "model.language_model.",
        "language_model.model.",
        "language_model.",
        "thinker.model.",
    ];

    #[test]
    fn parts_with_a_name_of_their_own_are_carried() {
        for decoder in PREFIXES {
            for name in [
                "model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.bias",
                "vision_tower.transformer.layers.0.attention_norm.weight",
                "model.visual.blocks.0.norm1.weight",
                "visual.merger.linear_fc1.weight",
                "model.audio_tower.layers.0.norm_out.weight",
                "model.embed_vision.embedding_projection.weight",
                "model.embed_audio.embedding.weight",
                "multi_modal_projector.linear_1.weight",
                "model.multi_modal_projector.norm.weight",
                "mtp.layers.0.self_attn.q_proj.weight",
                "mtp.norm.weight",
                "model.image_newline",
                "mlp1.0.weight",
                "speech_encoder.layers.0.norm.weight",
                "encoder.layers.0.attn.norm.weight",
            ] {
                assert!(is_of_another_part(name, decoder), "{decoder} {name}");
            }
        }
        assert!(is_of_another_part(
            "thinker.visual.blocks.0.norm.weight",
            "thinker.model."
        ));
    }

    /// All were copied unread: a reader with that head, bias or norm computes something else.
    #[test]
    fn what_looks_like_the_text_models_is_not() {
        for decoder in PREFIXES {
            for name in [
                "lm_head.weight",
                "lm_head.bias",
                "lm_head_2.weight",
                "model.lm_head.weight",
                "language_model.lm_head.bias",
                "model.language_model.lm_head.bias",
                "norm.weight",
                "model.norm.weight",
                "embed_tokens.weight",
                "model.embed_tokens.weight",
                "layers.0.self_attn.q_proj.bias",
                "model.layers.7.mlp.up_proj.weight",
                "text_model.layers.0.mlp.up_proj.weight",
                "model.text_model.final.norm.weight",
                "other.model.lm_head.weight",
            ] {
                assert!(!is_of_another_part(name, decoder), "{decoder} {name}");
            }
            assert!(!is_of_another_part(&format!("{decoder}new.bias"), decoder));
        }
        let extra = [
            "language_model.extra.bias",
            "model.language_model.extra.bias",
        ];
        for decoder in ["model.language_model.", "language_model.model."] {
            assert!(extra.iter().all(|name| !is_of_another_part(name, decoder)));
        }
    }
}
