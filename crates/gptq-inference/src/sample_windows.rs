//! Windows sampled from the model itself, for machines without any text.

use std::sync::Arc;

use gptq_model::{DeviceContext, ModelSpec, WeightSource};
use rayon::prelude::*;

use crate::draw::Draw;
use crate::{OpenedModel, RunError, Runner};

/// Sequences that grow in step: one read of the weights serves them all.
const SEQUENCES: usize = 32;

/// Settings of the sampled windows.
#[derive(Clone, Copy, Debug)]
pub struct SampleSpec {
    /// Windows.
    pub samples: usize,
    /// Tokens a window, the first one counted.
    pub seq_len: usize,
    /// Divides the logits; 1 samples from the model's own distribution.
    pub temperature: f32,
    /// Seed of the random draws; windows do not depend on the number of threads.
    pub seed: u64,
    /// The token that every window begins with, where the family needs one.
    pub bos: Option<u32>,
}

/// Samples windows token by token, each from a first token drawn uniformly over the vocabulary: a
/// chat model that starts from its beginning-of-sequence token opens every window with the same
/// system prompt. All blocks are resident while it runs.
/// `progress` hears of tokens done and all.
pub fn sample_windows(
    weights: Arc<dyn WeightSource>,
    model: ModelSpec,
    device: &DeviceContext,
    spec: SampleSpec,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Vec<Vec<u32>>, RunError> {
    let opened = OpenedModel {
        weights,
        packed: None,
        spec: model,
        quantization: None,
    };
    let mut runner = opened.runner(device)?;
    let all = spec.samples * spec.seq_len;
    let mut windows = Vec::with_capacity(spec.samples);
    while windows.len() < spec.samples {
        let first = windows.len();
        let count = SEQUENCES.min(spec.samples - first);
        let mut done = |tokens: usize| progress(first * spec.seq_len + tokens * count, all);
        windows.extend(grow(runner.as_mut(), spec, first, count, &mut done)?);
    }
    Ok(windows)
}

/// Windows `first..first + count`, in step.
fn grow(
    runner: &mut dyn Runner,
    spec: SampleSpec,
    first: usize,
    count: usize,
    done: &mut dyn FnMut(usize),
) -> Result<Vec<Vec<u32>>, RunError> {
    let vocab = runner.spec().vocab_size;
    let mut draws: Vec<Draw> = (0..count)
        .map(|at| Draw::new(spec.seed, (first + at) as u64))
        .collect();
    let begin = |draw: &mut Draw| {
        let token = (draw.uniform() * vocab as f64) as u32;
        spec.bos
            .into_iter()
            .chain([token])
            .take(spec.seq_len)
            .collect()
    };
    let mut windows: Vec<Vec<u32>> = draws.iter_mut().map(begin).collect();
    runner.reset(count, spec.seq_len)?;
    for position in 0..spec.seq_len - 1 {
        let last: Vec<u32> = windows.iter().map(|window| window[position]).collect();
        let logits = runner.step(&last)?;
        if windows[0].len() == position + 1 {
            let next: Vec<u32> = (logits.par_chunks(vocab).zip(&mut draws))
                .map(|(logits, draw)| draw.token(logits, spec.temperature))
                .collect();
            for (window, token) in windows.iter_mut().zip(next) {
                window.push(token);
            }
        }
        done(position + 2);
    }
    Ok(windows)
}
