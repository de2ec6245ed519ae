//! Calibration windows: the draws of `datautils.py` of the original GPTQ repository.

use std::collections::HashSet;

use gptq_types::CalibrationRecord;
use rayon::prelude::*;

use crate::CalibrationError;
use crate::begin::{put_in_front, text_spec, without_own, words};
use crate::digest::token_sha256;
use crate::distinct::{Place, contexts, positions, positions_of_windows};
use crate::evaluation::EvaluationWindows;
use crate::held_out;
use crate::manifest::Rule;
use crate::material::{Content, Material, Means, Purpose, join};
use crate::python_random::PythonRandom;
use crate::rows::Rows;
use crate::source::Source;
use crate::tokenizer::Tokenizer;

/// Tokens in all windows of one request: 16,000 times the papers' 128 windows of 2048.
const MAX_TOKENS: usize = 1 << 32;

/// Documents tokenized at once while one is looked for. Few documents of C4 hold 2048
/// tokens, so most of what is tokenized ahead is needed.
const LOOK_AHEAD: usize = 32;

/// The words of the rule for a file without a name.
const JOINED_WORDS: &str = "rows joined with \"\\n\\n\" and tokenised as one string";
const RENDERED_WORDS: &str =
    "rows one after the other, tokenised as one string without further special tokens";
const WHOLE_WORDS: &str = "the whole file tokenised as one string";
const STARTS_WORDS: &str =
    "after random.seed(seed) each window starts at random.randint(0, tokens - seq_len - 1)";

/// Number of windows, their length and seed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WindowSpec {
    /// Windows; the papers take 128.
    pub samples: usize,
    /// Tokens in a window; the papers take 2048.
    pub seq_len: usize,
    /// For CPython's `random.seed`; the papers take 0.
    pub seed: u64,
}

impl WindowSpec {
    /// Refuses no windows, empty ones, and more tokens than can be meant.
    pub fn check(&self) -> Result<(), CalibrationError> {
        let at_least_one = |field, value: usize| match value {
            0 => Err(CalibrationError::Spec {
                field,
                value,
                expected: "at least 1".to_string(),
            }),
            _ => Ok(()),
        };
        at_least_one("samples", self.samples)?;
        at_least_one("seq_len", self.seq_len)?;
        match self.samples.checked_mul(self.seq_len) {
            Some(tokens) if tokens <= MAX_TOKENS => Ok(()),
            _ => Err(CalibrationError::Spec {
                field: "samples",
                value: self.samples,
                expected: format!("at most {MAX_TOKENS} tokens in windows of {}", self.seq_len),
            }),
        }
    }
}

/// Token windows and the record of how they were made.
#[derive(Clone, Debug, PartialEq)]
pub struct Windows {
    /// Token ids, a vector per window.
    pub ids: Vec<Vec<u32>>,
    /// Their entry in the run record.
    pub record: CalibrationRecord,
}

impl Windows {
    /// Windows made elsewhere, such as text that the model generated.
    ///
    /// `rule` describes how they were made; `seed` is the one they were drawn with.
    pub fn from_ids(ids: Vec<Vec<u32>>, dataset: &str, rule: &str, seed: u64) -> Self {
        let distinct = positions_of_windows(&ids);
        Self::counted(ids, distinct, dataset, rule, seed)
    }

    /// Windows whose source has `distinct` positions that they cover.
    fn counted(ids: Vec<Vec<u32>>, distinct: usize, dataset: &str, rule: &str, seed: u64) -> Self {
        let tokens: usize = ids.iter().map(Vec::len).sum();
        let record = CalibrationRecord {
            dataset: dataset.to_string(),
            rule: rule.to_string(),
            seed,
            samples: ids.len(),
            seq_len: ids.iter().map(Vec::len).max().unwrap_or(0),
            tokens,
            token_sha256: token_sha256(&ids),
            distinct_positions: Some(distinct),
            distinct_contexts: Some(contexts(&ids)),
            overlap: Some(1.0 - distinct as f64 / tokens.max(1) as f64),
            ..CalibrationRecord::default()
        };
        Self { ids, record }
    }

