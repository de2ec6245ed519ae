//! What the `config.json` of a multimodal checkpoint says of its text model outside of `text_config`.
//!
//! Of the outer keys transformers 5 reads `tie_word_embeddings` alone. Others stand there in files that
//! were made by other programs, or edited, and then programs differ in which of two they take: an outer
//! key has to say what the text model does anyway.

use gptq_types::outside_name::shown;
use serde_json::Value;

use super::{Read, Reader};
use crate::config::{ConfigError, Fields};
use crate::config_keys::is_harmless;
use crate::spec::ModelSpec;

/// Of a key and of values, in an error.
const SHOWN_CHARACTERS: usize = 80;

/// Refuses an outer key that would make another text model than `spec`, were it read.
pub(super) fn check(reader: &Reader<'_>, read: Read, spec: &ModelSpec) -> Result<(), ConfigError> {
    let (Some(outer), Some(inner)) = (reader.outer, reader.fields.0.as_object()) else {
        return Ok(());
    };
    let keys: Vec<(&String, &Value)> = (outer.0.as_object().into_iter().flatten())
        .filter(|(key, value)| {
            let says_nothing = value.is_null() || inner.get(*key) == Some(*value);
            !says_nothing && !is_of_the_whole(key) && !is_harmless(key)
        })
        .collect();
    // Whether the first `count` of them, read instead of those inside, make another model.
    let changes = |count: usize| {
        let mut with = inner.clone();
        with.extend((keys[..count].iter()).map(|&(key, value)| (key.clone(), value.clone())));
        let other = read(&Reader {
            fields: Fields(&Value::Object(with)),
            outer: reader.outer,
            paths: reader.paths.clone(),
        });
        !other.is_ok_and(|other| is_same(other, spec))
    };
    if !changes(keys.len()) {
        return Ok(());
    }
    // By halves, since a file may hold any number of keys.
    let (mut same, mut other) = (0, keys.len());
    while other - same > 1 {
        let middle = same + (other - same) / 2;
        match changes(middle) {
            true => other = middle,
            false => same = middle,
        }
    }
    let (key, value) = keys[other - 1];
    let show = |value: &Value| shown(&value.to_string(), SHOWN_CHARACTERS);
    Err(ConfigError::Outside {
        key: shown(key, SHOWN_CHARACTERS),
        outer: show(value),
        inner: inner.get(key).map_or("nothing".to_string(), show),
    })
}

/// Keys that say which models there are; the descriptions of the other ones are theirs.
fn is_of_the_whole(key: &str) -> bool {
    key == "model_type" || key == "quantization_config" || key.ends_with("_config")
}

/// Keys that nobody knows are told of those of the text model alone.
fn is_same(mut other: ModelSpec, spec: &ModelSpec) -> bool {
    other.unread_keys.clone_from(&spec.unread_keys);
    other.multimodal = spec.multimodal;
    other == *spec
}

#[cfg(test)]
mod tests {
    use crate::arch;

    const INNER: &str = r#""model_type": "gemma3_text", "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 2, "sliding_window": 16, "rope_theta": 1000000.0, "vocab_size": 512"#;

    fn read(inner: &str, outer: &str) -> Result<bool, String> {
        let text = format!(
            r#"{{"model_type": "gemma3", "vision_config": {{"hidden_size": 8, "num_hidden_layers": 1}},
                "text_config": {{{INNER}{inner}}}{outer}}}"#
        );
        let model = arch::read(&text, &[]);
        model.map(|model| model.head.tied).map_err(|error| {
            assert!(error.is_unsupported(), "{error}");
            error.to_string()
        })
    }

    /// All of these were passed over, or the inner of two was taken without a word.
    #[test]
    fn an_outer_key_that_would_change_the_text_model_is_refused_by_name() {
        for (inner, outer, named) in [
            (
                r#", "tie_word_embeddings": true"#,
                r#", "tie_word_embeddings": false"#,
                "`tie_word_embeddings` = false outside of text_config, and true inside",
            ),
            (
                "",
                r#", "final_logit_softcapping": 30.0"#,
                "final_logit_softcapping",
            ),
            ("", r#", "rope_theta": 10000.0"#, "1000000.0 inside"),
            (
                "",
                r#", "rope_scaling": {"rope_type": "linear", "factor": 8.0}"#,
                "rope_scaling",
            ),
            ("", r#", "sliding_window": 8"#, "sliding_window"),
            ("", r#", "num_experts": 8"#, "num_experts"),
            ("", r#", "vocab_size": 500"#, "vocab_size"),
            ("", r#", "rms_norm_eps": "x""#, "rms_norm_eps"),
        ] {
            let error = read(inner, outer).unwrap_err();
            assert!(error.contains(named), "{error}");
        }
    }

    #[test]
    fn an_outer_key_that_says_the_same_or_speaks_of_other_parts_is_accepted() {
        for outer in [
            "",
            r#", "vocab_size": 512, "rope_theta": 1000000, "tie_word_embeddings": true"#,
            r#", "hidden_size": 64, "final_logit_softcapping": null, "head_dim": 256"#,
            r#", "mm_tokens_per_image": 256, "image_token_index": 5, "dtype": "bfloat16",
               "initializer_range": 0.5, "audio_config": {"hidden_size": 3}"#,
        ] {
            assert_eq!(read("", outer), Ok(true), "{outer}");
        }
        // transformers reads this one from outside
        assert_eq!(read("", r#", "tie_word_embeddings": false"#), Ok(false));
    }
}
