//! Questions of multiple choice, tokenized as lm-evaluation-harness 0.4.13 does it for the causal
//! models of transformers: text and choice as one string, of whose tokens those count that it is
//! longer by than the text alone.

use std::path::Path;

use gptq_types::outside_name::shown;
use serde_json::Value;

use crate::CalibrationError;
use crate::digest::token_sha256;
use crate::document::{MAX_TEXT_BYTES, open};
use crate::row_sink::{RowPlace, RowSink, shown_columns};
use crate::rows::limit;
use crate::sample::check_ids;
use crate::source::{Format, Packing, known_format};
use crate::task_layout::{TaskLayout, Worded, WordedChoice, is_python_space};
use crate::tokenizer::Tokenizer;
use crate::{json, table};

/// Number of columns shown in an error; they distinguish layouts.
const SHOWN_COLUMNS: usize = 12;

/// A choice with the text before it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// Text and choice; of a text that is too long, the end.
    pub ids: Vec<u32>,
    /// Tokens whose likelihood counts: at least 1, and fewer than `ids` holds.
    pub answer: usize,
    /// Characters of the choice in words.
    pub characters: usize,
}

/// A tokenized question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// In the order of the file.
    pub choices: Vec<Choice>,
    /// Index of the right one.
    pub right: usize,
}

/// Questions of one task, and how they were made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Questions {
    /// In the order of the file.
    pub questions: Vec<Question>,
    /// Whether likelihoods are also divided by the characters of the choice.
    pub has_acc_norm: bool,
    /// Layout, file, count and rule, in words.
    pub protocol: String,
    /// sha256 of what is right, and of each choice's sizes and ids, as little-endian u32.
    pub sha256: String,
    /// Choices whose text was cut at its start, since the model has no more positions.
    pub cut: usize,
}

impl Questions {
    /// The first `most` questions of a file with a question per row, as JSON lines, Parquet or Arrow;
    /// its columns say which task it is. A model of `positions` sees the last tokens of a longer text.
    ///
    /// Fails when the file cannot be read or has the columns of no task that is known, and names a row
    /// that holds no question.
    pub fn read(
        path: &Path,
        most: Option<usize>,
        tokenizer: &Tokenizer,
        positions: usize,
    ) -> Result<Self, CalibrationError> {
        if most == Some(0) {
            return Err(CalibrationError::Spec {
                field: "task_examples",
                value: 0,
                expected: "at least 1".to_string(),
            });
        }
        let mut rows = QuestionReader::new(path);
        rows.read()?;
        let place = || path.display().to_string();
        let layout = rows
            .layout
            .filter(|_| !rows.questions.is_empty())
            .ok_or_else(|| CalibrationError::Empty { path: place() })?;
        let taken = most.unwrap_or(usize::MAX).min(rows.questions.len());
        let cutter = Cutter::new(tokenizer, positions)?;
        let questions = (rows.questions[..taken].iter().enumerate())
            .map(|(row, question)| {
                let malformed = |reason| CalibrationError::Malformed {
                    path: place(),
                    reason: format!("row {}: {reason}", row + 1),
                };
                cutter.question(question)?.map_err(malformed)
            })
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Questions {
            protocol: protocol(layout, path, taken, rows.questions.len(), tokenizer)?,
            has_acc_norm: layout.has_acc_norm(),
            sha256: digest(&questions.iter().map(|(q, _)| q).collect::<Vec<_>>()),
            cut: questions.iter().map(|(_, cut)| cut).sum(),
            questions: questions
                .into_iter()
                .map(|(question, _)| question)
                .collect(),
        })
    }

    /// All choices, question after question.
    pub fn choices(&self) -> impl Iterator<Item = &Choice> {
        self.questions.iter().flat_map(|question| &question.choices)
    }

    /// Refuses a token that a model of `model_vocab` embeddings does not know.
    pub fn check_vocabulary(&self, model_vocab: usize) -> Result<(), CalibrationError> {
        let ids: Vec<Vec<u32>> = self.choices().map(|choice| choice.ids.clone()).collect();
        check_ids(&ids, model_vocab)
    }
}

fn protocol(
    layout: TaskLayout,
    path: &Path,
    taken: usize,
    all: usize,
    tokenizer: &Tokenizer,
) -> Result<String, CalibrationError> {
    let file = path.file_name().unwrap_or(path.as_os_str());
    let count = match taken == all {
        true => format!("all {all} questions"),
        false => format!("the first {taken} of {all} questions"),
    };
    let special = match tokenizer.special_ids()?.len() {
        0 => "no special token".to_string(),
        1 => "1 special token".to_string(),
        many => format!("{many} special tokens"),
    };
    let normed = match layout.has_acc_norm() {
        true => ", acc_norm: that with the largest over its characters",
        false => "",
    };
    Ok(format!(
        "multiple choice of {}: `{}`, {count} without examples, {special} added, \
         acc: the choice with the largest log-likelihood is right{normed}",
        layout.name(),
        file.to_string_lossy()
    ))
}

fn digest(questions: &[&Question]) -> String {
    let words: Vec<Vec<u32>> = (questions.iter())
        .map(|question| {
            let mut words = vec![question.right as u32, question.choices.len() as u32];
            for choice in &question.choices {
                let sizes = [choice.answer, choice.characters, choice.ids.len()];
                words.extend(sizes.map(|size| size as u32));
                words.extend(&choice.ids);
            }
            words
        })
        .collect();
    token_sha256(&words)
}