    /// Prepends `bos`, if any, to each window. Counts of distinct text are unchanged, since a token common to
    /// all windows adds nothing.
    pub fn behind_bos(mut self, bos: Option<u32>) -> Self {
        let Some(bos) = bos else {
            return self;
        };
        put_in_front(&mut self.ids, bos);
        let record = &mut self.record;
        record.rule += &words(bos);
        record.seq_len += 1;
        record.tokens += self.ids.len();
        record.token_sha256 = token_sha256(&self.ids);
        record.window_bos = Some(true);
        self
    }

    /// Refuses a token that a model of `model_vocab` embeddings does not know.
    pub fn check_vocabulary(&self, model_vocab: usize) -> Result<(), CalibrationError> {
        check_ids(&self.ids, model_vocab)
    }
}

/// Calibration windows of `source` under its rule.
///
/// A named dataset has the rule of its manifest. Any other file is tokenized as one string (rows
/// joined with a blank line) and windows start anywhere in it. The first `samples` stored windows are
/// taken as they are, or all if there are fewer: nothing is drawn then, and the record holds their
/// actual number.
///
/// With a BOS in `means`, drawn windows begin with it and hold one token less of the text; stored windows
/// are unchanged.
///
/// Fails when the source is `self`, cannot be fetched or read, or is too short; a text needs
/// `seq_len + 1` tokens, because the original's draw never reaches the last start.
pub fn windows(
    source: &Source,
    spec: &WindowSpec,
    means: &Means<'_>,
) -> Result<Windows, CalibrationError> {
    windows_and_held_out(source, spec, 0, means).map(|(windows, _)| windows)
}

/// The windows of [`windows`], and `count` held-out windows of the same source; `None` if `count` is 0.
/// The calibration windows do not depend on `count`.
///
/// Held-out windows share no position of the text with calibration windows or with each other. In a joined
/// text they are spread evenly over the places between the calibration windows; among documents each comes
/// from a document of its own, by the draws that follow those of calibration; among stored windows they are
/// the next ones, without duplicates of earlier ones.
///
/// Fails as [`windows`] does, and where there are fewer than `count` such windows, or `count` of less
/// than 2 tokens.
pub fn windows_and_held_out(
    source: &Source,
    spec: &WindowSpec,
    count: usize,
    means: &Means<'_>,
) -> Result<(Windows, Option<EvaluationWindows>), CalibrationError> {
    spec.check()?;
    held_out::check(count, spec)?;
    let text_spec = &text_spec(spec, means.bos)?;
    // Not those that are held out: of a dataset more text would be read, and other windows drawn.
    let tokens = spec.samples.saturating_mul(spec.seq_len);
    let purpose = Purpose::Calibration;
    let material = Material::read(source, purpose, tokens, means.chat, means.files)?;
    let material = material.behind_bos(means.bos);
    let (drawn, rule, beside) = match (&material.content, material.rule) {
        (Content::Windows(ids), _) => {
            let beside = held_out::stored(ids, spec.samples, count, &material)?;
            let (ids, rule) = first_stored(ids, spec.samples);
            let windows = Windows::from_ids(ids, source.given(), &rule, spec.seed);
            return Ok((windows, beside));
        }
        (Content::Rows(rows), Rule::Documents) => {
            let (is_rendered, bos, tokenizer) = (rows.is_rendered(), means.bos, means.tokenizer);
            let encode = |text: &str| encode(text, is_rendered, bos, tokenizer);
            let mut search = Search::new(rows, text_spec);
            let drawn = search.draw(spec.samples, &material.place(), &encode)?;
            let beside = held_out::documents(search, &drawn, count, text_spec, &material, &encode)?;
            (drawn, material.words.clone().unwrap_or_default(), beside)
        }
        (Content::Rows(rows), Rule::Joined) => {
            let text = join(rows, &material.path)?;
            let tokens = encode(&text, rows.is_rendered(), means.bos, means.tokenizer)?;
            let words = match rows.is_rendered() {
                true => RENDERED_WORDS,
                false => JOINED_WORDS,
            };
            let (drawn, rule) = draw_joined(&tokens, words, text_spec, &material)?;
            let beside = held_out::joined(&tokens, &drawn, count, text_spec, &material)?;
            (drawn, rule, beside)
        }
        (Content::Whole(text), _) => {
            let tokens = encode(text, false, means.bos, means.tokenizer)?;
            let (drawn, rule) = draw_joined(&tokens, WHOLE_WORDS, text_spec, &material)?;
            let beside = held_out::joined(&tokens, &drawn, count, text_spec, &material)?;
            (drawn, rule, beside)
        }
    };
    let distinct = positions(&drawn.places, text_spec.seq_len);
    let (given, mut rule) = (source.given(), material.rows_words() + &rule);
    if material.bos.is_some() {
        rule += ", seq_len without BOS";
    }
    let windows = Windows::counted(drawn.ids, distinct, given, &rule, spec.seed);
    Ok((windows.behind_bos(material.bos), beside))
}

