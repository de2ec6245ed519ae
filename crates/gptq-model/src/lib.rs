//! Decoder architectures on Burn, one block at a time.
//!
//! Knows: a decoder as data ([`ModelSpec`]), read from `config.json` (one file a family under `arch`);
//! rotary scalings; a block's forward pass, written once over the operations of a device ([`forward`]);
//! passes of windows that can be stopped at the inputs of linears ([`Decoder::capture`]); scores of the
//! language-model head.
//!
//! Does not know: what the inputs are collected for, packed files, calibration data. Burn stays
//! inside: callers see `f32` slices, names and a run-time [`Device`].

mod arch;
mod backend;
mod batch;
#[cfg(feature = "cuda")]
mod budget;
mod by_token;
mod config;
mod config_keys;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "cuda")]
mod device_rows;
mod engine;
mod float_stream;
pub mod forward;
mod head;
mod read_block;
mod rope;
mod score;
pub mod spec;
mod stream;
mod weights;

use std::sync::Arc;

use gptq_types::{ActivationSink, Dtype, LayerName, SourceError, Weight};

pub use config::ConfigError;
pub use read_block::norm_values;
pub use rope::RopeScaling;
pub use score::{HeadInput, TokenScore};
pub use spec::{CaptureGroup, LinearSpec, ModelSpec, Tap};
pub use weights::{FloatWeights, LinearValues, LinearWeights, WeightSource, hash_checked};

/// Where the forward pass runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    /// Burn's Flex backend, with the products of `gptq-kernels`, in f32.
    Cpu,
    /// Burn's CUDA backend, likewise, in the model's own sixteen-bit type.
    #[cfg(feature = "cuda")]
    Cuda {
        /// `N` of `cuda:N`.
        ordinal: usize,
        /// Bytes of GPU memory that the whole run may take; activations beyond it wait in host
        /// memory.
        memory: usize,
    },
}

/// Which forward passes a decoder makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Streams {
    /// That of the weights as they are replaced.
    One,
    /// The same, and beside it that of the weights as they were: sinks see both inputs of a capture group,
    /// [`ActivationSink::observe_pair`]. It takes the time of a pass, a copy of the block and of the hidden
    /// states.
    BesideFloat,
}

/// A forward pass that cannot go on.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum ModelError {
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error("tensor `{name}` in {place} is not part of a {architecture} model")]
    Unexpected {
        name: String,
        place: String,
        architecture: String,
    },
    #[error(
        "`lm_head.weight` in {place} holds other values than the embedding, though config.json has `tie_word_embeddings`"
    )]
    AnotherHead { place: String },
    #[error(
        "token id {id} is outside the vocabulary of {vocab_size}: the tokenizer does not belong to the model"
    )]
    TokenOutsideVocabulary { id: u32, vocab_size: usize },
    #[error(
        "block {block} computes hidden states that are not finite: the model overflows {computed}, the type it runs in"
    )]
    NotFinite { block: usize, computed: Dtype },
    #[error("the logits are not finite")]
    LogitsNotFinite,
    #[error("layer `{0}` is not in the resident block")]
    NotResident(LayerName),
    #[cfg(feature = "cuda")]
    #[error(transparent)]
    Cuda(#[from] gptq_kernels::cuda::CudaError),
}

impl ModelError {
    /// The files are sound, but describe a model that is not computed here.
    pub fn is_unsupported(&self) -> bool {
        matches!(
            self,
            ModelError::Unexpected { .. } | ModelError::AnotherHead { .. }
        )
    }

    /// Advice, apart from the cause.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            #[cfg(feature = "cuda")]
            ModelError::Cuda(error) => error.hint(),
            ModelError::NotFinite {
                computed: Dtype::F16,
                ..
            } => Some("a model trained in bf16 may need it: f16 ends at 65504"),
            ModelError::NotFinite { .. } | ModelError::LogitsNotFinite => {
                Some("a weight is damaged, or config.json describes another model")
            }
            ModelError::AnotherHead { .. } => {
                Some("set tie_word_embeddings to false if the head is the one that was trained")
            }
            _ => None,
        }
    }
}

