//! Pre-tokenizers of byte-level BPE families, taken from their own `tokenizer.json`. A GGUF file only
//! names the family, in `tokenizer.ggml.pre`.

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

/// The split of GPT-4o: words end where a lower-case letter is followed by a capital, and keep their
/// contractions.
const CUT_O200K: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}|",
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

/// Mistral's Tekken: words end where a small letter is followed by a capital, single digits.
const CUT_TEKKEN: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}|",
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
/// Chinese, Japanese kana, Korean and what lies between them.
const EAST_ASIAN: &str = r"[\x{4E00}-\x{9FA5}\x{0800}-\x{4E00}\x{AC00}-\x{D7FF}]+";
/// DeepSeek LLM's way, one cut after the other: line ends, words of scripts with capitals, signs,
/// spaces at the end, East Asian scripts, numbers.
const CUT_DEEPSEEK_LLM: [&str; 6] = [
    r"[\r\n]",
    CASED_WORD,
    r"\s?[!-/:-~\x{FF01}-\x{FF0F}\x{FF1A}-\x{FF5E}\x{2018}-\x{201F}\x{3000}-\x{3002}]+",
    r"\s+$",
    EAST_ASIAN,
    r"\p{N}+",
];
/// DeepSeek Coder's: line ends, words, signs, East Asian scripts, single digits.
const CUT_DEEPSEEK_CODER: [&str; 5] = [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", EAST_ASIAN, r"\p{N}"];
/// The letters with capitals of the Unicode version that DeepSeek LLM was made with; the classes of
/// a regex of today have more.
const CASED_WORD: &str = concat!(
    r"\s?[",
    r"\x{41}-\x{5A}\x{61}-\x{7A}\x{B5}\x{C0}-\x{D6}\x{D8}-\x{F6}\x{F8}-\x{1BA}",
    r"\x{1BC}-\x{1BF}\x{1C4}-\x{293}\x{295}-\x{2AF}\x{370}-\x{373}\x{376}\x{377}",
    r"\x{37B}-\x{37D}\x{37F}\x{386}\x{388}-\x{38A}\x{38C}\x{38E}-\x{3A1}\x{3A3}-\x{3F5}",
    r"\x{3F7}-\x{481}\x{48A}-\x{52F}\x{531}-\x{556}\x{10A0}-\x{10C5}\x{13A0}-\x{13F5}",
    r"\x{13F8}-\x{13FD}\x{1C90}-\x{1CBA}\x{1CBD}-\x{1CBF}\x{1D00}-\x{1D2B}\x{1D6B}-\x{1D77}",
    r"\x{1D79}-\x{1D9A}\x{1E00}-\x{1F15}\x{1F18}-\x{1F1D}\x{1F20}-\x{1F45}\x{1F48}-\x{1F4D}",
    r"\x{1F50}-\x{1F57}\x{1F59}\x{1F5B}\x{1F5D}\x{1F5F}-\x{1F7D}\x{1F80}-\x{1FB4}",
    r"\x{1FB6}-\x{1FBC}\x{1FBE}\x{1FC2}-\x{1FC4}\x{1FC6}-\x{1FCC}\x{1FD0}-\x{1FD3}",
    r"\x{1FD6}-\x{1FDB}\x{1FE0}-\x{1FEC}\x{1FF2}-\x{1FF4}\x{1FF6}-\x{1FFC}\x{2102}\x{2107}",
    r"\x{210A}-\x{2113}\x{2115}\x{2119}-\x{211D}\x{2124}\x{2126}\x{2128}\x{212A}-\x{212D}",
    r"\x{212F}-\x{2134}\x{2139}\x{213C}-\x{213F}\x{2145}-\x{2149}\x{214E}\x{2183}\x{2184}",
    r"\x{2C00}-\x{2C7B}\x{2C7E}-\x{2CE4}\x{2CEB}-\x{2CEE}\x{2CF2}\x{2CF3}\x{A640}-\x{A66D}",
    r"\x{A680}-\x{A69B}\x{A722}-\x{A76F}\x{A771}-\x{A787}\x{A78B}-\x{A78E}\x{AB70}-\x{ABBF}",
    r"\x{FB00}-\x{FB06}\x{FB13}-\x{FB17}\x{FF21}-\x{FF3A}\x{FF41}-\x{FF5A}",
    r"\x{10400}-\x{1044F}\x{104B0}-\x{104D3}\x{104D8}-\x{104FB}\x{10C80}-\x{10CB2}",
    r"\x{10CC0}-\x{10CF2}\x{118A0}-\x{118DF}\x{1E900}-\x{1E943}",
    r"]+"
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
    /// The default of llama.cpp for files without the key.
    pub adds_bos: bool,
}

/// The names that [`family`] knows, for an error.
pub(crate) const FAMILIES: &str = "`smollm`, `gpt-2`, `default`, `llama-bpe`, `smaug-bpe`, \
    `falcon3`, `dbrx`, `glm4`, `chatglm-bpe`, `gpt-4o`, `qwen2`, `deepseek-r1-qwen`, `tekken`, \
    `deepseek-llm`, `deepseek-coder`";

/// The family that `tokenizer.ggml.pre` names; `add_prefix_space` puts a space before the text.
pub(crate) fn family(pre: &str, add_prefix_space: bool) -> Option<Family> {
    Some(match pre {
        "smollm" => Family {
            pre_tokenizer: sequence(vec![
                json!({"type": "Digits", "individual_digits": true}),
                byte_level(add_prefix_space, true, true),
            ]),
            ..gpt2(add_prefix_space, Json::Null)
        },
        "gpt-2" | "default" => gpt2(add_prefix_space, byte_level(true, false, true)),
        "llama-bpe" | "llama3" | "llama-v3" | "falcon3" | "pixtral" => {
            begun(cut(&[CUT_LLAMA3], add_prefix_space))
        }
        // Llama 3's vocabulary from before it took whole words first; GPT-4's, which Phi-4 has; that
        // of GLM-4, whose template begins the text
        "smaug-bpe" | "dbrx" | "glm4" | "chatglm-bpe" => cut(&[CUT_LLAMA3], add_prefix_space),
        // Phi-4-mini's
        "gpt-4o" => cut(&[CUT_O200K], add_prefix_space),
        "tekken" => begun(cut(&[CUT_TEKKEN], add_prefix_space)),
        "deepseek-llm" => cut(&CUT_DEEPSEEK_LLM, add_prefix_space),
        "deepseek-coder" => cut(&CUT_DEEPSEEK_CODER, add_prefix_space),
        "qwen2" => Family {
            normalizer: json!({"type": "NFC"}),
            ..qwen2(add_prefix_space)
        },
        // the same cuts in a tokenizer that leaves the text as it is
        "deepseek-r1-qwen" => qwen2(add_prefix_space),
        _ => return None,
    })
}

fn qwen2(add_prefix_space: bool) -> Family {
    let bytes = byte_level(add_prefix_space, false, false);
    Family {
        pre_tokenizer: cuts_then_bytes(&[CUT_QWEN2], bytes),
        decoder: byte_level(false, false, false),
        ..gpt2(add_prefix_space, byte_level(false, false, false))
    }
}

/// Cut by these rules one after the other.
fn cut(rules: &[&str], add_prefix_space: bool) -> Family {
    let bytes = byte_level(add_prefix_space, true, false);
    Family {
        pre_tokenizer: cuts_then_bytes(rules, bytes),
        ..gpt2(add_prefix_space, byte_level(true, false, true))
    }
}

/// With BOS first, and whole words that are tokens taken as they are.
fn begun(family: Family) -> Family {
    Family {
        ignore_merges: true,
        adds_bos: true,
        ..family
    }
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

fn sequence(parts: Vec<Json>) -> Json {
    json!({"type": "Sequence", "pretokenizers": parts})
}

fn cuts_then_bytes(rules: &[&str], bytes: Json) -> Json {
    let split = |rule: &&str| {
        json!({
            "type": "Split",
            "pattern": {"Regex": rule},
            "behavior": "Isolated",
            "invert": false,
        })
    };
    sequence(rules.iter().map(split).chain([bytes]).collect())
}
