//! The block loop: from an opened model and token windows to a published checkpoint folder.
//!
//! Knows: which permutations a matrix has and what each will be, which tensors a result has, the order of work
//! (one forward per block, each group of linears solved as its inputs arrive), the journal by which an
//! interrupted run goes on, what a run will take, what a reader of the result must be told, and what the files of a finished
//! checkpoint cost at each linear's output.
//!
//! Does not know: where models and texts come from, how progress is shown, bit order.

mod block_loop;
mod estimate;
mod fold;
mod job;
mod journal;
mod layers;
mod matrix;
mod measure;
mod plan;
mod preflight;
mod reconstruct;
mod resume;
mod run;
mod small_files;
mod together;
mod weights;
mod write;

pub use estimate::{GpuSpeed, Machine, check_gpu_memory, forecast, windows_of};
pub use job::{Compare, CompareError, Job, PipelineError, Progress};
pub use journal::JOURNAL_FILE;
pub use matrix::{PlanError, Preset, check_permutations, plan_matrix, read_plan};
pub use measure::{FilesToMeasure, MeasuredLayer, measure_files};
pub use plan::OutputPlan;
pub use preflight::{check_shapes, check_unquantized};
pub use resume::{is_interrupted, may_be_finished};
pub use run::{quantize, quantize_and_compare};
pub use small_files::check_beside;
pub use together::quantize_together;
pub use weights::{CheckedWeights, WeightCheck, check_weights};
