//! A model's `tokenizer.json` or `tokenizer.model`, and the ids that its configuration files name.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use gptq_types::outside_name::shown;
use gptq_types::quietly;
use serde_json::Value;

use crate::CalibrationError;
use crate::error::one_line;
use crate::sentencepiece::{Surroundings, tokenizer_json};

const TOKENIZER_FILE: &str = "tokenizer.json";
const SENTENCEPIECE_FILE: &str = "tokenizer.model";
const ADDED_TOKENS: &str = "added_tokens.json";
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
const SPECIAL_TOKENS_MAP: &str = "special_tokens_map.json";
const MODEL_CONFIG: &str = "config.json";
const GENERATION_CONFIG: &str = "generation_config.json";

/// Larger configuration files are not read; those in use have up to 35 MB.
const MAX_FILE_BYTES: u64 = 1 << 26;

/// A text may get so many times as long before it is cut; those in use make `▁` of a space.
const MAX_GROWTH: f64 = 1024.0;
/// Steps before and after the cutting; those in use have up to twenty.
const MAX_STEPS: usize = 256;
/// Characters of the library's own words that an error repeats.
const SHOWN_CHARACTERS: usize = 160;

/// Text to token ids and back.
///
/// Truncation and padding that a `tokenizer.json` may ask for are switched off: a text is always
/// its whole tokens.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    path: PathBuf,
    vocab_size: usize,
    /// The largest id of the learned vocabulary, added tokens apart.
    last_learned: (String, u32),
    bos_id: Option<u32>,
    eos_ids: Vec<u32>,
}

impl Tokenizer {
    /// Reads `tokenizer.json` of a model folder, or `tokenizer.model` where it is alone, and from `tokenizer_config.json`, `config.json`
    /// and `generation_config.json`, where they are there, which ids begin and end a text.
    ///
    /// Fails when `tokenizer.json` is missing or cannot be understood, or when one of the others
    /// is there and is not JSON.
    pub fn open(dir: &Path) -> Result<Self, CalibrationError> {
        let json = dir.join(TOKENIZER_FILE);
        let (path, bytes) = match read_if_there(&json)? {
            Some(bytes) => (json, bytes),
            None => match rebuilt_tokenizer(dir)? {
                Some(bytes) => (dir.join(SENTENCEPIECE_FILE), bytes),
                None => return Err(missing(dir)),
            },
        };
        // The library panics where text that is not JSON breaks off in the decoder. Strings count: what is
        // skipped is not looked into, so the whole is read.
        let json =
            serde_json::from_slice::<Value>(&bytes).map_err(|error| invalid(&path, error))?;
        check_growth(&json).map_err(|reason| invalid(&path, reason))?;
        drop(json);
        let inner = guarded(|| {
            let mut inner = tokenizers::Tokenizer::from_bytes(&bytes)?;
            inner.with_padding(None);
            inner.with_truncation(None)?;
            Ok(inner)
        })
        .map_err(|reason| invalid(&path, reason))?;
        let last = |with_added| guarded(|| Ok(last_of(&inner, with_added)));
        let last_learned = (last(false).map_err(|reason| invalid(&path, reason))?)
            .ok_or_else(|| invalid(&path, "the vocabulary is empty"))?;
        let vocab_size = (last(true).map_err(|reason| invalid(&path, reason))?)
            .map_or(0, |(_, id)| id as usize + 1);
        let marks = Marks::read(dir, &inner)?;
        Ok(Self {
            inner,
            path,
            vocab_size,
            last_learned,
            bos_id: marks.bos_id,
            eos_ids: marks.eos_ids,
        })
    }

    /// The token ids of `text`, with the special tokens that the post-processor of
    /// `tokenizer.json` adds (for Llama one `<s>` at the start).
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, CalibrationError> {
        self.encode_with(text, true)
    }

    /// The token ids of `text` alone, nothing added.
    pub fn encode_plain(&self, text: &str) -> Result<Vec<u32>, CalibrationError> {
        self.encode_with(text, false)
    }