/// Windows and where each one lay.
pub(crate) struct Drawn {
    pub(crate) ids: Vec<Vec<u32>>,
    pub(crate) places: Vec<Place>,
}

/// Special tokens are added once, but for texts of a chat template, which brings its own. A `bos` that
/// windows get is not at the start of the text too.
pub(crate) fn encode(
    text: &str,
    is_rendered: bool,
    bos: Option<u32>,
    tokenizer: &Tokenizer,
) -> Result<Vec<u32>, CalibrationError> {
    let tokens = match is_rendered {
        true => tokenizer.encode_plain(text),
        false => tokenizer.encode(text),
    };
    Ok(without_own(tokens?, bos))
}

fn first_stored(ids: &[Vec<u32>], samples: usize) -> (Vec<Vec<u32>>, String) {
    let rule = match ids.len() {
        all if all > samples => format!("windows as stored, the first {samples} of {all}"),
        _ => "windows as stored".to_string(),
    };
    (ids.iter().take(samples).cloned().collect(), rule)
}

fn draw_joined(
    tokens: &[u32],
    text_words: &str,
    spec: &WindowSpec,
    material: &Material,
) -> Result<(Drawn, String), CalibrationError> {
    let starts = window_starts(tokens.len(), spec, &material.place())?;
    let window = |&start: &usize| tokens[start..start + spec.seq_len].to_vec();
    let drawn = Drawn {
        ids: starts.iter().map(window).collect(),
        places: starts.iter().map(|&start| (0, start)).collect(),
    };
    let words = || format!("{text_words}; {STARTS_WORDS}");
    Ok((drawn, material.words.clone().unwrap_or_else(words)))
}

/// `random.seed(seed)`, then `random.randint(0, tokens - seq_len - 1)` per window.
pub(crate) fn window_starts(
    tokens: usize,
    spec: &WindowSpec,
    place: &str,
) -> Result<Vec<usize>, CalibrationError> {
    let starts = tokens.saturating_sub(spec.seq_len);
    if starts == 0 {
        return Err(CalibrationError::TooShort {
            path: place.to_string(),
            found: tokens,
            needed: spec.seq_len.saturating_add(1),
        });
    }
    let mut random = PythonRandom::new(spec.seed);
    Ok((0..spec.samples)
        .map(|_| random.below(starts as u64) as usize)
        .collect())
}

/// For each window: documents by `random.randint(0, documents - 1)` until one has more than
/// `seq_len` tokens, then a start in it.
///
/// The original accepts `seq_len` tokens too and then fails in `random.randint(0, -1)`; here such
/// a document is drawn again. Every other stream of draws is the original's.
pub(crate) fn draw_documents(
    rows: &Rows,
    spec: &WindowSpec,
    place: &str,
    encode: impl Fn(&str) -> Result<Vec<u32>, CalibrationError> + Sync,
) -> Result<Drawn, CalibrationError> {
    Search::new(rows, spec).draw(spec.samples, place, &encode)
}