/// Cuts choices into tokens.
struct Cutter<'a> {
    tokenizer: &'a Tokenizer,
    positions: usize,
    /// A text that begins with it gets no special tokens.
    mark: Option<String>,
}

impl<'a> Cutter<'a> {
    fn new(tokenizer: &'a Tokenizer, positions: usize) -> Result<Self, CalibrationError> {
        let begin = (tokenizer.bos_id()).or(tokenizer.eos_ids().first().copied());
        let mark = begin.map(|id| tokenizer.decode(&[id], false)).transpose()?;
        Ok(Cutter {
            tokenizer,
            positions,
            mark: mark.filter(|mark| !mark.is_empty()),
        })
    }

    fn encode(&self, text: &str) -> Result<Vec<u32>, CalibrationError> {
        match self
            .mark
            .as_ref()
            .is_some_and(|mark| text.starts_with(mark))
        {
            true => self.tokenizer.encode_plain(text),
            false => self.tokenizer.encode(text),
        }
    }

    /// A question, and the number of choices whose text was cut; an inner error describes a malformed row.
    fn question(
        &self,
        words: &Worded,
    ) -> Result<Result<(Question, usize), String>, CalibrationError> {
        let (mut choices, mut cut) = (Vec::new(), 0);
        for (index, choice) in words.choices.iter().enumerate() {
            match self.choice(choice)? {
                Ok((choice, is_cut)) => {
                    choices.push(choice);
                    cut += usize::from(is_cut);
                }
                Err(reason) => return Ok(Err(format!("choice {} {reason}", index + 1))),
            }
        }
        let right = words.right;
        Ok(Ok((Question { choices, right }, cut)))
    }

    /// Spaces at the end of the text belong to what follows, as most tokenizers have it.
    fn choice(
        &self,
        words: &WordedChoice,
    ) -> Result<Result<(Choice, bool), String>, CalibrationError> {
        let context = words.context.trim_end_matches(is_python_space);
        if context.is_empty() {
            return Ok(Err("has no text before it".to_string()));
        }
        let before = self.encode(context)?.len();
        let mut ids = self.encode(&(words.context.clone() + &words.continuation))?;
        if before == 0 || ids.len() <= before {
            return Ok(Err("has no tokens of its own".to_string()));
        }
        let answer = ids.len() - before;
        if answer > self.positions {
            return Ok(Err(format!(
                "has {answer} tokens, the model has {} positions",
                self.positions
            )));
        }
        // Nothing follows the last token, so it needs no position.
        let over = ids.len().saturating_sub(self.positions + 1);
        ids.drain(..over);
        let choice = Choice {
            ids,
            answer,
            characters: words.characters,
        };
        Ok(Ok((choice, over > 0)))
    }
}

/// Rows as questions.
struct QuestionReader<'a> {
    at: RowPlace<'a>,
    layout: Option<TaskLayout>,
    questions: Vec<Worded>,
    bytes: usize,
}

impl<'a> QuestionReader<'a> {
    fn new(path: &'a Path) -> Self {
        QuestionReader {
            at: RowPlace { path, line: None },
            layout: None,
            questions: Vec::new(),
            bytes: 0,
        }
    }

    fn read(&mut self) -> Result<(), CalibrationError> {
        let path = self.at.path;
        let name = path.to_string_lossy();
        match known_format(&name)? {
            Format::Parquet => table::hand_parquet(path, self),
            Format::Arrow => table::hand_arrow(path, self),
            Format::Json => json::hand_rows(open(path, Packing::of(&name))?, path, self),
            format => Err(CalibrationError::Rule {
                name: "task".to_string(),
                path: shown(&name, 80),
                format: format.name(),
                needs: "a row per question",
            }),
        }
    }

    fn number(&self) -> usize {
        self.questions.len() + 1
    }
}

impl RowSink for QuestionReader<'_> {
    fn begin(
        &mut self,
        place: String,
        names: &[&str],
        _: &dyn Fn(&str) -> bool,
    ) -> Result<(), CalibrationError> {
        self.layout = TaskLayout::among(names);
        match self.layout {
            Some(_) => Ok(()),
            None => Err(CalibrationError::NoTask {
                place,
                known: TaskLayout::known(),
                found: shown_columns(names, SHOWN_COLUMNS),
            }),
        }
    }

    fn begin_strings(&mut self) -> Result<(), CalibrationError> {
        Err(self.wrong("is a string, expected columns".to_string()))
    }

    fn is_empty(&self) -> bool {
        self.layout.is_none()
    }

    fn is_full(&self) -> bool {
        false
    }

    fn columns(&self) -> Vec<&str> {
        self.layout
            .map_or(Vec::new(), |layout| layout.columns().to_vec())
    }

    fn wants_strings(&self) -> bool {
        false
    }

    fn push(&mut self, cells: Vec<Option<Value>>) -> Result<(), CalibrationError> {
        let Some(layout) = self.layout else {
            return Err(self.wrong("comes before its columns are known".to_string()));
        };
        let question = layout.question(&cells);
        let question = question.map_err(|reason| self.wrong(reason))?;
        let texts = question.choices.iter();
        self.bytes += texts
            .map(|choice| choice.context.len() + choice.continuation.len())
            .sum::<usize>();
        self.questions.push(question);
        limit(self.at.path, self.bytes, MAX_TEXT_BYTES)
    }

    fn set_line(&mut self, line: usize) {
        self.at.line = Some(line);
    }

    fn place(&self) -> String {
        self.at.words(self.number())
    }

    fn wrong(&self, reason: String) -> CalibrationError {
        self.at.wrong(self.number(), reason)
    }
}
