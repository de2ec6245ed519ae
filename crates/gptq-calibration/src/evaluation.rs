//! Evaluation windows: what a perplexity is taken over, and the protocol in words.

use crate::CalibrationError;
use crate::begin::{put_in_front, text_len, without_own, words};
use crate::digest::token_sha256;
use crate::manifest::Rule;
use crate::material::{Content, Material, Means, Purpose, join};
use crate::rows::Rows;
use crate::sample::{WindowSpec, check_ids, draw_documents, encode};
use crate::source::Source;

/// Windows of the document rule, and its seed: fixed by the original, whatever `--seed` says.
const DOCUMENT_WINDOWS: usize = 256;
const DOCUMENT_SEED: u64 = 0;

/// A window of one token predicts nothing.
pub(crate) const MIN_SEQ_LEN: usize = 2;

/// The scoring of the original (`llama_eval`): all windows have equal weight, and the first token of a
/// window is not predicted.
const SCORING: &str =
    "perplexity is exp of the mean over windows of the mean over all tokens but the first";

/// The tokens of a perplexity.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EvaluationWindows {
    /// Token ids, a vector per window.
    pub ids: Vec<Vec<u32>>,
    /// Text, join, window and count, in words.
    pub protocol: String,
    /// sha256 of the ids as little-endian u32, window after window.
    pub token_sha256: String,
    /// The beginning-of-sequence token that was put in front of each window.
    pub bos: Option<u32>,
}

impl EvaluationWindows {
    /// Windows that were chosen by a rule in words, and get `bos` in front.
    pub(crate) fn new(mut ids: Vec<Vec<u32>>, rule: &str, bos: Option<u32>) -> Self {
        if let Some(bos) = bos {
            put_in_front(&mut ids, bos);
        }
        let begin = bos.map_or(String::new(), words);
        EvaluationWindows {
            protocol: format!("{rule}{begin}; {SCORING}"),
            token_sha256: token_sha256(&ids),
            ids,
            bos,
        }
    }

    /// Refuses a token that a model of `model_vocab` embeddings does not know.
    pub fn check_vocabulary(&self, model_vocab: usize) -> Result<(), CalibrationError> {
        check_ids(&self.ids, model_vocab)
    }
}

/// Evaluation windows of `source`: the first `max_windows` of those that its rule gives.
///
/// A joined text is cut into non-overlapping windows of `seq_len` tokens and the remainder is
/// dropped; `c4` gives the original's 256 random windows (seed 0) of its validation split; stored
/// windows are taken as they are, whatever `seq_len` is.
///
/// With a BOS in `means` the text is cut every `seq_len - 1` tokens and each window has BOS in front, so
/// that no token of the text is left out; the token after BOS is predicted and counts like any.
///
/// Fails when the source is `self`, cannot be fetched or read, or holds less than one window.
pub fn evaluation_windows(
    source: &Source,
    seq_len: usize,
    max_windows: Option<usize>,
    means: &Means<'_>,
) -> Result<EvaluationWindows, CalibrationError> {
    check(seq_len, max_windows)?;
    let tokens = max_windows.unwrap_or(1).saturating_mul(seq_len);
    let purpose = Purpose::Evaluation;
    let material = Material::read(source, purpose, tokens, means.chat, means.files)?;
    let material = material.behind_bos(means.bos);
    let seq_len = text_len(seq_len, material.bos);
    let most = max_windows.unwrap_or(usize::MAX);
    let (ids, how) = match (&material.content, material.rule) {
        (Content::Windows(ids), _) => stored(ids, most, &material)?,
        (Content::Rows(rows), Rule::Documents) => documents(rows, seq_len, most, &material, means)?,
        (Content::Rows(rows), Rule::Joined) => {
            let text = join(rows, &material.path)?;
            let tokens = encode(&text, rows.is_rendered(), means.bos, means.tokenizer)?;
            let join = match rows.is_rendered() {
                true => "rows one after the other as one string",
                false => "rows joined with \"\\n\\n\" as one string",
            };
            let special = special_tokens(rows.is_rendered(), means)?;
            cut(&tokens, &special, join, seq_len, most, &material)?
        }
        (Content::Whole(text), _) => {
            let tokens = encode(text, false, means.bos, means.tokenizer)?;
            let special = special_tokens(false, means)?;
            cut(&tokens, &special, "as one string", seq_len, most, &material)?
        }
    };
    let rule = format!("{}, {}{how}", material.title, material.rows_words());
    Ok(EvaluationWindows::new(ids, &rule, material.bos))
}

