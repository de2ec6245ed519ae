//! Companions: small files that accompany a model's weights into and out of the hub's cache.

/// Tokenizer, templates, settings of generation, and of what turns images and sound into input.
const NAMES: [&str; 15] = [
    "added_tokens.json",
    "audio_tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tekken.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
];

/// Beginnings of names of files that a licence requires to keep with the model, in upper case.
const TERMS: [&str; 5] = ["LICENSE", "LICENCE", "NOTICE", "COPYING", "USE_POLICY"];
const TERM_ENDS: [&str; 3] = ["TXT", "MD", "PDF"];

/// Whether a file of this name, directly in a model folder, accompanies the model: tokenizer, chat
/// template, processors, generation settings, licence, notice and use policy.
///
/// ```
/// assert!(gptq_hub::is_companion("USE_POLICY.md") && gptq_hub::is_companion("merges.txt"));
/// assert!(!gptq_hub::is_companion("config.json"));
/// ```
pub fn is_companion(name: &str) -> bool {
    NAMES.contains(&name) || is_terms(name)
}

/// `LICENSE-MIT`, `LICENSE.txt`, but no `LICENSE.safetensors`.
fn is_terms(name: &str) -> bool {
    let name = name.to_ascii_uppercase();
    let (stem, end) = name.rsplit_once('.').unwrap_or((&name, "TXT"));
    let start = stem.split('-').next().unwrap_or(stem);
    TERMS.contains(&start) && TERM_ENDS.contains(&end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processors_travel() {
        // without them a quantized multimodal model once took no images
        for name in [
            "audio_tokenizer_config.json",
            "chat_template.jinja",
            "chat_template.json",
            "preprocessor_config.json",
            "processor_config.json",
            "tekken.json",
            "video_preprocessor_config.json",
        ] {
            assert!(is_companion(name), "{name}");
        }
        // beside config.json they would make another format of the same folder
        for name in ["params.json", "consolidated.safetensors", "modeling_x.py"] {
            assert!(!is_companion(name), "{name}");
        }
    }

    #[test]
    fn terms_travel_whatever_their_ending() {
        // `NOTICE` and `USE_POLICY.md`, which Llama's licence asks to keep, were once left behind
        for name in [
            "LICENSE",
            "LICENSE.txt",
            "LICENSE-MIT",
            "license.md",
            "NOTICE",
            "Notice.txt",
            "USE_POLICY.md",
            "tokenizer.model",
            "added_tokens.json",
        ] {
            assert!(is_companion(name), "{name}");
        }
        for name in [
            "config.json",
            "LICENSES.zip",
            "LICENSE.safetensors",
            "NOTICE.bin",
            "model.safetensors",
            "notices",
        ] {
            assert!(!is_companion(name), "{name}");
        }
    }
}
