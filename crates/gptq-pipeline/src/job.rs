//! The settings of a run, its progress reports and its errors.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::estimate;
use crate::weights::WeightCheck;
use gptq_model::{ConfigError, DeviceContext, ModelError, Streams, TooLittleMemory};
use gptq_packer::{LayoutError, PackError, StageError, VerifyError};
use gptq_quantizer::QuantizeError;
use gptq_types::{
    CalibrationRecord, ColumnOrder, Divergence, LayerName, LayerRecord, QuantSpec, SourceError,
    SpecError, TensorSource,
};

/// A quantization to be done.
pub struct Job {
    /// The float checkpoint.
    pub source: Arc<dyn TensorSource>,
    /// Text of its `config.json`.
    pub config_json: String,
    /// The model as given, for records and `model_name_or_path`.
    pub model_name: String,
    /// The source of its tokenizer for records, if another folder.
    pub tokenizer: Option<String>,
    /// Settings.
    pub spec: QuantSpec,
    /// Token windows and how they were made; empty for `method rtn`.
    pub windows: Vec<Vec<u32>>,
    /// The description of the windows for the run record.
    pub calibration: Option<CalibrationRecord>,
    /// Files copied along with the weights: tokenizer, generation settings.
    pub companions: Vec<PathBuf>,
    /// The folder to publish.
    pub out_dir: PathBuf,
    /// Largest weight file.
    pub max_shard_bytes: u64,
    /// The check of all weights. On a GPU a run that begins waits for it only when its first block
    /// is to be vouched for; any other waits before it begins.
    pub check: WeightCheck,
    /// The device of the forward pass.
    pub device: DeviceContext,
    /// Resume an interrupted run.
    pub resume: bool,
    /// Name and version, `gptq-rs:0.1.0`.
    pub tool: String,
}

impl Job {
    /// The passes that it needs.
    pub fn streams(&self) -> Streams {
        estimate::streams(&self.spec)
    }

    /// Whether tokens are held out of the Hessian to choose column orders.
    pub fn holds_out(&self) -> bool {
        self.spec.order == ColumnOrder::Auto
    }

    /// Number of Hessian-sized matrices that this adds to the decoder's own.
    pub(crate) fn hessians_held_out(&self) -> usize {
        estimate::hessians_held_out(&self.spec)
    }
}

/// Compares the checkpoint in a folder with the float model. All its files but the run record are
/// there, and the device is free.
pub type Compare<'a> = dyn FnMut(&Path) -> Result<Vec<Divergence>, CompareError> + 'a;

/// A comparison that could not be made.
#[derive(Debug, thiserror::Error)]
#[error("{text}")]
pub struct CompareError {
    /// The error, its place and the value.
    pub text: String,
    /// Advice, apart from the cause.
    pub hint: Option<String>,
}

