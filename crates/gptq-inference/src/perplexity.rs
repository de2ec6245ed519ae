//! Perplexity over fixed windows, block by block, so that a model that can be quantised on a
//! machine can also be evaluated there.

use gptq_model::{Decoder, HeadInput, ModelError, TokenScore};

/// Final hidden states of a model that others are compared with; `[tokens, hidden]` floats.
pub struct Reference(Vec<HeadInput>);

/// Scores of one model.
#[derive(Clone, Debug, PartialEq)]
pub struct Evaluation {
    /// Mean over windows of the mean negative log-likelihood over `seq_len - 1` predictions, nats.
    pub nll: f64,
    /// Standard error of that mean over windows.
    pub nll_stderr: f64,
    /// Mean KL divergence from the reference in nats, where one was given.
    pub kl: Option<f64>,
    /// Share of positions whose likeliest token is the reference's, where one was given.
    pub top1_agreement: Option<f64>,
    /// Windows scored.
    pub windows: usize,
}

impl Evaluation {
    /// `exp(nll)`, the papers' perplexity: windows count alike, whatever text follows them.
    pub fn perplexity(&self) -> f64 {
        self.nll.exp()
    }
}

/// Runs all windows through the model and scores every next token inside each window. Returns
/// the final hidden states too, for models compared with this one.
/// `progress` hears of blocks done and all.
pub fn evaluate(
    decoder: &mut dyn Decoder,
    windows: &[Vec<u32>],
    reference: Option<&Reference>,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<(Evaluation, Reference), ModelError> {
    let blocks = decoder.config().num_hidden_layers;
    decoder.embed(windows)?;
    for index in 0..blocks {
        decoder.load_block(index)?;
        decoder.forward_block()?;
        progress(index + 1, blocks + 1);
    }
    let mut of_windows = Vec::with_capacity(windows.len());
    let mut kept = Vec::with_capacity(decoder.batches());
    for batch in 0..decoder.batches() {
        let input = decoder.head_input(batch)?;
        let targets = next_tokens(decoder.batch_windows(batch));
        let compared = reference.map(|Reference(inputs)| &inputs[batch]);
        let scores = input.score(&targets, compared)?;
        let per_window = decoder.batch_windows(batch)[0].len() - 1;
        of_windows.extend(scores.chunks(per_window).map(mean));
        kept.push(input);
    }
    progress(blocks + 1, blocks + 1);
    Ok((summarise(&of_windows, reference.is_some()), Reference(kept)))
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

struct WindowMean {
    nll: f64,
    kl: f64,
    top1: f64,
}

fn mean(scores: &[TokenScore]) -> WindowMean {
    let n = scores.len() as f64;
    WindowMean {
        nll: scores.iter().map(|score| score.nll).sum::<f64>() / n,
        kl: scores.iter().map(|score| score.kl).sum::<f64>() / n,
        top1: scores.iter().filter(|score| score.top1_agrees).count() as f64 / n,
    }
}

fn summarise(windows: &[WindowMean], compared: bool) -> Evaluation {
    let n = windows.len() as f64;
    let average = |f: fn(&WindowMean) -> f64| windows.iter().map(f).sum::<f64>() / n;
    let nll = average(|window| window.nll);
    let squares: f64 = windows
        .iter()
        .map(|window| (window.nll - nll).powi(2))
        .sum();
    Evaluation {
        nll,
        nll_stderr: (squares / (n - 1.0).max(1.0) / n).sqrt(),
        kl: compared.then(|| average(|window| window.kl)),
        top1_agreement: compared.then(|| average(|window| window.top1)),
        windows: windows.len(),
    }
}
