//! The words of the domain, shared by every other crate.
//!
//! Knows: quantization settings ([`QuantSpec`]), layer names, tensor descriptions, solved layers
//! the permutations of a matrix and the records that a run leaves behind; the two traits at which the crates meet,
//! [`TensorSource`] (weights come in) and [`ActivationSink`] (layer inputs come out).
//!
//! Does not know: files, bytes on disk, Burn, arithmetic beyond a cast. No I/O happens here.

mod baseline;
mod layer;
mod matrix;
mod record;
mod solved;
mod source;
mod spec;

pub use baseline::{
    BASELINE_SCHEMA, Baseline, EvaluationRequest, Figures, Inputs, LayerFigures, Overall, Recipe,
    Tolerance, Tolerances,
};
pub use layer::{ActivationSink, Activations, DeviceMatrix, LayerName, Stage, Weight};
pub use matrix::{
    Branch, BranchEvaluation, BranchRecord, CalibrationRequest, Permutation, PlannedBranch,
    Reading, branch_name, describe,
};
pub use record::{
    Accuracy, CalibrationRecord, EvalRecord, LayerRecord, PairedDifference, Phase, PhaseTimes,
    RUN_RECORD_SCHEMA, RunRecord, Speed, Warning,
};
pub use solved::{LayerLoss, SolvedLayer};
pub use source::{Dtype, SourceError, TensorInfo, TensorSource};
pub use spec::{Bits, CheckpointFormat, ColumnOrder, GroupSize, Method, QuantSpec, SpecError};
