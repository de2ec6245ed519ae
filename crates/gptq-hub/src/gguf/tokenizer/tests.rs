use super::*;
use crate::gguf::Value;
use crate::gguf::fixture::{GgufBuilder, strings, text};
use crate::gguf::vocabulary::{SCORES, TYPES};
use tokenizers::Tokenizer;

fn kinds(values: &[i32]) -> Value {
    Value::Array(values.iter().map(|&v| Value::I32(v)).collect())
}

fn rebuilt(builder: &GgufBuilder) -> Result<TokenizerFiles, String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    std::fs::write(&path, builder.bytes()).unwrap();
    let file = GgufFile::open(&path).unwrap();
    rebuild(&file, 1000, 128).map_err(|error| error.to_string())
}

fn load(files: &TokenizerFiles) -> Tokenizer {
    Tokenizer::from_bytes(serde_json::to_vec(&files.tokenizer).unwrap()).unwrap()
}

fn ids(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
    tokenizer.encode(text, true).unwrap().get_ids().to_vec()
}

/// Bytes h, e, l, o, digits 1 and 2, a space (`Ġ`), and a few merges.
fn byte_level(pre: &str) -> GgufBuilder {
    let mut builder = GgufBuilder::new();
    let tokens = [
        "<s>", "h", "e", "l", "o", "1", "2", "Ġ", "he", "ll", "12", "<tool>", "[PAD12]", "hello",
    ];
    builder.key("tokenizer.ggml.model", text("gpt2"));
    builder.key("tokenizer.ggml.pre", text(pre));
    builder.key(TOKENS, strings(&tokens));
    builder.key(TYPES, kinds(&[3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 4, 5, 1]));
    builder.key(MERGES, strings(&["h e", "l l", "1 2"]));
    builder.key("tokenizer.ggml.bos_token_id", Value::U32(0));
    builder
}

#[test]
fn families_cut_text_each_in_its_way() {
    let smollm = load(&rebuilt(&byte_level("smollm")).unwrap());
    assert_eq!(ids(&smollm, "hello12"), [8, 9, 4, 5, 6]);
    let gpt2 = load(&rebuilt(&byte_level("gpt-2")).unwrap());
    assert_eq!(ids(&gpt2, "hello12"), [8, 9, 4, 10]);
    let qwen = load(&rebuilt(&byte_level("qwen2")).unwrap());
    assert_eq!(ids(&qwen, "hello 12"), [8, 9, 4, 7, 5, 6]);
    // a whole word that is a token wins over merges, digits go by threes, BOS comes first
    let llama = load(&rebuilt(&byte_level("llama-bpe")).unwrap());
    assert_eq!(ids(&llama, "hello12"), [0, 13, 10]);
    assert_eq!(llama.decode(&[13, 7, 5], true).unwrap(), "hello 1");
}

#[test]
fn families_of_other_names_cut_as_llama_cpp_does() {
    // each of these was once refused, though weights and architecture are read
    let tokenizer = |pre: &str| load(&rebuilt(&byte_level(pre)).unwrap());
    let pieces = |pre: &str, text: &str| -> Vec<String> {
        let tokenizer = tokenizer(pre);
        let mut cut = tokenizers::PreTokenizedString::from(text);
        let rule = tokenizer.get_pre_tokenizer().unwrap();
        tokenizers::PreTokenizer::pre_tokenize(rule, &mut cut).unwrap();
        let splits = cut.get_splits(
            tokenizers::OffsetReferential::Original,
            tokenizers::OffsetType::Byte,
        );
        let range = |(start, end): (usize, usize)| text[start..end].to_string();
        splits
            .into_iter()
            .map(|(_, offsets, _)| range(offsets))
            .collect()
    };
    let mixed = "camelCase 1234 it's\n\nna\u{ef}ve,\u{4f60}\u{597d} \u{10d0}x  ";
    assert_eq!(pieces("deepseek-r1-qwen", mixed), pieces("qwen2", mixed));
    for alias in ["falcon3", "smaug-bpe", "dbrx", "glm4", "chatglm-bpe"] {
        assert_eq!(pieces(alias, mixed), pieces("llama-bpe", mixed), "{alias}");
    }
    assert_eq!(pieces("llama-bpe", "a 1234"), ["a", " ", "123", "4"]);
    assert_eq!(
        pieces("tekken", "camelCase 12"),
        ["camel", "Case", " ", "1", "2"]
    );
    assert_eq!(
        pieces("gpt-4o", "camelCase it's 1234"),
        ["camel", "Case", " it's", " ", "123", "4"]
    );
    assert_eq!(
        pieces("deepseek-coder", "x = 12\n\u{4f60}\u{597d}!"),
        ["x", " = ", "1", "2", "\n", "\u{4f60}\u{597d}", "!"]
    );
    // Georgian small letters are none of its letters with capitals
    assert_eq!(
        pieces("deepseek-llm", "Wort \u{10d0}\u{4f60} 12, "),
        ["Wort", " ", "\u{10d0}\u{4f60}", " ", "12", ",", " "]
    );
    assert_eq!(ids(&tokenizer("tekken"), "hello")[0], 0, "begins with BOS");
    assert_eq!(ids(&tokenizer("smaug-bpe"), "hello"), [8, 9, 4]);
}

