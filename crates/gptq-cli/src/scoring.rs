//! Checkpoints scored on one text, against the first of them.

use std::ops::Range;
use std::time::Instant;

use gptq_calibration::{EvaluationWindows, Means, Source, Tokenizer, evaluation_windows};
use gptq_inference::{
    Evaluation, OpenedModel, Reference, ScoreError, WindowScore, group_tokens, groups,
    score_reference, score_windows, summarize,
};
use gptq_model::{DeviceContext, ModelSpec};
use gptq_types::EvalRecord;

use crate::args::HubArgs;
use crate::datasets::{HubFiles, ModelTemplate};
use crate::failure::Failure;
use crate::models::Model;
use crate::progress::Steps;
use crate::window_bos::window_bos;

/// A text to score on, and how much of it.
#[derive(Clone, Debug)]
pub struct ScoringText {
    pub dataset: String,
    pub column: Option<String>,
    pub seq_len: usize,
    pub max_windows: Option<usize>,
    /// Whether windows begin with BOS; by default as the model's family needs it.
    pub window_bos: Option<bool>,
}

impl ScoringText {
    fn source(&self) -> Result<Source, Failure> {
        let source = Source::parse(&self.dataset)?.with_column(self.column.clone())?;
        match source.is_generated() {
            true => Err(Failure::new(
                "`self` is for calibration: a model's own text says nothing of its perplexity",
            )),
            false => Ok(source),
        }
    }

    /// Refuses what is known to fail before the text is read.
    pub fn check(&self, model: &Model, spec: &ModelSpec) -> Result<(), Failure> {
        window_bos(self.window_bos, &self.source()?, model, spec).map(drop)
    }

    /// The windows, in the tokens of `model`.
    pub fn read(
        &self,
        model: &Model,
        spec: &ModelSpec,
        hub: &HubArgs,
    ) -> Result<EvaluationWindows, Failure> {
        let source = self.source()?;
        let tokenizer = Tokenizer::open(model.tokenizer_dir())?;
        let means = Means {
            tokenizer: &tokenizer,
            files: &HubFiles::new(hub),
            chat: &ModelTemplate::of(model),
            bos: window_bos(self.window_bos, &source, model, spec)?,
        };
        Ok(evaluation_windows(
            &source,
            self.seq_len,
            self.max_windows,
            &means,
        )?)
    }
}

/// Refuses a checkpoint whose logits have no counterpart in those of the first.
pub fn check_same_vocabulary(first: (&str, usize), other: (&str, usize)) -> Result<(), Failure> {
    match first.1 == other.1 {
        true => Ok(()),
        false => Err(Failure::new(format!(
            "{} has {} tokens in its vocabulary, {} has {}",
            other.0, other.1, first.0, first.1
        ))),
    }
}

/// The record of a checkpoint whose windows are all scored; `first` holds the scores of the reference
/// checkpoint.
pub fn record(
    name: &str,
    (model, opened): (&Model, &OpenedModel),
    text: &EvaluationWindows,
    own: &[WindowScore],
    first: &[WindowScore],
) -> Result<EvalRecord, Failure> {
    let evaluation = summarize(own, first);
    let perplexity = perplexity(name, &evaluation)?;
    let record = EvalRecord {
        model: name.to_string(),
        kind: opened.kind(),
        protocol: text.protocol.clone(),
        token_sha256: text.token_sha256.clone(),
        windows: evaluation.windows,
        seq_len: text.ids.iter().map(Vec::len).max().unwrap_or(0),
        nll: evaluation.nll,
        nll_stderr: evaluation.nll_stderr,
        perplexity,
        weight_bytes: model.checkpoint.weight_bytes(),
        unread_keys: opened.spec.unread_keys.clone(),
        ..EvalRecord::default()
    };
    Ok(match evaluation.comparison {
        None => record,
        Some(found) => EvalRecord {
            kl: Some(found.kl),
            top1_agreement: Some(found.top1_agreement),
            kl_p999: Some(found.kl_p999),
            kl_by_position: found.kl_by_position,
            nll_difference: found.nll_difference,
            ..record
        },
    })
}

/// The perplexity of a checkpoint, which has to be a number.
pub fn perplexity(name: &str, evaluation: &Evaluation) -> Result<f64, Failure> {
    (evaluation.perplexity()).map_err(|error| Failure::new(format!("{name}: {error}")))
}

/// Scores one checkpoint after the other as they come into being; the first is the reference, and
/// its final hidden states are kept for all that follow.
pub struct Scorer<'a> {
    text: &'a EvaluationWindows,
    groups: Vec<Range<usize>>,
    device: DeviceContext,
    plain: bool,
    first: Option<First>,
}

struct First {
    name: String,
    vocab_size: usize,
    hidden: Vec<Reference>, // of each group
    scores: Vec<WindowScore>,
}

impl<'a> Scorer<'a> {
    /// `plain` prints progress as lines instead of a bar, for work that runs concurrently.
    pub fn new(text: &'a EvaluationWindows, device: DeviceContext, plain: bool) -> Self {
        Scorer {
            text,
            groups: groups(text.ids.iter().map(Vec::len), group_tokens(device.device())),
            device,
            plain,
            first: None,
        }
    }

    /// Runs all windows through `model`, which tables know as `name`.
    pub fn score(&mut self, name: &str, model: &Model) -> Result<EvalRecord, Failure> {
        let opened = model.open()?;
        let vocab_size = opened.spec.vocab_size;
        self.text.check_vocabulary(vocab_size)?;
        if let Some(first) = &self.first {
            check_same_vocabulary((&first.name, first.vocab_size), (name, vocab_size))?;
        }
        let start = Instant::now();
        let (scores, hidden) = self.run(name, &opened)?;
        let compared = self.first.as_ref().map(|first| first.scores.as_slice());
        let record = record(
            name,
            (model, &opened),
            self.text,
            &scores,
            compared.unwrap_or_default(),
        )?;
        self.first.get_or_insert(First {
            name: name.to_string(),
            vocab_size,
            hidden,
            scores,
        });
        Ok(EvalRecord {
            seconds: start.elapsed().as_secs_f64(),
            ..record
        })
    }

    fn run(
        &self,
        name: &str,
        opened: &OpenedModel,
    ) -> Result<(Vec<WindowScore>, Vec<Reference>), Failure> {
        let passes = (opened.spec.blocks.len() + 1) * self.groups.len();
        let mut steps = Steps::beside(&format!("{name}: scoring"), passes, self.plain);
        let mut done = 0;
        let (mut scores, mut hidden) = (Vec::new(), Vec::new());
        let mut decoder = opened.decoder(&self.device)?; // one for all groups: so is its head
        for (index, group) in self.groups.iter().enumerate() {
            let windows = &self.text.ids[group.clone()];
            let mut progress = || {
                done += 1;
                steps.set(done);
            };
            let first = self.first.as_ref().map(|first| &first.hidden[index]);
            let scored = match first {
                None => score_reference(decoder.as_mut(), windows, &mut progress).map(
                    |(of_group, states)| {
                        hidden.push(states);
                        of_group
                    },
                ),
                first => score_windows(decoder.as_mut(), windows, first, &mut progress),
            };
            scores.extend(scored.map_err(|error| match error {
                ScoreError::Model(error) => error.into(),
                ScoreError::NotFinite { window } => {
                    let window = group.start + window;
                    Failure::new(format!(
                        "{name}: the likelihood of window {window} is not finite"
                    ))
                }
            })?);
        }
        steps.end();
        Ok((scores, hidden))
    }
}
