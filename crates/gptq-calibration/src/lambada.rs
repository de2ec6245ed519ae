//! LAMBADA: passages of which the last word is to be guessed (Paperno et al. 2016,
//! arXiv:1606.06031), in the version of OpenAI that the field's tables show.
//!
//! Cut and tokenized as the task `lambada_openai` of lm-evaluation-harness does it: the word is
//! what follows the last blank, blanks before it belong to it, the whole passage is tokenized as
//! one string, and the word's tokens are those by which it is longer than its context.

use crate::CalibrationError;
use crate::conversation::NoTemplate;
use crate::digest::token_sha256;
use crate::document::open;
use crate::json;
use crate::material::{Content, DatasetFiles, Material, Purpose, fetch_checked};
use crate::rows::Reading;
use crate::sample::check_ids;
use crate::source::{Format, Origin, Packing, Source};
use crate::tokenizer::Tokenizer;

const NAME: &str = "lambada";
const REPO: &str = "EleutherAI/lambada_openai";
const REVISION: &str = "900124bf3b8235c6daf21033af9948b3f07346c4";
const FILE: &str = "data/lambada_test_en.jsonl";
const SHA256: &str = "4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226";

/// A tokenized passage; its last tokens are the word.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Passage {
    /// Context and word.
    pub ids: Vec<u32>,
    /// Tokens of the word: at least 1, and fewer than `ids` holds.
    pub answer: usize,
}

/// Passages and how they were made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Passages {
    /// In the order of the file.
    pub passages: Vec<Passage>,
    /// File, count and rule, in words.
    pub protocol: String,
    /// sha256 of each passage's word length and ids, as little-endian u32.
    pub sha256: String,
}

impl Passages {
    /// The first `most` passages of `given`: `lambada` for the published file on the hub, or a
    /// file with a passage per row, as JSON lines, Parquet or Arrow.
    ///
    /// Fails when the file cannot be fetched or read, and names a row that holds no context and
    /// word.
    pub fn read(
        given: &str,
        most: Option<usize>,
        tokenizer: &Tokenizer,
        files: &dyn DatasetFiles,
    ) -> Result<Self, CalibrationError> {
        if most == Some(0) {
            return Err(CalibrationError::Spec {
                field: "lambada_examples",
                value: 0,
                expected: "at least 1".to_string(),
            });
        }
        let (rows, title, place) = match given {
            NAME => {
                let path = fetch_checked(REPO, REVISION, FILE, Some(SHA256), files)?;
                // A cache may store blobs without their names, so the dataset's name determines the format.
                let rows = json::read_rows(open(&path, Packing::Plain)?, &path, Reading::plain())?;
                (rows, format!("`{NAME}`"), path.display().to_string())
            }
            path => {
                let material =
                    Material::read(&file(path)?, Purpose::Evaluation, 0, &NoTemplate, files)?;
                let (title, place) = (material.title.clone(), material.place());
                match material.content {
                    Content::Rows(rows) if rows.is_plain() => (rows, title, place),
                    Content::Rows(_) => return Err(wrong_kind(path, "question and answer")),
                    _ => return Err(wrong_kind(path, "text")),
                }
            }
        };
        let taken = most.unwrap_or(usize::MAX).min(rows.len());
        let front = tokenizer.leading_ids()?;
        let passages = (0..taken)
            .map(|row| {
                let malformed = |reason| CalibrationError::Malformed {
                    path: place.clone(),
                    reason: format!("row {}: {reason}", row + 1),
                };
                tokenize(rows.get(row), &front, tokenizer)?.map_err(malformed)
            })
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Passages {
            protocol: format!(
                "last word of a passage: {title}, {}, {} in front, right if each token of the word \
                 is the likeliest after those before it",
                match taken == rows.len() {
                    true => format!("all {taken} passages"),
                    false => format!("the first {taken} of {} passages", rows.len()),
                },
                match front.len() {
                    0 => "no special token".to_string(),
                    1 => "1 special token".to_string(),
                    many => format!("{many} special tokens"),
                },
            ),
            sha256: digest(&passages),
            passages,
        })
    }

    /// Refuses a token that a model of `model_vocab` embeddings does not know.
    pub fn check_vocabulary(&self, model_vocab: usize) -> Result<(), CalibrationError> {
        let ids: Vec<Vec<u32>> = self.passages.iter().map(|p| p.ids.clone()).collect();
        check_ids(&ids, model_vocab)
    }
}

/// A path as a source; names of texts that have no last word to guess are refused.
fn file(path: &str) -> Result<Source, CalibrationError> {
    let unknown = || CalibrationError::UnknownSource {
        name: path.to_string(),
        known: format!("`{NAME}`, a file"),
    };
    let source = match Source::parse(path) {
        Err(CalibrationError::UnknownSource { .. }) => return Err(unknown()),
        other => other?,
    };
    match source.origin() {
        Origin::File(_, Format::Json | Format::Parquet | Format::Arrow) => Ok(source),
        Origin::File(_, format) => Err(wrong_kind(path, format.name())),
        _ => Err(unknown()),
    }
}

fn wrong_kind(path: &str, format: &'static str) -> CalibrationError {
    CalibrationError::Rule {
        name: NAME.to_string(),
        path: path.to_string(),
        format,
        needs: "a row per passage",
    }
}

/// Context and word; an inner error says why a text is no passage.
fn tokenize(
    text: &str,
    front: &[u32],
    tokenizer: &Tokenizer,
) -> Result<Result<Passage, &'static str>, CalibrationError> {
    let Some((context, word)) = text.rsplit_once(' ') else {
        return Ok(Err("no blank before a last word"));
    };
    let context = context.trim_end();
    if word.is_empty() || context.is_empty() {
        return Ok(Err("no word after a context"));
    }
    let before = tokenizer.encode_plain(context)?.len();
    let whole = tokenizer.encode_plain(text)?;
    if before == 0 || whole.len() <= before {
        return Ok(Err("the last word has no tokens of its own"));
    }
    Ok(Ok(Passage {
        answer: whole.len() - before,
        ids: [front, &whole].concat(),
    }))
}

fn digest(passages: &[Passage]) -> String {
    let words: Vec<Vec<u32>> = (passages.iter())
        .map(|passage| [&[passage.answer as u32], passage.ids.as_slice()].concat())
        .collect();
    token_sha256(&words)
}
