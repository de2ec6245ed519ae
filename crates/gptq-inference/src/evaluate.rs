//! Several checkpoints on the same windows, passages and choices, a group at a time.
//!
//! A group is scored by every model before the next one begins, the reference first, so that its
//! final hidden states are needed for one group only. Memory is that of a group, however long the
//! text; the price is that each model's blocks are read once a group.

use std::ops::Range;
use std::time::Instant;

use gptq_model::{Device, DeviceContext, ModelError};

use crate::journal::{Entry, GroupShape, Journal, JournalError, Part, Place};
use crate::last_word::guess_last_words;
use crate::multiple_choice::weigh_choices;
use crate::open::{OpenError, OpenedModel};
use crate::passage::Passage;
use crate::perplexity::{Reference, ScoreError, WindowScore, score_reference, score_windows};

/// Tokens of a group: 16 windows of 2048. On two cores, opening SmolLM2-135M and reading all its
/// blocks and its head takes as long as passing some two hundred tokens through them, so a group
/// spends about one percent on it; more cores make it more.
const GROUP_TOKENS: usize = 32_768;

/// Tokens of a chunk on a GPU: 96 windows of 2048, three quarters of what a default calibration keeps. With
/// fewer the GPU, which is so much faster than the disk, would wait for blocks.
#[cfg(feature = "cuda")]
const GPU_GROUP_TOKENS: usize = 196_608;

/// Default number of tokens that go through a model together.
pub fn group_tokens(device: Device) -> usize {
    match device {
        Device::Cpu => GROUP_TOKENS,
        #[cfg(feature = "cuda")]
        Device::Cuda { .. } => GPU_GROUP_TOKENS,
    }
}

/// Consecutive windows of the given lengths, together at most `tokens` long; a longer window is a
/// group by itself.
pub fn groups(lengths: impl IntoIterator<Item = usize>, tokens: usize) -> Vec<Range<usize>> {
    let mut groups: Vec<Range<usize>> = Vec::new();
    let mut filled = 0;
    for (index, length) in lengths.into_iter().enumerate() {
        match groups.last_mut() {
            Some(group) if filled + length <= tokens => {
                group.end = index + 1;
                filled += length;
            }
            _ => {
                groups.push(index..index + 1);
                filled = length;
            }
        }
    }
    groups
}

/// The models and texts to score.
pub struct Request<'a> {
    /// The first is the reference.
    pub models: &'a [OpenedModel],
    /// The device to score on.
    pub device: &'a DeviceContext,
    /// Token ids, a vector per window.
    pub windows: &'a [Vec<u32>],
    /// Passages whose last word is to be guessed; may be empty.
    pub passages: &'a [Passage],
    /// Choices of questions with the text before them, question after question; may be empty.
    pub choices: &'a [Passage],
    /// See [`group_tokens`].
    pub group_tokens: usize,
}

/// The scores of one model.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Scores {
    /// A row per window; all models but the first are compared with it.
    pub windows: Vec<WindowScore>,
    /// Whether each passage was guessed, shortest passage first.
    pub answers: Vec<bool>,
    /// Log-likelihood of each choice, nats, in their order.
    pub choices: Vec<f64>,
    /// Wall seconds, those of earlier runs included.
    pub seconds: f64,
}

/// Progress of an evaluation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// Passes through a block or a head that are behind us.
    pub done: usize,
    /// The number of all steps.
    pub all: usize,
    /// The model at work.
    pub model: usize,
}

/// An evaluation that cannot go on.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum EvaluationError {
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error("{place}: the likelihood of window {window} is not finite")]
    NotFinite { place: String, window: usize },
    #[error("{place}: the likelihood of a choice is not finite")]
    ChoiceNotFinite { place: String },
    #[error(transparent)]
    Journal(#[from] JournalError),
}

impl EvaluationError {
    /// Advice, apart from the cause.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            EvaluationError::Model(error) => error.hint(),
            EvaluationError::Journal(error) => error.hint(),
            _ => None,
        }
    }
}

