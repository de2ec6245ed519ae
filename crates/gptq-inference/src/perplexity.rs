//! Likelihoods of the windows of a text, block by block, so that a model that can be quantized on
//! a machine can also be evaluated there.

use gptq_model::{Decoder, HeadInput, ModelError, TokenScore};
use serde::{Deserialize, Serialize};

/// Final hidden states of a model that others are compared with on the same windows, in host
/// memory, and its head where it scores.
pub struct Reference(Vec<HeadInput>);

/// The score of one window.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WindowScore {
    /// Mean negative log-likelihood over the `seq_len - 1` predictions, nats.
    pub nll: f64,
    /// Against the reference, where one was given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub divergence: Option<Divergence>,
}

/// The divergence of a model from the reference on one window.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Divergence {
    /// Mean KL divergence, `sum p ln(p/q)` with `p` the reference, nats.
    pub kl: f64,
    /// Share of predictions whose likeliest token is the reference's.
    pub top1: f64,
    /// KL divergence of each prediction, nats. Single precision: kept for every position of a
    /// text, and logits hold no more.
    pub by_position: Vec<f32>,
}

impl WindowScore {
    fn is_finite(&self) -> bool {
        let is_finite = |found: &Divergence| {
            found.kl.is_finite() && found.by_position.iter().all(|kl| kl.is_finite())
        };
        self.nll.is_finite() && self.divergence.as_ref().is_none_or(is_finite)
    }
}

/// Runs all windows through the model and scores every next token inside each window.
/// `progress` hears of each block, and of the head as one more.
///
/// Fails on a likelihood that is not finite: such a model has no perplexity.
pub fn score_windows(
    decoder: &mut dyn Decoder,
    windows: &[Vec<u32>],
    reference: Option<&Reference>,
    progress: &mut dyn FnMut(),
) -> Result<Vec<WindowScore>, ScoreError> {
    score_each(decoder, windows, reference, progress, &mut |_| Ok(()))
}

/// Scores the windows of the reference, and keeps its final hidden states for the comparison with other models.
pub fn score_reference(
    decoder: &mut dyn Decoder,
    windows: &[Vec<u32>],
    progress: &mut dyn FnMut(),
) -> Result<(Vec<WindowScore>, Reference), ScoreError> {
    let mut kept = Vec::new();
    let scores = score_each(decoder, windows, None, progress, &mut |input| {
        kept.push(input.kept()?);
        Ok(())
    })?;
    Ok((scores, Reference(kept)))
}

fn score_each(
    decoder: &mut dyn Decoder,
    windows: &[Vec<u32>],
    reference: Option<&Reference>,
    progress: &mut dyn FnMut(),
    scored: &mut dyn FnMut(HeadInput) -> Result<(), ModelError>,
) -> Result<Vec<WindowScore>, ScoreError> {
    run_blocks(decoder, windows, progress)?;
    let mut scores = Vec::with_capacity(windows.len());
    for batch in 0..decoder.batches() {
        let input = decoder.head_input(batch)?;
        let targets = next_tokens(decoder.batch_windows(batch));
        let compared = reference.map(|Reference(inputs)| &inputs[batch]);
        let tokens = input.score(&targets, compared)?;
        let per_window = decoder.batch_windows(batch)[0].len() - 1;
        let of_windows = tokens.chunks(per_window);
        scores.extend(of_windows.map(|tokens| of_window(tokens, compared.is_some())));
        scored(input)?;
    }
    progress();
    match scores.iter().position(|score| !score.is_finite()) {
        Some(window) => Err(ScoreError::NotFinite { window }),
        None => Ok(scores),
    }
}

/// Windows that could not be scored.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum ScoreError {
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error("the likelihood of window {window} is not finite")]
    NotFinite { window: usize },
}

/// Hidden states of `windows` after the last block.
pub(crate) fn run_blocks(
    decoder: &mut dyn Decoder,
    windows: &[Vec<u32>],
    progress: &mut dyn FnMut(),
) -> Result<(), ModelError> {
    decoder.embed(windows)?;
    for index in 0..decoder.spec().blocks.len() {
        decoder.load_block(index)?;
        decoder.forward_block()?;
        progress();
    }
    Ok(())
}

/// Every row but the last of each window, with the token that follows it.
fn next_tokens(windows: &[Vec<u32>]) -> Vec<(usize, u32)> {
    let mut targets = Vec::new();
    let mut first = 0;
    for window in windows {
        let following = window.iter().skip(1).enumerate();
        targets.extend(following.map(|(row, &token)| (first + row, token)));
        first += window.len();
    }
    targets
}

fn of_window(tokens: &[TokenScore], compared: bool) -> WindowScore {
    let n = tokens.len() as f64;
    WindowScore {
        nll: tokens.iter().map(|token| token.nll).sum::<f64>() / n,
        divergence: compared.then(|| Divergence {
            kl: tokens.iter().map(|token| token.kl).sum::<f64>() / n,
            top1: tokens.iter().filter(|token| token.top1_agrees).count() as f64 / n,
            by_position: tokens.iter().map(|token| token.kl as f32).collect(),
        }),
    }
}