    fn encode_with(&self, text: &str, special: bool) -> Result<Vec<u32>, CalibrationError> {
        // the variant without offsets: nobody reads them
        let encode = || Ok(self.inner.encode_fast(text, special)?.get_ids().to_vec());
        guarded(encode).map_err(|reason| CalibrationError::Encode {
            bytes: text.len(),
            reason,
        })
    }

    /// The text of `ids`; special tokens such as `<s>` are left out when `skip_special`.
    ///
    /// Ids that the vocabulary does not hold give no text.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, CalibrationError> {
        guarded(|| self.inner.decode(ids, skip_special)).map_err(|reason| {
            CalibrationError::Decode {
                tokens: ids.len(),
                reason,
            }
        })
    }

    /// Every id is below this: the largest one and 1, added tokens counted.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The id of a token by its text, added tokens included.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The ids that [`Tokenizer::encode`] adds to any text.
    pub fn special_ids(&self) -> Result<Vec<u32>, CalibrationError> {
        self.encode("")
    }

    /// The added ids that come before the text; others come after it.
    pub fn leading_ids(&self) -> Result<Vec<u32>, CalibrationError> {
        let text = "a";
        let (mut all, plain) = (self.encode(text)?, self.encode_plain(text)?);
        let found = all
            .windows(plain.len().max(1))
            .position(|part| part == plain);
        all.truncate(found.unwrap_or(0));
        Ok(all)
    }

    /// The id that begins a text, if a configuration file names one.
    pub fn bos_id(&self) -> Option<u32> {
        self.bos_id
    }

    /// The ids that end a text: all that the configuration files name, sorted.
    pub fn eos_ids(&self) -> &[u32] {
        &self.eos_ids
    }

    /// Refuses a tokenizer whose learned vocabulary, or whose special tokens that every text gets,
    /// a model of `model_vocab` embeddings does not know: it belongs to another model.
    ///
    /// Added tokens above the vocabulary are left to [`crate::Windows::check_vocabulary`]: published
    /// models carry some that the model has no embedding for and that no text holds.
    pub fn check_vocabulary(&self, model_vocab: usize) -> Result<(), CalibrationError> {
        let wrong = |token: &str, id| CalibrationError::Vocabulary {
            path: self.path.display().to_string(),
            token: token.to_string(),
            id,
            model_vocab,
        };
        let (token, id) = &self.last_learned;
        if *id as usize >= model_vocab {
            return Err(wrong(token, *id));
        }
        for id in self.special_ids()? {
            if id as usize >= model_vocab {
                return Err(wrong(&self.inner.id_to_token(id).unwrap_or_default(), id));
            }
        }
        Ok(())
    }

    /// The file that was read.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// The ids that begin and end a text.
#[derive(Default)]
struct Marks {
    bos_id: Option<u32>,
    eos_ids: Vec<u32>,
}

impl Marks {
    fn read(dir: &Path, tokenizer: &tokenizers::Tokenizer) -> Result<Self, CalibrationError> {
        let mut marks = Self::default();
        let named = special_tokens(dir)?;
        let id = |name: &str| tokenizer.token_to_id(named.get(name)?);
        marks.bos_id = id("bos_token");
        marks.eos_ids.extend(id("eos_token"));
        for file in [GENERATION_CONFIG, MODEL_CONFIG] {
            if let Some(config) = read_json_if_there(&dir.join(file))? {
                marks.bos_id = marks
                    .bos_id
                    .or(ids(&config["bos_token_id"]).first().copied());
                marks.eos_ids.extend(ids(&config["eos_token_id"]));
            }
        }
        marks.eos_ids.sort_unstable();
        marks.eos_ids.dedup();
        Ok(marks)
    }
}