/// Scores what `journal` lacks and returns all of it, a [`Scores`] per model. The numbers are
/// those of an unbroken run: groups are cut the same way, and nothing of one enters another.
pub fn evaluate(
    request: &Request<'_>,
    journal: &mut Journal,
    progress: &mut dyn FnMut(Step),
) -> Result<Vec<Scores>, EvaluationError> {
    let of_windows = groups(request.windows.iter().map(Vec::len), request.group_tokens);
    let passages = ByLength::of(request.passages, request.group_tokens);
    let choices = ByLength::of(request.choices, request.group_tokens);
    journal.check(&|place| {
        let predictions = |window: &Vec<u32>| window.len().saturating_sub(1);
        (place.model < request.models.len()).then_some(())?;
        Some(match place.part {
            Part::Windows => GroupShape {
                predictions: request.windows[of_windows.get(place.group)?.clone()]
                    .iter()
                    .map(predictions)
                    .collect(),
                compared: place.model > 0,
                ..GroupShape::default()
            },
            Part::Passages => GroupShape {
                passages: passages.groups.get(place.group)?.len(),
                ..GroupShape::default()
            },
            Part::Choices => GroupShape {
                choices: choices.groups.get(place.group)?.len(),
                ..GroupShape::default()
            },
        })
    })?;
    let parts = [
        (Part::Windows, of_windows.len()),
        (Part::Passages, passages.groups.len()),
        (Part::Choices, choices.groups.len()),
    ];
    let mut run = Run {
        request,
        step: Step {
            done: 0,
            all: 0,
            model: 0,
        },
        progress,
        journal,
    };
    for (part, groups) in parts {
        run.count(part, groups);
    }
    (run.progress)(run.step);
    for (group, range) in of_windows.iter().enumerate() {
        run.windows(group, range.clone())?;
    }
    for (part, asked) in [(Part::Passages, &passages), (Part::Choices, &choices)] {
        for (group, range) in asked.groups.iter().enumerate() {
            run.passages(part, group, &asked.sorted[range.clone()])?;
        }
    }
    let of_model = |model| {
        let mut scores = Scores::default();
        for (part, groups) in parts {
            for group in 0..groups {
                let place = Place { part, group, model };
                let entry = run.journal.get(place).expect("every group was scored");
                scores.windows.extend_from_slice(&entry.windows);
                scores.answers.extend_from_slice(&entry.answers);
                scores.choices.extend_from_slice(&entry.likelihoods);
                scores.seconds += entry.seconds;
            }
        }
        scores.choices = choices.as_given(&scores.choices);
        scores
    };
    Ok((0..request.models.len()).map(of_model).collect())
}

/// Passages from the shortest to the longest, in groups: those of one length go side by side.
struct ByLength {
    sorted: Vec<Passage>,
    /// The original index of each passage.
    order: Vec<usize>,
    groups: Vec<Range<usize>>,
}

impl ByLength {
    fn of(passages: &[Passage], group_tokens: usize) -> Self {
        let mut order: Vec<usize> = (0..passages.len()).collect();
        order.sort_by_key(|&index| passages[index].ids.len());
        let sorted: Vec<Passage> = order.iter().map(|&at| passages[at].clone()).collect();
        let lengths = sorted.iter().map(|passage| passage.ids.len());
        ByLength {
            groups: groups(lengths, group_tokens),
            sorted,
            order,
        }
    }

    /// The values in the order in which the items were given.
    fn as_given(&self, found: &[f64]) -> Vec<f64> {
        let mut given = vec![0.0; found.len()];
        for (&at, &value) in self.order.iter().zip(found) {
            given[at] = value;
        }
        given
    }
}

struct Run<'a> {
    request: &'a Request<'a>,
    journal: &'a mut Journal,
    step: Step,
    progress: &'a mut dyn FnMut(Step),
}