/// A decoder with one resident block and the hidden states of a set of token windows.
///
/// The order of calls: [`embed`](Decoder::embed); for each block
/// [`load_block`](Decoder::load_block), then either [`forward_block`](Decoder::forward_block) or
/// [`capture`](Decoder::capture) at the tap of each capture group, with weights replaced in between, and
/// [`finish_block`](Decoder::finish_block); at the end [`head_input`](Decoder::head_input).
pub trait Decoder {
    /// The architecture.
    fn spec(&self) -> &ModelSpec;

    /// Leaves room on the device for so many matrices more, each as large as the widest Hessian.
    fn leave_room(&mut self, hessians: usize);

    /// Starts a pass: hidden states are the embeddings of `windows`.
    fn embed(&mut self, windows: &[Vec<u32>]) -> Result<(), ModelError>;

    /// Makes block `index` the resident one; the one before is dropped.
    fn load_block(&mut self, index: usize) -> Result<(), ModelError>;

    /// Computes the rows at `tap` for every token and shows them to `sink`. Taps are visited in their order,
    /// each once.
    fn capture(&mut self, tap: Tap, sink: &mut dyn ActivationSink) -> Result<(), ModelError>;

    /// Computes what is left of the block behind the last tap.
    fn finish_block(&mut self) -> Result<(), ModelError>;

    /// The whole block, with nobody looking.
    fn forward_block(&mut self) -> Result<(), ModelError>;

    /// The weight of a resident linear. One on the device may be written over in place.
    fn weight(&self, layer: &LayerName) -> Result<Weight, ModelError>;

    /// Replaces it, so that later taps see the new outputs.
    fn replace_weight(&mut self, layer: &LayerName, weight: Weight) -> Result<(), ModelError>;

    /// Batches that the windows were cut into.
    fn batches(&self) -> usize;

    /// Final hidden states of one batch with the head, in the order of the windows.
    fn head_input(&mut self, batch: usize) -> Result<HeadInput, ModelError>;

    /// The windows of one batch.
    fn batch_windows(&self, batch: usize) -> &[Vec<u32>];
}

/// Makes the device ready for this thread, which [`open`] otherwise does: a second of a driver's time
/// that other work can hide.
pub fn prepare(device: Device) -> Result<(), ModelError> {
    match device {
        Device::Cpu => Ok(()),
        #[cfg(feature = "cuda")]
        Device::Cuda { ordinal, memory } => cuda::select(ordinal, memory),
    }
}

/// Opens a decoder over `source`; every tensor is checked for presence and shape at once.
pub fn open(
    source: Arc<dyn WeightSource>,
    spec: ModelSpec,
    device: Device,
    streams: Streams,
) -> Result<Box<dyn Decoder>, ModelError> {
    spec.check_tensors(source.as_ref())?;
    match device {
        Device::Cpu => Ok(Box::new(engine::Engine::<burn::backend::Flex>::new(
            source, spec, streams,
        ))),
        #[cfg(feature = "cuda")]
        Device::Cuda { ordinal, memory } => {
            cuda::select(ordinal, memory)?;
            match source.computing_type(&spec) {
                Some(Dtype::BF16) => Ok(Box::new(engine::Engine::<cuda::Bf16>::new(
                    source,
                    spec.computed_in(Dtype::BF16),
                    streams,
                ))),
                _ => Ok(Box::new(engine::Engine::<cuda::F16>::new(
                    source,
                    spec.computed_in(Dtype::F16),
                    streams,
                ))),
            }
        }
    }
}

/// The GPU that decoders of this thread run on, once one was opened there.
#[cfg(feature = "cuda")]
pub fn gpu() -> Option<Arc<gptq_kernels::cuda::Gpu>> {
    cuda::selected()
}