/// Progress of a run, in the order of events.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)]
pub enum Progress<'a> {
    /// Weights were checked and the output folder is ready.
    Begin { blocks: usize, resumed: usize },
    /// A linear was quantized, written and read back.
    Layer { record: &'a LayerRecord },
    /// The folder to write is the result of this very run.
    AlreadyDone,
    /// `resume` was asked for, and there was no interrupted run: one begins.
    NothingToResume,
    /// Something the user must know before the work.
    Warning(&'a str),
    /// An epoch of a block's training is done.
    Epoch { done: usize, epochs: usize },
    /// A block is done.
    Block { done: usize, blocks: usize },
    /// All files are written, and are compared with the float model.
    Comparing,
    /// The folder has its final name.
    Published,
}

/// A run that did not end in a published folder.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum PipelineError {
    #[error(transparent)]
    Spec(#[from] SpecError),
    #[error("{place}: {source}")]
    Config { place: String, source: ConfigError },
    #[error("{place}: {source}")]
    QuantizationConfig {
        place: String,
        source: gptq_packer::ConfigError,
    },
    #[error("{0} is quantized already")]
    AlreadyQuantized(String),
    #[error("the record does not say in which order the channels of `{0}` are stored")]
    UnknownOrder(LayerName),
    #[error("group size {group_size} is larger than the {in_features} input channels of `{layer}`")]
    GroupTooLarge {
        group_size: usize,
        in_features: usize,
        layer: LayerName,
    },
    #[error(
        "3-bit packing of {in_features} x {out_features} (`{layer}`) ends inside a run of 32 codes, \
         which no reader accepts"
    )]
    Unpackable {
        in_features: usize,
        out_features: usize,
        layer: LayerName,
    },
    #[error("no calibration windows were given")]
    NoWindows,
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error(transparent)]
    Weights(#[from] Arc<SourceError>),
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(transparent)]
    GpuMemory(#[from] TooLittleMemory),
    #[error(transparent)]
    Layout(#[from] LayoutError),
    #[error(transparent)]
    Stage(#[from] StageError),
    #[error("layer `{layer}`: {source}")]
    Quantize {
        layer: LayerName,
        source: QuantizeError,
    },
    #[error("layer `{layer}`: {source}")]
    Pack { layer: LayerName, source: PackError },
    #[error("layer `{layer}` reads back differently than it was solved: {source}")]
    Verify {
        layer: LayerName,
        source: VerifyError,
    },
    #[error(transparent)]
    Read(#[from] gptq_packer::ReadError),
    #[error("layer `{layer}` of the interrupted run cannot be read: {source}")]
    Reread {
        layer: LayerName,
        source: gptq_packer::ReadError,
    },
    #[error("the interrupted run in `{}` had another {what}: {found}, now {wanted}", path.display())]
    OtherSettings {
        path: PathBuf,
        what: String,
        found: String,
        wanted: String,
    },
    #[error("`{}`: {reason}", path.display())]
    Journal { path: PathBuf, reason: String },
    #[error("line {line} of `{}` is damaged: {reason}", path.display())]
    DamagedLine {
        path: PathBuf,
        line: usize,
        reason: String,
    },
    #[error("tensor `{name}` in `{}` is not what line {line} of the journal vouches for", folder.display())]
    DamagedTensor {
        folder: PathBuf,
        name: String,
        line: usize,
    },
    #[error("`{}` is finished, but there is no journal that says of what", .0.display())]
    Unvouched(PathBuf),
    #[error("`{}` cannot go with the checkpoint: {reason}", path.display())]
    Companion { path: PathBuf, reason: String },
    #[error(transparent)]
    FolderCheck(#[from] gptq_packer::FolderCheckError),
    #[error(transparent)]
    Compare(#[from] CompareError),
    #[error("{source}")]
    Kept {
        folder: PathBuf,
        finished: usize,
        blocks: usize,
        source: Box<PipelineError>,
    },
}

impl PipelineError {
    /// The underlying error, without the note that work was kept.
    pub(crate) fn cause(self) -> Self {
        match self {
            PipelineError::Kept { source, .. } => source.cause(),
            other => other,
        }
    }

    /// Advice, apart from the cause.
    pub fn hint(&self) -> Option<String> {
        match self {
            PipelineError::Kept {
                folder,
                finished,
                blocks,
                source,
            } => {
                let kept = format!(
                    "{finished} of {blocks} blocks are kept in `{}`; the same command with --resume goes on",
                    folder.display()
                );
                Some(match source.hint() {
                    Some(hint) => format!("{hint}; {kept}"),
                    None => kept,
                })
            }
            PipelineError::Compare(error) => error.hint.clone(),
            PipelineError::DamagedLine { line, .. } if *line > 1 => Some(redo_from(*line)),
            PipelineError::DamagedTensor { line, .. } => Some(redo_from(*line)),
            #[cfg(feature = "cuda")]
            PipelineError::Model(ModelError::Cuda(error))
            | PipelineError::Quantize {
                source: QuantizeError::Cuda(error),
                ..
            } => error.hint().map(|hint| hint.to_string()),
            _ => self.fixed_hint().map(str::to_string),
        }
    }

    fn fixed_hint(&self) -> Option<&'static str> {
        match self {
            PipelineError::Stage(StageError::PartialExists(_)) => {
                Some("pass --resume to go on with it, or delete the folder")
            }
            PipelineError::Stage(StageError::NoPartial(_)) => {
                Some("there is no interrupted run; leave out --resume")
            }
            PipelineError::Stage(StageError::Occupied(_) | StageError::LeadsNowhere(_)) => {
                Some("name a folder that does not exist yet")
            }
            PipelineError::Stage(StageError::TargetTaken { .. }) => {
                Some("move what is in the way to another place")
            }
            PipelineError::Stage(StageError::Locked(error)) => error.hint(),
            PipelineError::GpuMemory(TooLittleMemory { trains: true, .. }) => {
                Some("--effort balanced trains nothing")
            }
            PipelineError::GroupTooLarge { .. } => Some("use a smaller group, or `none`"),
            PipelineError::DamagedLine { .. } => {
                Some("what it says of the run cannot be known: delete the folder and begin anew")
            }
            PipelineError::Unvouched(_) => Some(
                "an older version left it so: rename it to publish it, or delete it and begin anew",
            ),
            PipelineError::Unpackable { .. } => Some("use 2, 4 or 8 bits"),
            PipelineError::OtherSettings { .. } => {
                Some("repeat the settings of the interrupted run, or delete its folder")
            }
            PipelineError::Quantize {
                source: QuantizeError::Singular { .. },
                ..
            } => Some("more or other calibration text makes the Hessian regular"),
            _ => None,
        }
    }
}

/// Lines of blocks build on those before, so that the last ones can be taken away.
fn redo_from(line: usize) -> String {
    format!(
        "nothing was deleted; take lines {line} and later out of journal.jsonl, and --resume makes \
         their blocks anew"
    )
}