fn check(seq_len: usize, max_windows: Option<usize>) -> Result<(), CalibrationError> {
    let wrong = |field, value, least: usize| CalibrationError::Spec {
        field,
        value,
        expected: format!("at least {least}"),
    };
    if seq_len < MIN_SEQ_LEN {
        return Err(wrong("seq_len", seq_len, MIN_SEQ_LEN));
    }
    match max_windows {
        Some(0) => Err(wrong("max_windows", 0, 1)),
        _ => Ok(()),
    }
}

fn stored(
    ids: &[Vec<u32>],
    most: usize,
    material: &Material,
) -> Result<(Vec<Vec<u32>>, String), CalibrationError> {
    if let Some(short) = ids.iter().find(|window| window.len() < MIN_SEQ_LEN) {
        return Err(CalibrationError::TooShort {
            path: material.place(),
            found: short.len(),
            needed: MIN_SEQ_LEN,
        });
    }
    let taken = &ids[..most.min(ids.len())];
    let how = format!(
        "windows of {} tokens as stored, {}",
        taken.first().map_or(0, Vec::len),
        count(taken.len(), ids.len())
    );
    Ok((taken.to_vec(), how))
}

fn cut(
    tokens: &[u32],
    special: &str,
    join: &str,
    seq_len: usize,
    most: usize,
    material: &Material,
) -> Result<(Vec<Vec<u32>>, String), CalibrationError> {
    let total = tokens.len() / seq_len;
    if total == 0 {
        return Err(CalibrationError::TooShort {
            path: material.place(),
            found: tokens.len(),
            needed: seq_len,
        });
    }
    let ids: Vec<Vec<u32>> = tokens
        .chunks_exact(seq_len)
        .take(most)
        .map(<[u32]>::to_vec)
        .collect();
    let how = format!(
        "{join} of {} tokens ({}), non-overlapping windows of {seq_len}, {}, remainder dropped",
        tokens.len(),
        special,
        count(ids.len(), total)
    );
    Ok((ids, how))
}

fn documents(
    rows: &Rows,
    seq_len: usize,
    most: usize,
    material: &Material,
    means: &Means<'_>,
) -> Result<(Vec<Vec<u32>>, String), CalibrationError> {
    let spec = WindowSpec {
        samples: DOCUMENT_WINDOWS.min(most),
        seq_len,
        seed: DOCUMENT_SEED,
    };
    spec.check()?;
    let (bos, tokenizer) = (means.bos, means.tokenizer);
    let encode = |text: &str| encode(text, rows.is_rendered(), bos, tokenizer);
    let ids = draw_documents(rows, &spec, &material.place(), encode)?.ids;
    let how = format!(
        "one window of {seq_len} tokens ({}) at random in each of {DOCUMENT_WINDOWS} documents, drawn at random with replacement among those longer than it, seed {DOCUMENT_SEED}, {}",
        special_tokens(rows.is_rendered(), means)?,
        count(ids.len(), DOCUMENT_WINDOWS)
    );
    Ok((ids, how))
}

/// Special tokens in the text, apart from a BOS put in front of its windows.
fn special_tokens(is_rendered: bool, means: &Means<'_>) -> Result<String, CalibrationError> {
    if is_rendered {
        return Ok("special tokens as the chat template sets them".to_string());
    }
    let special = without_own(means.tokenizer.special_ids()?, means.bos);
    Ok(match special.len() {
        0 => "no special tokens".to_string(),
        1 => "1 special token added".to_string(),
        many => format!("{many} special tokens added"),
    })
}

fn count(taken: usize, total: usize) -> String {
    if taken == total {
        format!("all {total} windows")
    } else {
        format!("the first {taken} of {total} windows")
    }
}
