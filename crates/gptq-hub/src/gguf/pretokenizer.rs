//! How each family of byte-level BPE tokenizers cuts text before merging, as its own
//! `tokenizer.json` says it. A GGUF file names the family in `tokenizer.ggml.pre` and nothing more.

use serde_json::{Value as Json, json};

/// Llama 3's and, with single digits, Qwen 2's way of cutting: contractions, words, numbers, runs of
/// other signs, line ends, spaces.
const CUT_LLAMA3: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const CUT_QWEN2: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

/// The parts of a `tokenizer.json` around the vocabulary.
#[derive(Debug)]
pub(crate) struct Family {
    pub normalizer: Json,
    pub pre_tokenizer: Json,
    /// Applied before BOS and EOS are added; `null` for none.
    pub post_processor: Json,
    pub decoder: Json,
    /// Whether a word that is a token as a whole is taken without merging.
    pub ignore_merges: bool,
    /// What llama.cpp does when the file does not say.
    pub adds_bos: bool,
}

/// The family that `tokenizer.ggml.pre` names; `add_prefix_space` puts a space before the text.
pub(crate) fn family(pre: &str, add_prefix_space: bool) -> Option<Family> {
    Some(match pre {
        "smollm" => Family {
            pre_tokenizer: sequence(&[
                json!({"type": "Digits", "individual_digits": true}),
                byte_level(add_prefix_space, true, true),
            ]),
            ..gpt2(add_prefix_space, Json::Null)
        },
        "gpt-2" | "default" => gpt2(add_prefix_space, byte_level(true, false, true)),
        "llama-bpe" | "llama3" | "llama-v3" => Family {
            pre_tokenizer: cut_then_bytes(CUT_LLAMA3, byte_level(add_prefix_space, true, false)),
            ignore_merges: true,
            adds_bos: true,
            ..gpt2(add_prefix_space, byte_level(true, false, true))
        },
        "qwen2" => Family {
            normalizer: json!({"type": "NFC"}),
            pre_tokenizer: cut_then_bytes(CUT_QWEN2, byte_level(add_prefix_space, false, false)),
            decoder: byte_level(false, false, false),
            ..gpt2(add_prefix_space, byte_level(false, false, false))
        },
        _ => return None,
    })
}

fn gpt2(add_prefix_space: bool, post_processor: Json) -> Family {
    Family {
        normalizer: Json::Null,
        pre_tokenizer: byte_level(add_prefix_space, true, true),
        post_processor,
        decoder: byte_level(true, true, true),
        ignore_merges: false,
        adds_bos: false,
    }
}

fn byte_level(add_prefix_space: bool, trim_offsets: bool, use_regex: bool) -> Json {
    json!({
        "type": "ByteLevel",
        "add_prefix_space": add_prefix_space,
        "trim_offsets": trim_offsets,
        "use_regex": use_regex,
    })
}

fn sequence(parts: &[Json]) -> Json {
    json!({"type": "Sequence", "pretokenizers": parts})
}

fn cut_then_bytes(regex: &str, bytes: Json) -> Json {
    let split = json!({
        "type": "Split",
        "pattern": {"Regex": regex},
        "behavior": "Isolated",
        "invert": false,
    });
    sequence(&[split, bytes])
}
