//! Windows sampled from the model itself, for machines without any text.

use std::sync::Arc;

use burn::tensor::Tensor;
use rayon::prelude::*;

use crate::backend::DecoderBackend;
use crate::block::Block;
use crate::engine::Engine;
use crate::weights::WeightSource;
use crate::{DecoderConfig, Device, ModelError, Streams};

/// Sequences that grow in step: one read of the weights serves them all.
const SEQUENCES: usize = 32;

/// What to sample.
#[derive(Clone, Copy, Debug)]
pub struct SampleSpec {
    /// Windows.
    pub samples: usize,
    /// Tokens a window, the first one counted.
    pub seq_len: usize,
    /// Divides the logits; 1 samples from the model's own distribution.
    pub temperature: f32,
    /// Of the random draws; windows do not depend on the number of threads.
    pub seed: u64,
}

/// Samples windows token by token, each from a first token drawn uniformly over the vocabulary: a
/// chat model that starts from its beginning-of-sequence token opens every window with the same
/// system prompt. All blocks are resident while it runs.
/// `progress` hears of tokens done and all.
pub fn sample_windows(
    source: Arc<dyn WeightSource>,
    config: DecoderConfig,
    device: Device,
    spec: SampleSpec,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Vec<Vec<u32>>, ModelError> {
    config.check_tensors(source.as_ref())?;
    match device {
        Device::Cpu => Sampler::<burn::backend::Flex>::new(source, config)?.run(spec, progress),
        #[cfg(feature = "cuda")]
        Device::Cuda { ordinal, memory } => {
            crate::cuda::select(ordinal, memory)?;
            crate::cuda::check_resident(config.num_hidden_layers, config.block_bytes() / 4)?;
            match source.computing_type() {
                Some(gptq_types::Dtype::BF16) => {
                    Sampler::<crate::cuda::Bf16>::new(source, config)?.run(spec, progress)
                }
                _ => Sampler::<crate::cuda::F16>::new(source, config)?.run(spec, progress),
            }
        }
    }
}

struct Sampler<B: DecoderBackend> {
    engine: Engine<B>,
    config: DecoderConfig,
    table: B::Table,
    blocks: Vec<Block<B>>,
}

impl<B: DecoderBackend> Sampler<B> {
    fn new(source: Arc<dyn WeightSource>, config: DecoderConfig) -> Result<Self, ModelError> {
        let engine = Engine::<B>::new(source, config.clone(), Streams::One)?;
        let blocks = (0..config.num_hidden_layers)
            .map(|index| engine.load(index))
            .collect::<Result<_, _>>()?;
        Ok(Sampler {
            table: engine.table()?,
            engine,
            config,
            blocks,
        })
    }

    fn run(
        &mut self,
        spec: SampleSpec,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Vec<Vec<u32>>, ModelError> {
        self.engine.check_window(spec.seq_len)?;
        let all = spec.samples * spec.seq_len;
        let mut windows = Vec::with_capacity(spec.samples);
        while windows.len() < spec.samples {
            let first = windows.len();
            let count = SEQUENCES.min(spec.samples - first);
            let mut done = |tokens: usize| progress(first * spec.seq_len + tokens * count, all);
            windows.extend(self.grow(spec, first, count, &mut done)?);
        }
        Ok(windows)
    }

    /// Windows `first..first + count`, in step.
    fn grow(
        &mut self,
        spec: SampleSpec,
        first: usize,
        count: usize,
        done: &mut dyn FnMut(usize),
    ) -> Result<Vec<Vec<u32>>, ModelError> {
        let mut draws: Vec<Draw> = (0..count)
            .map(|at| Draw::new(spec.seed, (first + at) as u64))
            .collect();
        let mut windows: Vec<Vec<u32>> = (draws.iter_mut())
            .map(|draw| vec![self.first_token(draw)])
            .collect();
        let mut caches: Vec<B::Cache> = (self.blocks.iter())
            .map(|block| block.cache(count, spec.seq_len))
            .collect();
        for position in 0..spec.seq_len - 1 {
            let last: Vec<u32> = windows.iter().map(|window| window[position]).collect();
            let hidden = self.step(&last, position, spec.seq_len, &mut caches)?;
            let logits = self.engine.head_of(hidden)?.logits()?;
            let next: Vec<u32> = logits
                .par_chunks(self.config.vocab_size)
                .zip(&mut draws)
                .map(|(logits, draw)| draw.token(logits, spec.temperature))
                .collect();
            for (window, token) in windows.iter_mut().zip(next) {
                window.push(token);
            }
            done(position + 2);
        }
        Ok(windows)
    }

    fn first_token(&self, draw: &mut Draw) -> u32 {
        (draw.uniform() * self.config.vocab_size as f64) as u32
    }

    /// Hidden states `[sequences, hidden_size]` after all blocks.
    fn step(
        &self,
        ids: &[u32],
        position: usize,
        tokens: usize,
        caches: &mut [B::Cache],
    ) -> Result<Tensor<B, 2>, ModelError> {
        let turn = B::turn(self.engine.rotation(position..position + 1, tokens));
        let mut hidden = self.engine.embed_ids(&self.table, ids)?;
        for (block, cache) in self.blocks.iter().zip(caches) {
            let attended = block.attend_cached(&block.attention_input(&hidden), &turn, cache);
            hidden = B::add(hidden, block.attention_out.forward(&attended));
            let gated = block.gated(&block.mlp_input(&hidden));
            hidden = B::add(hidden, block.mlp_out.forward(&gated));
        }
        Ok(hidden)
    }
}

/// A random stream (SplitMix64, Steele et al. 2014).
pub struct Draw(u64);

impl Draw {
    /// One of the streams of a seed, such as that of a window.
    pub fn new(seed: u64, window: u64) -> Self {
        let mut draw = Draw(seed ^ window.wrapping_mul(0xD1B5_4A32_D192_ED03));
        draw.next();
        draw
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// In `[0, 1)`, 53 bits.
    pub fn uniform(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// A token by its probability.
    fn token(&mut self, logits: &[f32], temperature: f32) -> u32 {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let weight = |&logit: &f32| f64::from((logit - max) / temperature).exp();
        let total: f64 = logits.iter().map(weight).sum();
        let mut left = self.uniform() * total;
        for (token, logit) in logits.iter().enumerate() {
            left -= weight(logit);
            if left < 0.0 {
                return token as u32;
            }
        }
        (logits.len() - 1) as u32
    }
}
