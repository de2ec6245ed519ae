//! The words of the domain, shared by every other crate.
//!
//! Knows: quantization settings ([`QuantSpec`]), layer names, tensor descriptions, solved layers,
//! the branches of a matrix, run records, hashes, and which names from outside may choose a path
//! ([`outside_name`]); the trait at which weights come in, [`TensorSource`]; and [`quietly`], the one
//! guard around libraries that panic on foreign bytes.
//!
//! Does not know: files, bytes on disk, Burn, arithmetic beyond a cast. No I/O happens here.

mod baseline;
mod forecast;
mod identity;
mod layer;
mod matrix;
pub mod outside_name;
mod quiet;
mod record;
mod solved;
mod source;
mod spec;
mod stand_in;

pub use baseline::{
    BASELINE_SCHEMA, Baseline, EvaluationRequest, Figures, Inputs, LayerFigures, Overall, Recipe,
    Tolerance, Tolerances,
};
pub use forecast::Forecast;
pub use identity::{ContentHash, ContentHasher, NotAHash, model_identity};
pub use layer::LayerName;
pub use matrix::{
    Branch, BranchEvaluation, BranchRecord, CalibrationRequest, Permutation, PlannedBranch,
    Reading, branch_name, describe, plan_branch_name,
};
pub use outside_name::OutsideNameError;
pub use quiet::{PanicMessage, quietly};
pub use record::{
    Accuracy, BlockTraining, CalibrationRecord, Divergence, EvalRecord, FileRecord, LEAST_KL,
    LayerRecord, PairedDifference, Phase, PhaseTimes, RUN_RECORD_SCHEMA, RunRecord, Share, Speed,
    Warning, kl,
};
pub use solved::{LayerLoss, LossMeasure, SolvedLayer};
pub use source::{Dtype, SourceError, TensorInfo, TensorSource};
pub use spec::{
    Bits, CheckpointFormat, ColumnOrder, Effort, GroupSize, Method, QuantSpec, SpecError,
};
pub use stand_in::{STAND_IN_BYTES, StandIn};