/// The state between two draws.
pub(crate) struct Search<'a> {
    rows: &'a Rows,
    seq_len: usize,
    random: PythonRandom,
    /// Documents known to be too short, or not to be drawn again: not tokenized, and all of them means
    /// no answer.
    passed_over: HashSet<usize>,
    longest: usize,
}

impl<'a> Search<'a> {
    /// At the first draw of the seed.
    fn new(rows: &'a Rows, spec: &WindowSpec) -> Self {
        Search {
            rows,
            seq_len: spec.seq_len,
            random: PythonRandom::new(spec.seed),
            passed_over: HashSet::new(),
            longest: 0,
        }
    }

    /// The next `samples` windows.
    fn draw(
        &mut self,
        samples: usize,
        place: &str,
        encode: &(impl Fn(&str) -> Result<Vec<u32>, CalibrationError> + Sync),
    ) -> Result<Drawn, CalibrationError> {
        let found: Vec<(Place, Vec<u32>)> = (0..samples)
            .map(|_| self.next_window(place, encode))
            .collect::<Result<_, _>>()?;
        let (places, ids) = found.into_iter().unzip();
        Ok(Drawn { ids, places })
    }

    /// No window of this document from now on.
    pub(crate) fn pass_over(&mut self, document: usize) {
        self.passed_over.insert(document);
    }

    pub(crate) fn next_window(
        &mut self,
        place: &str,
        encode: &(impl Fn(&str) -> Result<Vec<u32>, CalibrationError> + Sync),
    ) -> Result<(Place, Vec<u32>), CalibrationError> {
        while self.passed_over.len() < self.rows.len() {
            let ahead = self.look_ahead();
            let encoded: Vec<_> = ahead
                .par_iter()
                .map(|document| match self.passed_over.contains(document) {
                    true => Ok(Vec::new()),
                    false => encode(self.rows.get(*document)),
                })
                .collect();
            for (document, tokens) in ahead.into_iter().zip(encoded) {
                let tokens = tokens?;
                // the stream moves by the draws that are used, not by those looked at
                self.random.below(self.rows.len() as u64);
                if tokens.len() > self.seq_len {
                    let start = self.random.below((tokens.len() - self.seq_len) as u64) as usize;
                    let window = tokens[start..start + self.seq_len].to_vec();
                    return Ok(((document, start), window));
                }
                self.longest = self.longest.max(tokens.len());
                self.passed_over.insert(document);
            }
        }
        Err(CalibrationError::NoLongDocument {
            path: place.to_string(),
            documents: self.rows.len(),
            longest: self.longest,
            needed: self.seq_len.saturating_add(1),
        })
    }

    /// The documents that come next if every one of them is too short.
    fn look_ahead(&self) -> Vec<usize> {
        let mut random = self.random.clone();
        (0..LOOK_AHEAD)
            .map(|_| random.below(self.rows.len() as u64) as usize)
            .collect()
    }
}