/// The `bos_token_id` of `generation_config.json` or `config.json` in `dir`, in the latter also that of
/// the text model inside a multimodal one.
pub(crate) fn configured_bos(dir: &Path) -> Result<Option<u32>, CalibrationError> {
    for file in [GENERATION_CONFIG, MODEL_CONFIG] {
        let config = read_json_if_there(&dir.join(file))?.unwrap_or(Value::Null);
        let texts = [&config, &config["text_config"]];
        let mut found = texts.iter().flat_map(|text| ids(&text["bos_token_id"]));
        if let Some(bos) = found.next() {
            return Ok(Some(bos));
        }
    }
    Ok(None)
}

/// The tokens that a model folder names, such as `bos_token`, and their texts: those of
/// `tokenizer_config.json`, and of `special_tokens_map.json` what that one lacks, as in older
/// repositories.
///
/// Fails when one of the files is there and is not JSON.
pub fn special_tokens(dir: &Path) -> Result<BTreeMap<String, String>, CalibrationError> {
    let mut tokens = BTreeMap::new();
    for file in [TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP] {
        let config = read_json_if_there(&dir.join(file))?.unwrap_or(Value::Null);
        for (name, token) in config.as_object().into_iter().flatten() {
            if let (true, Some(text)) = (name.ends_with("_token"), token_text(token)) {
                let entry = tokens.entry(name.clone());
                entry.or_insert_with(|| text.to_string());
            }
        }
    }
    Ok(tokens)
}

/// A token is a string or an object with its `content`.
fn token_text(token: &Value) -> Option<&str> {
    token.as_str().or_else(|| token.get("content")?.as_str())
}

/// One id or a list of them; anything else names none.
fn ids(value: &Value) -> Vec<u32> {
    let id = |value: &Value| u32::try_from(value.as_u64()?).ok();
    match value {
        Value::Array(values) => values.iter().filter_map(id).collect(),
        one => id(one).into_iter().collect(),
    }
}

/// The `tokenizer.json` that a folder's `tokenizer.model` implies; nothing where it has none.
///
/// Fails where the file is none of SentencePiece, or asks for what `tokenizer.json` cannot say.
pub fn rebuilt_tokenizer(dir: &Path) -> Result<Option<Vec<u8>>, CalibrationError> {
    let path = dir.join(SENTENCEPIECE_FILE);
    let Some(bytes) = read_if_there(&path)? else {
        return Ok(None);
    };
    let foreign = |reason: String| CalibrationError::TokenizerForeign {
        path: path.display().to_string(),
        reason,
    };
    if is_tiktoken(&bytes) {
        return Err(foreign("a list of tiktoken ranks".to_string()));
    }
    let json = tokenizer_json(&bytes, &surroundings(dir)?)
        .map_err(|reason| foreign(format!("no SentencePiece model that can be read: {reason}")))?;
    Ok(Some(json.to_string().into_bytes()))
}

/// Whether the first line is a token in base64 and its rank.
fn is_tiktoken(bytes: &[u8]) -> bool {
    let line = bytes.split(|&byte| byte == b'\n').next().unwrap_or(&[]);
    let mut words = line.split(|&byte| byte == b' ');
    let (token, rank) = (words.next().unwrap_or(&[]), words.next().unwrap_or(&[]));
    let is_digit = |byte: &u8| byte.is_ascii_alphanumeric() || b"+/=".contains(byte);
    let whole = !token.is_empty() && !rank.is_empty() && words.next().is_none();
    whole && token.iter().all(is_digit) && rank.iter().all(u8::is_ascii_digit)
}

/// The error for a folder without a tokenizer, by the files that it has instead.
fn missing(dir: &Path) -> CalibrationError {
    let files = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let foreign = files.map(|entry| entry.path()).find(|path| {
        path.extension().is_some_and(|ending| ending == "tiktoken")
            || path.file_name().is_some_and(|name| name == "tekken.json")
    });
    match foreign {
        Some(path) => CalibrationError::TokenizerForeign {
            path: path.display().to_string(),
            reason: "a list of tiktoken ranks".to_string(),
        },
        None => CalibrationError::TokenizerMissing {
            folder: dir.display().to_string(),
        },
    }
}

