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
mod batches;
mod budget;
#[cfg(feature = "cuda")]
mod burn_memory;
mod by_token;
mod config;
mod config_keys;
#[cfg(feature = "cuda")]
mod cuda;
mod device;
#[cfg(feature = "cuda")]
mod device_rows;
mod engine;
mod float_stream;
pub mod forward;
mod head;
mod operations;
mod read_block;
mod rope;
mod score;
pub mod spec;
mod stream;
mod tape;
mod training_sizes;
mod weights;

use std::ops::Range;
use std::sync::Arc;

use gptq_types::{Dtype, GroupSize, LayerName, SourceError};

use engine::Engine;

pub use batches::{STEP_TOKENS, STEP_WINDOWS, WindowRun};
pub use budget::{GpuMemory, GpuRun, TooLittleMemory};
pub use config::ConfigError;
#[cfg(feature = "cuda")]
pub use device::CudaContext;
pub use device::{Device, DeviceContext};
pub use gptq_kernels::{ActivationSink, Activations, Weight};
pub use read_block::norm_values;
pub use rope::RopeScaling;
pub use score::{HeadInput, TokenScore};
pub use spec::{CaptureGroup, LinearSpec, ModelSpec, Tap};
pub use tape::GradientSink;
pub use weights::{FloatWeights, LinearValues, LinearWeights, WeightSource, hash_checked};

/// Which forward passes a decoder makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Streams {
    /// The calibration stream alone: it passes through weights as they are replaced.
    One,
    /// The calibration stream, and a float stream through the original weights: sinks see both inputs of a
    /// capture group, [`ActivationSink::observe_pair`]. It takes the time of a pass, a copy of the block and of
    /// the hidden states.
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
    /// The device that it runs on.
    fn device(&self) -> &DeviceContext;

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

    /// The weight of a resident linear. One on a GPU may be written over in place.
    fn weight(&self, layer: &LayerName) -> Result<Weight<'_>, ModelError>;

    /// Replaces it with `values` `[in_features, out_features]`, so that later taps see the new outputs.
    fn replace_weight(&mut self, layer: &LayerName, values: Vec<f32>) -> Result<(), ModelError>;

    /// Batches that the windows were cut into.
    fn batches(&self) -> usize;

    /// Final hidden states of one batch with the head, in the order of the windows.
    fn head_input(&mut self, batch: usize) -> Result<HeadInput, ModelError>;

    /// The windows of one batch.
    fn batch_windows(&self, batch: usize) -> &[Vec<u32>];
}

/// A decoder whose resident block can be trained towards the outputs of the float block: its float stream
/// follows all tokens, and the hidden states before the block are kept.
pub trait Trainer: Decoder {
    /// Brings the float stream behind the resident block, ahead of the other: its hidden states are then what
    /// the block is trained towards.
    fn finish_float(&mut self) -> Result<(), ModelError>;

    /// The batches of each step of training: at most [`STEP_WINDOWS`] windows, of one length, and
    /// [`STEP_TOKENS`] tokens where one window has no more. The same windows on every device.
    fn steps(&self) -> Vec<Range<usize>>;

    /// Passes a batch through the whole resident block, from the hidden states before it, and shows the
    /// gradient of `factor / 2` times its error at each linear to `sink`. In sixteen bits the factor
    /// keeps gradients in range.
    fn train(
        &mut self,
        batch: usize,
        factor: f32,
        sink: &mut dyn GradientSink,
    ) -> Result<(), ModelError>;

    /// The error of a batch: the sum over its rows of `|y - t|^2`, with the block's output `y` and that of the
    /// float stream `t`, each divided as `gptq_kernels::RowScale` says.
    fn output_error(&mut self, batch: usize) -> Result<f64, ModelError>;

    /// Takes all batches back to the hidden states before the resident block, so that they pass through it as
    /// it is now.
    fn restart_block(&mut self) -> Result<(), ModelError>;
}

/// Opens a decoder that trains; every tensor is checked for presence and shape at once. Groups of `group_size`
/// channels say how large the grids are.
pub fn open_trainer(
    source: Arc<dyn WeightSource>,
    spec: ModelSpec,
    device: &DeviceContext,
    group_size: GroupSize,
) -> Result<Box<dyn Trainer>, ModelError> {
    spec.check_tensors(source.as_ref())?;
    let context = device.clone();
    match device {
        DeviceContext::Cpu => Ok(Box::new(Engine::<burn::backend::Flex>::for_training(
            context,
            (),
            source,
            spec,
            group_size,
        ))),
        #[cfg(feature = "cuda")]
        DeviceContext::Cuda(cuda) => {
            let on = cuda::OnCuda::new(cuda.clone());
            match source.computing_type(&spec) {
                Some(Dtype::BF16) => Ok(Box::new(Engine::<cuda::Bf16>::for_training(
                    context,
                    on,
                    source,
                    spec.computed_in(Dtype::BF16),
                    group_size,
                ))),
                _ => Ok(Box::new(Engine::<cuda::F16>::for_training(
                    context,
                    on,
                    source,
                    spec.computed_in(Dtype::F16),
                    group_size,
                ))),
            }
        }
    }
}

/// Opens a decoder over `source`; every tensor is checked for presence and shape at once.
pub fn open(
    source: Arc<dyn WeightSource>,
    spec: ModelSpec,
    device: &DeviceContext,
    streams: Streams,
) -> Result<Box<dyn Decoder>, ModelError> {
    spec.check_tensors(source.as_ref())?;
    let context = device.clone();
    match device {
        DeviceContext::Cpu => Ok(Box::new(Engine::<burn::backend::Flex>::new(
            context,
            (),
            source,
            spec,
            streams,
        ))),
        #[cfg(feature = "cuda")]
        DeviceContext::Cuda(cuda) => {
            let on = cuda::OnCuda::new(cuda.clone());
            match source.computing_type(&spec) {
                Some(Dtype::BF16) => Ok(Box::new(Engine::<cuda::Bf16>::new(
                    context,
                    on,
                    source,
                    spec.computed_in(Dtype::BF16),
                    streams,
                ))),
                _ => Ok(Box::new(Engine::<cuda::F16>::new(
                    context,
                    on,
                    source,
                    spec.computed_in(Dtype::F16),
                    streams,
                ))),
            }
        }
    }
}