pub(crate) fn check_ids(ids: &[Vec<u32>], model_vocab: usize) -> Result<(), CalibrationError> {
    for (window, tokens) in ids.iter().enumerate() {
        let outside = tokens.iter().position(|&id| id as usize >= model_vocab);
        if let Some(position) = outside {
            return Err(CalibrationError::TokenOutOfRange {
                window,
                position,
                id: tokens[position],
                model_vocab,
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(samples: usize, seq_len: usize, seed: u64) -> WindowSpec {
        WindowSpec {
            samples,
            seq_len,
            seed,
        }
    }

    /// `[random.randint(0, tokens - seq_len - 1) for _ in range(samples)]` of CPython 3.11.
    #[test]
    fn starts_are_those_of_python() {
        let starts = window_starts(341_469, &spec(12, 2048, 0), "t").unwrap();
        let golden = [
            201979, 220500, 21225, 135746, 268055, 254766, 212302, 159023, 249874, 187720, 305860,
            114526,
        ];
        assert_eq!(starts, golden);
        let starts = window_starts(341_469, &spec(12, 2048, 1), "t").unwrap();
        let golden = [
            70445, 298426, 33086, 133729, 61823, 259750, 235662, 247592, 199027, 110076, 49209,
            255777,
        ];
        assert_eq!(starts, golden);
        let starts = window_starts(1000, &spec(10, 64, 3), "t").unwrap();
        assert_eq!(starts, [243, 606, 557, 133, 378, 618, 485, 640, 594, 67]);
    }

    #[test]
    fn a_text_of_exactly_one_window_is_too_short() {
        let error = window_starts(64, &spec(1, 64, 0), "t").unwrap_err();
        assert_eq!(error.to_string(), "t has 64 tokens, a window needs 65");
        assert_eq!(window_starts(65, &spec(2, 64, 0), "t").unwrap(), [0, 0]);
    }

    /// Document `d` of the given length is the tokens `1000 d, 1000 d + 1, ...`.
    fn documents(lengths: &[usize]) -> Rows {
        let mut rows = Rows::default();
        for (document, length) in lengths.iter().enumerate() {
            rows.push(&format!("{document} {length}"));
        }
        rows
    }

    fn encode(text: &str) -> Result<Vec<u32>, CalibrationError> {
        let (document, length) = text.split_once(' ').unwrap();
        let first = document.parse::<u32>().unwrap() * 1000;
        Ok((first..first + length.parse::<u32>().unwrap()).collect())
    }

    /// The loop of `get_c4` with `>` for `>=`, run by CPython 3.11 on these lengths.
    #[test]
    fn documents_and_their_starts_are_those_of_python() {
        let rows = documents(&[10, 40, 33, 32, 7, 64, 31, 100, 5, 12]);
        let golden = |seed, expected: &[(u32, u32)]| {
            let windows = draw_documents(&rows, &spec(expected.len(), 32, seed), "t", encode)
                .unwrap()
                .ids;
            let drawn: Vec<_> = windows.iter().map(|w| (w[0] / 1000, w[0] % 1000)).collect();
            assert_eq!(drawn, expected, "seed {seed}");
            assert!(windows.iter().all(|w| w.len() == 32));
        };
        golden(
            0,
            &[
                (7, 51),
                (7, 45),
                (2, 0),
                (2, 0),
                (2, 0),
                (1, 1),
                (5, 30),
                (1, 5),
                (5, 13),
                (7, 56),
                (1, 6),
                (7, 42),
            ],
        );
        golden(5, &[(5, 1), (7, 31), (2, 0), (5, 30), (1, 3), (2, 0)]);
    }

    #[test]
    fn a_search_without_an_answer_ends_and_says_what_it_saw() {
        let rows = documents(&[32, 5, 20]);
        let error = draw_documents(&rows, &spec(1, 32, 0), "t", encode)
            .err()
            .unwrap();
        assert_eq!(
            error.to_string(),
            "none of the 3 documents of t has 33 tokens, the longest has 32"
        );
    }

    #[test]
    fn requests_without_windows_or_without_end_are_refused() {
        let field = |spec: WindowSpec| match spec.check() {
            Err(CalibrationError::Spec { field, .. }) => field,
            other => panic!("{other:?}"),
        };
        assert_eq!(field(spec(0, 8, 0)), "samples");
        assert_eq!(field(spec(8, 0, 0)), "seq_len");
        assert_eq!(field(spec(usize::MAX, 2, 0)), "samples");
        assert!(spec(128, 2048, 0).check().is_ok());
    }

    #[test]
    fn given_windows_are_recorded_and_checked() {
        let windows = Windows::from_ids(vec![vec![1, 2, 3], vec![4]], "self", "temperature 1.0", 7);
        let record = &windows.record;
        assert_eq!((record.samples, record.seq_len, record.tokens), (2, 3, 4));
        assert_eq!((record.dataset.as_str(), record.seed), ("self", 7));
        assert_eq!(record.token_sha256, token_sha256(&windows.ids));
        assert!(windows.check_vocabulary(5).is_ok());
        let error = windows.check_vocabulary(4).unwrap_err();
        assert_eq!(
            error.to_string(),
            "token 0 of window 1 is 4, but the model's vocabulary ends before 4"
        );
    }
}