/// BOS, EOS and added tokens from the files next to a `tokenizer.model`.
fn surroundings(dir: &Path) -> Result<Surroundings, CalibrationError> {
    let config = read_json_if_there(&dir.join(TOKENIZER_CONFIG))?.unwrap_or(Value::Null);
    let apart = read_json_if_there(&dir.join(ADDED_TOKENS))?.unwrap_or(Value::Null);
    let mut added = BTreeMap::new();
    for (text, id) in apart.as_object().into_iter().flatten() {
        added.extend(id.as_u64().map(|id| (id, (text.clone(), false))));
    }
    let listed = config["added_tokens_decoder"].as_object();
    for (id, token) in listed.into_iter().flatten() {
        if let (Ok(id), Some(text)) = (id.parse(), token_text(token)) {
            let special = token["special"].as_bool().unwrap_or(false);
            added.insert(id, (text.to_string(), special));
        }
    }
    Ok(Surroundings {
        // as the classes of transformers have it that read such a file
        begins: config["add_bos_token"].as_bool().unwrap_or(true),
        ends: config["add_eos_token"].as_bool().unwrap_or(false),
        added: (added.into_iter())
            .map(|(id, (text, special))| (id, text, special))
            .collect(),
    })
}

/// The result of the library, whose panics on damaged files and texts are errors too.
fn guarded<T>(work: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    match quietly(work) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(shown(&one_line(error), SHOWN_CHARACTERS)),
        Err(panic) => Err(format!("the tokenizers library fails: {panic}")),
    }
}

/// Refuses steps that together lengthen a text too much: thirty that double it make gigabytes of a
/// letter.
fn check_growth(tokenizer: &Value) -> Result<(), String> {
    let (mut growth, mut steps) = (1.0, 0);
    for part in ["normalizer", "pre_tokenizer", "decoder"] {
        growth *= growth_of(&tokenizer[part], &mut steps);
    }
    match growth <= MAX_GROWTH && steps <= MAX_STEPS {
        true => Ok(()),
        false => Err(format!(
            "its {steps} steps may lengthen a text {growth:.0} times"
        )),
    }
}

/// Largest factor by which a step may lengthen a text.
fn growth_of(step: &Value, steps: &mut usize) -> f64 {
    *steps += 1;
    let mut growth = 1.0;
    for parts in ["normalizers", "pretokenizers", "decoders"] {
        for part in step[parts].as_array().into_iter().flatten() {
            growth *= growth_of(part, steps);
        }
    }
    let length = |text: &Value| text.as_str().map_or(0, str::len) as f64;
    if step["type"] == "Replace" {
        growth *= match &step["pattern"]["String"] {
            Value::String(pattern) if !pattern.is_empty() => {
                (length(&step["content"]) / pattern.len() as f64).max(1.0)
            }
            // The pattern may match the empty text between any two letters.
            _ => 1.0 + length(&step["content"]),
        };
    }
    growth
}

fn last_of(tokenizer: &tokenizers::Tokenizer, with_added: bool) -> Option<(String, u32)> {
    tokenizer
        .get_vocab(with_added)
        .into_iter()
        .max_by_key(|(_, id)| *id)
}

fn read_json_if_there(path: &Path) -> Result<Option<Value>, CalibrationError> {
    match read_if_there(path)? {
        Some(bytes) => serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|error| CalibrationError::malformed(path, error)),
        None => Ok(None),
    }
}