#[test]
fn a_file_without_a_family_is_cut_as_gpt2_and_says_so() {
    let mut builder = byte_level("gpt-2");
    builder.remove_key("tokenizer.ggml.pre");
    let files = rebuilt(&builder).unwrap();
    let known = rebuilt(&byte_level("gpt-2")).unwrap();
    assert_eq!(files.tokenizer, known.tokenizer);
    assert!(
        files.notes[0].contains("is missing: text is cut as GPT-2"),
        "{:?}",
        files.notes
    );
}

#[test]
fn special_and_user_tokens_are_found_in_the_text() {
    let files = rebuilt(&byte_level("smollm")).unwrap();
    let tokenizer = load(&files);
    assert_eq!(ids(&tokenizer, "<s>he<tool>"), [0, 8, 11]);
    assert_eq!(tokenizer.decode(&[0, 8, 11], true).unwrap(), "he<tool>");
    assert_eq!(tokenizer.token_to_id("[PAD12]"), None);
    assert_eq!(tokenizer.token_to_id("hello"), Some(13));
    assert_eq!(files.config["bos_token"], "<s>");
    assert_eq!(files.config["add_bos_token"], false);
}

#[test]
fn bos_and_eos_frame_the_text_when_the_file_says_so() {
    let mut builder = byte_level("gpt-2");
    builder.key("tokenizer.ggml.add_bos_token", Value::Bool(true));
    builder.key("tokenizer.ggml.add_eos_token", Value::Bool(true));
    builder.key("tokenizer.ggml.eos_token_id", Value::U32(11));
    builder.key(TEMPLATE, text("{{ messages }}"));
    builder.key("tokenizer.chat_template.tools", text("x"));
    let files = rebuilt(&builder).unwrap();
    assert_eq!(ids(&load(&files), "he"), [0, 8, 11]);
    assert_eq!(files.config["chat_template"], "{{ messages }}");
    assert_eq!(files.notes, ["`tokenizer.chat_template.tools` is left out"]);
}

fn sentencepiece() -> GgufBuilder {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(String::from).to_vec();
    tokens.extend((0..=255u8).map(|byte| format!("<0x{byte:02X}>")));
    tokens.extend(["▁", "a", "b", "▁a", "ab", "▁ab"].map(String::from));
    let mut types = vec![2, 3, 3];
    types.extend([6; 256]);
    types.extend([1; 6]);
    let scores = (0..tokens.len())
        .map(|id| Value::F32(-(id as f32)))
        .collect();
    let tokens: Vec<&str> = tokens.iter().map(String::as_str).collect();
    let mut builder = GgufBuilder::new();
    builder.key("tokenizer.ggml.model", text("llama"));
    builder.key(TOKENS, strings(&tokens));
    builder.key(TYPES, kinds(&types));
    builder.key(SCORES, Value::Array(scores));
    builder
}