impl Run<'_> {
    /// Adds the passes of a part to the count; those in the journal are behind us.
    fn count(&mut self, part: Part, groups: usize) {
        for group in 0..groups {
            for (model, opened) in self.request.models.iter().enumerate() {
                let passes = opened.spec.blocks.len() + 1;
                self.step.all += passes;
                if !self.is_due(Place { part, group, model }) {
                    self.step.done += passes;
                }
            }
        }
    }

    /// The reference is passed through again if anybody is to be compared with it.
    fn is_due(&self, place: Place) -> bool {
        let lacks = |model| self.journal.get(Place { model, ..place }).is_none();
        match (place.part, place.model) {
            (Part::Windows, 0) => (0..self.request.models.len()).any(lacks),
            _ => lacks(place.model),
        }
    }

    fn windows(&mut self, group: usize, range: Range<usize>) -> Result<(), EvaluationError> {
        let windows = &self.request.windows[range.clone()];
        let mut reference: Option<Reference> = None;
        for (model, opened) in self.request.models.iter().enumerate() {
            let place = Place {
                part: Part::Windows,
                group,
                model,
            };
            if !self.is_due(place) {
                continue;
            }
            let begun = Instant::now();
            let mut decoder = opened.decoder(self.request.device)?;
            let others_follow = model == 0 && self.request.models.len() > 1;
            let mut progress = self.passed(model);
            let scored = match others_follow {
                true => score_reference(decoder.as_mut(), windows, &mut progress)
                    .map(|(scores, hidden)| (scores, Some(hidden))),
                false => {
                    score_windows(decoder.as_mut(), windows, reference.as_ref(), &mut progress)
                        .map(|scores| (scores, None))
                }
            };
            drop(progress);
            let (windows, hidden) = scored.map_err(|error| match error {
                ScoreError::Model(error) => error.into(),
                ScoreError::NotFinite { window } => EvaluationError::NotFinite {
                    place: opened.weights.place(),
                    window: range.start + window,
                },
            })?;
            reference = hidden.or(reference);
            // An entry in the journal was scored by an earlier run, and keeps the seconds of that run.
            if self.journal.get(place).is_none() {
                self.journal.record(Entry {
                    place,
                    seconds: begun.elapsed().as_secs_f64(),
                    windows,
                    answers: Vec::new(),
                    likelihoods: Vec::new(),
                })?;
            }
        }
        Ok(())
    }

    /// A group of passages or choices.
    fn passages(
        &mut self,
        part: Part,
        group: usize,
        passages: &[Passage],
    ) -> Result<(), EvaluationError> {
        for (model, opened) in self.request.models.iter().enumerate() {
            let place = Place { part, group, model };
            if !self.is_due(place) {
                continue;
            }
            let begun = Instant::now();
            let mut decoder = opened.decoder(self.request.device)?;
            let decoder = decoder.as_mut();
            let (mut answers, mut likelihoods) = (Vec::new(), Vec::new());
            match part {
                Part::Choices => {
                    likelihoods = weigh_choices(decoder, passages, &mut self.passed(model))?;
                }
                _ => answers = guess_last_words(decoder, passages, &mut self.passed(model))?,
            }
            if !likelihoods.iter().all(|value| value.is_finite()) {
                let place = opened.weights.place();
                return Err(EvaluationError::ChoiceNotFinite { place });
            }
            self.journal.record(Entry {
                place,
                seconds: begun.elapsed().as_secs_f64(),
                windows: Vec::new(),
                answers,
                likelihoods,
            })?;
        }
        Ok(())
    }

    /// Counts a pass of `model` and tells of it.
    fn passed(&mut self, model: usize) -> impl FnMut() + '_ {
        move || {
            self.step.done += 1;
            self.step.model = model;
            (self.progress)(self.step);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_hold_what_fits_and_at_least_one_window() {
        assert_eq!(groups([4; 5], 8), [0..2, 2..4, 4..5]);
        assert_eq!(groups([4; 2], 100), vec![0..2]);
        assert_eq!(groups([3, 9, 3, 4, 5], 8), [0..1, 1..2, 2..4, 4..5]);
        assert!(groups([], 8).is_empty());
        assert_eq!(groups([4; 3], 0), [0..1, 1..2, 2..3]);
    }

    #[test]
    fn what_was_sorted_finds_its_place_again() {
        let passage = |tokens: usize| Passage {
            ids: vec![0; tokens],
            answer: 1,
        };
        let given = [5, 2, 9, 2, 3].map(passage);
        let sorted = ByLength::of(&given, 9);
        assert_eq!(sorted.groups, [0..3, 3..4, 4..5]);
        let lengths: Vec<f64> = (sorted.sorted.iter())
            .map(|passage| passage.ids.len() as f64)
            .collect();
        assert_eq!(lengths, [2.0, 2.0, 3.0, 5.0, 9.0]);
        assert_eq!(sorted.as_given(&lengths), [5.0, 2.0, 9.0, 2.0, 3.0]);
    }
}
