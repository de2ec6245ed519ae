//! A checkpoint with all its blocks resident, one token a step.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "cuda")]
mod device_pass;
mod memory;
#[cfg(feature = "cuda")]
mod projection;

use gptq_model::{DeviceContext, ModelError, ModelSpec};
#[cfg(feature = "cuda")]
use gptq_types::Dtype;
use gptq_types::SourceError;

use crate::OpenedModel;

/// A checkpoint that cannot be run, or a call that cannot be met.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum RunError {
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error("sequence {sequence} holds {held} of {capacity} tokens, {more} more do not fit")]
    Full {
        sequence: usize,
        held: usize,
        capacity: usize,
        more: usize,
    },
    #[error("sequence {sequence} is not one of {batch}")]
    NoSequence { sequence: usize, batch: usize },
    #[error("{tokens} tokens were given to {batch} sequences, one each is needed")]
    NotOneEach { tokens: usize, batch: usize },
    #[error("a prompt of no tokens says nothing about the next one")]
    EmptyPrompt,
    #[error(
        "{batch} sequences of {capacity} tokens take {needed} beside the weights, {free} are free"
    )]
    Memory {
        batch: usize,
        capacity: usize,
        needed: String,
        free: String,
    },
    #[cfg(feature = "cuda")]
    #[error(transparent)]
    Cuda(#[from] gptq_kernels::cuda::CudaError),
}

impl RunError {
    /// Advice, apart from the cause.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            RunError::Model(error) => error.hint(),
            RunError::Memory { .. } => Some("ask for fewer tokens, or for fewer sequences"),
            #[cfg(feature = "cuda")]
            RunError::Cuda(error) => error.hint(),
            _ => None,
        }
    }
}

/// A checkpoint with all its blocks resident and a key-value cache: one token a step.
///
/// The order of calls: [`reset`](Runner::reset); [`prefill`](Runner::prefill) for each sequence;
/// then [`step`](Runner::step)s, between which further prompts may be appended. A sequence that no
/// prompt was given to begins with its first step. After an error the cache is to be reset.
pub trait Runner {
    /// The architecture.
    fn spec(&self) -> &ModelSpec;

    /// Forgets everything; makes room for `batch` sequences of `capacity` tokens each.
    fn reset(&mut self, batch: usize, capacity: usize) -> Result<(), RunError>;

    /// Appends a prompt to sequence `sequence`; logits `[vocab]` after its last token.
    fn prefill(&mut self, sequence: usize, tokens: &[u32]) -> Result<Vec<f32>, RunError>;

    /// Appends one token to each sequence (they may be of different lengths); logits
    /// `[batch, vocab]` row-major.
    fn step(&mut self, tokens: &[u32]) -> Result<&[f32], RunError>;

    /// Most bytes held at a time: GPU memory on a GPU; weights, cache and workspace on a processor.
    fn peak_memory(&self) -> u64;
}

impl OpenedModel {
    /// Loads all weights onto `device`, in the types that the files have them in.
    pub fn runner(&self, device: &DeviceContext) -> Result<Box<dyn Runner>, RunError> {
        self.check()?;
        match device {
            DeviceContext::Cpu => Ok(Box::new(cpu::CpuRunner::open(self)?)),
            #[cfg(feature = "cuda")]
            DeviceContext::Cuda(cuda) => {
                // f32 models run in f16.
                let computed = match self.weights.computing_type(&self.spec) {
                    Some(Dtype::BF16) => Dtype::BF16,
                    _ => Dtype::F16,
                };
                let rounded = OpenedModel {
                    weights: self.weights.clone(),
                    packed: self.packed.clone(),
                    spec: self.spec.clone().computed_in(computed),
                    quantization: self.quantization.clone(),
                };
                Ok(Box::new(cuda::GpuRunner::open(&rounded, cuda.gpu())?))
            }
        }
    }
}

/// The lengths of sequences, and the checks that both runners make before they touch the cache.
#[derive(Clone, Debug, Default)]
pub(crate) struct Lengths {
    capacity: usize,
    held: Vec<usize>, // tokens of each sequence
}

impl Lengths {
    pub fn new(batch: usize, capacity: usize) -> Self {
        Lengths {
            capacity,
            held: vec![0; batch],
        }
    }

    pub fn held(&self) -> &[usize] {
        &self.held
    }

    /// Counts a prompt in; returns its first position.
    pub fn append(
        &mut self,
        spec: &ModelSpec,
        sequence: usize,
        tokens: &[u32],
    ) -> Result<usize, RunError> {
        let batch = self.held.len();
        let Some(held) = self.held.get_mut(sequence) else {
            return Err(RunError::NoSequence { sequence, batch });
        };
        if tokens.is_empty() {
            return Err(RunError::EmptyPrompt);
        }
        known(spec, tokens)?;
        let first = *held;
        if tokens.len() > self.capacity.saturating_sub(first) {
            return Err(RunError::Full {
                sequence,
                held: first,
                capacity: self.capacity,
                more: tokens.len(),
            });
        }
        *held += tokens.len();
        Ok(first)
    }

    /// Counts a token a sequence in; `held` then counts it.
    pub fn append_each(&mut self, spec: &ModelSpec, tokens: &[u32]) -> Result<(), RunError> {
        let batch = self.held.len();
        if tokens.len() != batch || batch == 0 {
            return Err(RunError::NotOneEach {
                tokens: tokens.len(),
                batch,
            });
        }
        known(spec, tokens)?;
        if let Some(sequence) = self.held.iter().position(|&held| held >= self.capacity) {
            return Err(RunError::Full {
                sequence,
                held: self.capacity,
                capacity: self.capacity,
                more: 1,
            });
        }
        self.held.iter_mut().for_each(|held| *held += 1);
        Ok(())
    }
}

fn known(spec: &ModelSpec, tokens: &[u32]) -> Result<(), RunError> {
    let vocab_size = spec.vocab_size;
    match tokens.iter().find(|&&id| id as usize >= vocab_size) {
        Some(&id) => Err(ModelError::TokenOutsideVocabulary { id, vocab_size }.into()),
        None => Ok(()),
    }
}