#[test]
fn sentencepiece_falls_back_to_bytes_and_keeps_spaces() {
    let tokenizer = load(&rebuilt(&sentencepiece()).unwrap());
    // 259 ▁, 260 a, 261 b, 262 ▁a, 263 ab, 264 ▁ab; ä is 0xC3 0xA4
    assert_eq!(ids(&tokenizer, "ab ä"), [1, 264, 259, 3 + 0xC3, 3 + 0xA4]);
    let decoded = tokenizer.decode(&[264, 259, 3 + 0xC3, 3 + 0xA4], true);
    assert_eq!(decoded.unwrap(), "ab ä");

    let mut builder = sentencepiece();
    builder.key("tokenizer.ggml.add_space_prefix", Value::Bool(false));
    builder.key("tokenizer.ggml.add_bos_token", Value::Bool(false));
    let tokenizer = load(&rebuilt(&builder).unwrap());
    assert_eq!(ids(&tokenizer, "ab a"), [263, 262]);
}

/// Gemma's runs of spaces and line ends are tokens that are found before merging; the converter wrote
/// them with spaces, not with the sign that stands for one.
#[test]
fn runs_of_spaces_are_found_as_they_stand() {
    let mut builder = sentencepiece();
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(String::from).to_vec();
    tokens.extend((0..=255u8).map(|byte| format!("<0x{byte:02X}>")));
    tokens.extend(["▁", "a", "b", "▁a", "ab", "  ", "   ", "\n"].map(String::from));
    let types = [&[2, 3, 3][..], &[6; 256], &[1; 5], &[4; 3]].concat();
    let scores = (0..tokens.len()).map(|id| Value::F32(-(id as f32)));
    builder.set(SCORES, Value::Array(scores.collect()));
    let tokens: Vec<&str> = tokens.iter().map(String::as_str).collect();
    builder.set(TOKENS, strings(&tokens));
    builder.set(TYPES, kinds(&types));
    builder.key("tokenizer.ggml.add_space_prefix", Value::Bool(false));
    builder.key("tokenizer.ggml.add_bos_token", Value::Bool(true));
    let tokenizer = load(&rebuilt(&builder).unwrap());
    // 259 ▁, 260 a, 262 ▁a, 263 ab, 264 and 265 the runs, 266 the line end
    let text = " a   ab  a\n a";
    let expected = [1, 262, 265, 263, 264, 260, 266, 262];
    assert_eq!(ids(&tokenizer, text), expected);
    assert_eq!(tokenizer.decode(&expected[1..], true).unwrap(), text);
}

#[test]
fn what_cannot_be_rebuilt_is_refused_by_name() {
    let refused = |mut builder: GgufBuilder, key: &str, value: Value, expected: &str| {
        builder.set(key, value);
        let error = rebuilt(&builder).unwrap_err();
        assert!(error.contains(expected), "{error}");
    };
    let bytes = || byte_level("smollm");
    refused(
        bytes(),
        "tokenizer.ggml.model",
        text("t5"),
        "`t5` is not one of",
    );
    refused(
        bytes(),
        "tokenizer.ggml.pre",
        text("viking"),
        "`viking` is not one of",
    );
    refused(bytes(), TOKENS, strings(&["a", "a"]), "`a` as 0 and as 1");
    refused(
        bytes(),
        TOKENS,
        strings(&["x"; 1001]),
        "1001 tokens, the embedding 1000 rows",
    );
    refused(bytes(), TYPES, kinds(&[1]), "has 1 values for 14 tokens");
    refused(bytes(), TYPES, kinds(&[9; 14]), "for token 0, not 1 to 6");
    refused(
        bytes(),
        MERGES,
        strings(&["h l"]),
        "`h l`, which does not join",
    );
    refused(
        bytes(),
        "tokenizer.ggml.bos_token_id",
        Value::U32(14),
        "14 is not below the 14 tokens",
    );
    refused(
        sentencepiece(),
        "tokenizer.ggml.remove_extra_whitespaces",
        Value::Bool(true),
        "not supported",
    );
    refused(
        sentencepiece(),
        SCORES,
        kinds(&[1]),
        "1 numbers in 1 values",
    );
}