fn read_if_there(path: &Path) -> Result<Option<Vec<u8>>, CalibrationError> {
    let wrong = |source| CalibrationError::read(path, source);
    let length = match std::fs::metadata(path) {
        Ok(metadata) => metadata.len(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(wrong(error)),
    };
    if length > MAX_FILE_BYTES {
        return Err(CalibrationError::TooLarge {
            path: path.display().to_string(),
            bytes: length,
            limit: MAX_FILE_BYTES,
        });
    }
    std::fs::read(path).map(Some).map_err(wrong)
}

fn invalid(path: &Path, reason: impl std::fmt::Display) -> CalibrationError {
    CalibrationError::TokenizerInvalid {
        path: path.display().to_string(),
        reason: one_line(reason),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A word-level tokenizer: `<s>` 0, `</s>` 4, `a` 1, `b` 2, `<unk>` 3; asks for truncation.
    const WORDS: &str = r#"{
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": null,
                    "pad_id": 3, "pad_type_id": 0, "pad_token": "<unk>"},
        "added_tokens": [
            {"id": 0, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true},
            {"id": 4, "content": "</s>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}],
        "normalizer": null,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}},
        "decoder": null,
        "model": {"type": "WordLevel", "vocab": {"<s>": 0, "a": 1, "b": 2, "<unk>": 3}, "unk_token": "<unk>"}
    }"#;

    fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            std::fs::write(folder.path().join(name), text).unwrap();
        }
        folder
    }

    #[test]
    fn a_file_that_breaks_off_anywhere_or_holds_no_text_is_named() {
        let decoder = r#""decoder": {"type": "ByteLevel", "add_prefix_space": true}"#;
        let text = WORDS.replace(r#""decoder": null"#, decoder);
        for end in 0..text.trim_end().len() {
            let folder = folder(&[(TOKENIZER_FILE, &text[..end])]);
            let error = Tokenizer::open(folder.path()).map(|_| ()).unwrap_err();
            assert!(error.to_string().contains(TOKENIZER_FILE), "{error}");
        }
        let halves = text.replace("ByteLevel", r"\ud800");
        let folder = folder(&[(TOKENIZER_FILE, &halves)]);
        assert!(Tokenizer::open(folder.path()).is_err());
    }

    /// The library asserts on such files (charsmap, template, byte index) and asked for gigabytes.
    #[test]
    fn what_the_library_panics_on_is_an_error() {
        let edits = [
            (
                r#""normalizer": null"#,
                r#""normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////w=="}"#,
            ),
            (
                r#"{"id": "<s>", "ids": [0], "tokens": ["<s>"]}"#,
                r#"{"id": "<s>", "ids": [], "tokens": []}"#,
            ),
            (r#""special_tokens": {"<s>""#, r#""special_tokens": {"<t>""#),
        ];
        for (from, to) in edits {
            let text = WORDS.replace(from, to);
            assert_ne!(text, WORDS);
            let folder = folder(&[(TOKENIZER_FILE, &text)]);
            let result = Tokenizer::open(folder.path()).and_then(|tokenizer| tokenizer.encode("a"));
            if let Err(error) = result {
                assert!(!error.to_string().contains('\n'), "{error}");
            }
        }
        let double = r#"{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}"#;
        let steps = vec![double; 40].join(",");
        let normalizer =
            format!(r#""normalizer": {{"type": "Sequence", "normalizers": [{steps}]}}"#);
        let text = WORDS.replace(r#""normalizer": null"#, &normalizer);
        let folder = folder(&[(TOKENIZER_FILE, &text)]);
        let error = Tokenizer::open(folder.path()).err().unwrap().to_string();
        assert!(error.contains("lengthen"), "{error}");
    }

    #[test]
    fn files_of_other_libraries_are_named() {
        let cases = [
            ("tokenizer.model", "IQ== 0\nIg== 1\n", "tiktoken"),
            ("qwen.tiktoken", "IQ== 0\n", "tiktoken"),
            ("tokenizer.model", "spm", "SentencePiece"),
            ("tokenizer.model", "", "no pieces"),
        ];
        for (name, text, named) in cases {
            let folder = folder(&[(name, text)]);
            let error = Tokenizer::open(folder.path()).err().unwrap();
            assert!(error.to_string().contains(named), "{error}");
            assert!(error.hint().is_some());
        }
    }

    #[test]
    fn special_tokens_are_added_and_nothing_is_cut_or_padded() {
        let folder = folder(&[(TOKENIZER_FILE, WORDS)]);
        let tokenizer = Tokenizer::open(folder.path()).unwrap();
        assert_eq!(tokenizer.encode("a b a x b").unwrap(), [0, 1, 2, 1, 3, 2]);
        assert_eq!(tokenizer.encode_plain("a b").unwrap(), [1, 2]);
        assert_eq!(tokenizer.special_ids().unwrap(), [0]);
        assert_eq!(tokenizer.decode(&[0, 1, 2], true).unwrap(), "a b");
        assert_eq!(tokenizer.decode(&[0, 1, 2], false).unwrap(), "<s> a b");
        assert_eq!(tokenizer.vocab_size(), 5);
        assert_eq!(tokenizer.token_id("</s>"), Some(4));
        assert_eq!(tokenizer.bos_id(), None);
        assert!(tokenizer.eos_ids().is_empty());
    }

    #[test]
    fn a_mark_at_the_end_does_not_lead() {
        let ends = WORDS.replace(
            r#"{"Sequence": {"id": "A", "type_id": 0}}],
            "pair""#,
            r#"{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<s>", "type_id": 0}}],
            "pair""#,
        );
        assert_ne!(ends, WORDS);
        for text in [WORDS, &ends] {
            let folder = folder(&[(TOKENIZER_FILE, text)]);
            let tokenizer = Tokenizer::open(folder.path()).unwrap();
            assert_eq!(tokenizer.leading_ids().unwrap(), [0]);
        }
    }

    #[test]
    fn the_marks_come_from_every_configuration_file() {
        let folder = folder(&[
            (TOKENIZER_FILE, WORDS),
            (
                TOKENIZER_CONFIG,
                r#"{"bos_token": {"content": "<s>"}, "eos_token": "</s>"}"#,
            ),
            (GENERATION_CONFIG, r#"{"eos_token_id": [4, 2]}"#),
            (MODEL_CONFIG, r#"{"bos_token_id": 1, "eos_token_id": 3}"#),
        ]);
        let tokenizer = Tokenizer::open(folder.path()).unwrap();
        assert_eq!(tokenizer.bos_id(), Some(0));
        assert_eq!(tokenizer.eos_ids(), [2, 3, 4]);
    }

    #[test]
    fn a_tokenizer_of_another_model_is_refused() {
        let folder = folder(&[(TOKENIZER_FILE, WORDS)]);
        let tokenizer = Tokenizer::open(folder.path()).unwrap();
        assert!(tokenizer.check_vocabulary(4).is_ok());
        assert_eq!(
            tokenizer.check_vocabulary(3).unwrap_err().to_string(),
            format!(
                "token `<unk>` of {} has id 3, but the model's vocabulary ends before 3",
                tokenizer.path().display()
            )
        );
        std::fs::write(
            folder.path().join(TOKENIZER_FILE),
            WORDS.replace("\"ids\": [0]", "\"ids\": [4]"),
        )
        .unwrap();
        let tokenizer = Tokenizer::open(folder.path()).unwrap();
        let error = tokenizer.check_vocabulary(4).unwrap_err();
        assert!(
            matches!(error, CalibrationError::Vocabulary { id: 4, .. }),
            "{error}"
        );
    }

    #[test]
    fn missing_and_broken_files_are_told_apart() {
        let empty = folder(&[]);
        let error = Tokenizer::open(empty.path()).err().unwrap();
        assert!(
            matches!(error, CalibrationError::TokenizerMissing { .. }),
            "{error}"
        );
        assert!(error.hint().is_some());
        for text in ["", "{}", "{\"model\": 3}"] {
            let broken = folder(&[(TOKENIZER_FILE, text)]);
            let error = Tokenizer::open(broken.path()).err().unwrap();
            assert!(
                matches!(error, CalibrationError::TokenizerInvalid { .. }),
                "{error}"
            );
        }
        let broken = folder(&[(TOKENIZER_FILE, WORDS), (MODEL_CONFIG, "{")]);
        let error = Tokenizer::open(broken.path()).err().unwrap();
        assert!(
            matches!(error, CalibrationError::Malformed { .. }),
            "{error}"
        );
    }
}
