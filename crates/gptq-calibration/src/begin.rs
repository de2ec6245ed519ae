//! Windows that begin with the beginning-of-sequence token.
//!
//! A window is cut out of the middle of a text, so it begins with BOS only if the token is prepended.
//! The papers' models handle windows without BOS well; Gemma computes nonsense on them, which makes
//! calibration and perplexity meaningless.

use std::path::Path;

use crate::CalibrationError;
use crate::sample::WindowSpec;
use crate::tokenizer::Tokenizer;

/// The words of a rule or protocol for it.
pub(crate) fn words(bos: u32) -> String {
    format!("; BOS (token {bos}) is put in front of each window")
}

/// Tokens of `seq_len` that are left for the text.
pub(crate) fn text_len(seq_len: usize, bos: Option<u32>) -> usize {
    seq_len - bos.map_or(0, |_| 1)
}

/// The windows of the text, without what is put in front of them; refuses those that would hold no
/// text.
pub(crate) fn text_spec(
    spec: &WindowSpec,
    bos: Option<u32>,
) -> Result<WindowSpec, CalibrationError> {
    if bos.is_some() && spec.seq_len < 2 {
        return Err(CalibrationError::Spec {
            field: "seq_len",
            value: spec.seq_len,
            expected: "at least 2, since each window begins with BOS".to_string(),
        });
    }
    let seq_len = text_len(spec.seq_len, bos);
    Ok(WindowSpec { seq_len, ..*spec })
}

/// Puts `bos` in front of each window.
pub(crate) fn put_in_front(ids: &mut [Vec<u32>], bos: u32) {
    for window in ids {
        window.insert(0, bos);
    }
}

/// A text without the BOS that its tokenizer or chat template began it with: that would be the second
/// one of the window at its start.
pub(crate) fn without_own(mut tokens: Vec<u32>, bos: Option<u32>) -> Vec<u32> {
    if bos.is_some() && tokens.first().copied() == bos {
        tokens.remove(0);
    }
    tokens
}

/// The BOS token of a model's windows: the one named by the files of the tokenizer's folder, else the one
/// that the tokenizer itself prepends to any text, else the one in `config.json` or
/// `generation_config.json` of `model_dir`, which differs from the tokenizer's folder if that was given.
///
/// A folder without a tokenizer is no error here: a model that writes its own text needs none. Fails
/// where a file is there and cannot be understood.
pub fn window_bos(tokenizer_dir: &Path, model_dir: &Path) -> Result<Option<u32>, CalibrationError> {
    let found = match Tokenizer::open(tokenizer_dir) {
        Ok(tokenizer) => match tokenizer.bos_id() {
            None => match tokenizer.leading_ids()?.as_slice() {
                [one] => Some(*one),
                _ => None, // of several no one says which is BOS
            },
            found => found,
        },
        Err(CalibrationError::TokenizerMissing { .. }) => None,
        Err(error) => return Err(error),
    };
    match found {
        None => crate::tokenizer::configured_bos(model_dir),
        found => Ok(found),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_keeps_its_length_and_a_text_its_tokens() {
        let spec = |seq_len| WindowSpec {
            samples: 3,
            seq_len,
            seed: 0,
        };
        assert_eq!(text_spec(&spec(8), None).unwrap(), spec(8));
        assert_eq!(text_spec(&spec(8), Some(2)).unwrap(), spec(7));
        assert_eq!(text_spec(&spec(1), None).unwrap(), spec(1));
        let error = text_spec(&spec(1), Some(2)).unwrap_err();
        assert!(error.to_string().contains("begins with BOS"), "{error}");

        let mut ids = vec![vec![5, 6], vec![2, 7]];
        put_in_front(&mut ids, 2);
        assert_eq!(ids, [[2, 5, 6], [2, 2, 7]]);
        assert_eq!(without_own(vec![2, 2, 5], Some(2)), [2, 5]);
        assert_eq!(without_own(vec![5, 2], Some(2)), [5, 2]);
        assert_eq!(without_own(vec![2, 5], None), [2, 5]);
        assert!(without_own(Vec::new(), Some(2)).is_empty());
    }

    #[test]
    fn the_configuration_of_the_model_is_asked_last() {
        let (tokenizer, model) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let found = || window_bos(tokenizer.path(), model.path()).unwrap();
        assert_eq!(found(), None);
        let config = r#"{"bos_token_id": 3}"#;
        std::fs::write(model.path().join("config.json"), config).unwrap();
        assert_eq!(found(), Some(3));
        let nested = r#"{"text_config": {"bos_token_id": 4}}"#;
        std::fs::write(model.path().join("config.json"), nested).unwrap();
        assert_eq!(found(), Some(4));
        let named = r#"{"bos_token_id": [5]}"#;
        std::fs::write(model.path().join("generation_config.json"), named).unwrap();
        assert_eq!(found(), Some(5));

        let plain = r#"{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
            "normalizer": null, "pre_tokenizer": {"type": "WhitespaceSplit"},
            "post_processor": null, "decoder": null,
            "model": {"type": "WordLevel", "vocab": {"<s>": 0, "a": 1}, "unk_token": "a"}}"#;
        let path = tokenizer.path().join("tokenizer.json");
        std::fs::write(&path, plain).unwrap();
        assert_eq!(found(), Some(5));
        // The tokenizer adds a token that no file calls BOS.
        let adds = r#"{"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}}"#;
        let leading = plain.replace(
            r#""post_processor": null"#,
            &format!(r#""post_processor": {adds}"#),
        );
        std::fs::write(&path, leading).unwrap();
        assert_eq!(found(), Some(0));
        let config = r#"{"bos_token": "a"}"#;
        std::fs::write(tokenizer.path().join("tokenizer_config.json"), config).unwrap();
        assert_eq!(found(), Some(1));
    }
}
