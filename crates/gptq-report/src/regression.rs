//! Whether a quantization is still worth what it was: a verdict from a baseline and from what a run
//! or a folder gave, as a table, as JUnit and as annotations of GitHub.
//!
//! A linear with the baseline's bytes passes, whatever was measured on the way to it. With other
//! bytes its output error counts, since another kind of processor may round otherwise. Two things
//! need no tolerance of that kind: files that read as the baseline's and lie otherwise in their
//! words were packed otherwise; and files whose error is not the one that the solver reported do not
//! hold what it chose.

mod annotations;
mod junit;
mod table;
#[cfg(test)]
mod tests;
mod tolerances;
mod verdict;

use std::collections::BTreeMap;

use gptq_types::{LayerLoss, LayerName, Overall};

pub use annotations::{annotation, annotations};
pub use junit::junit;
pub use table::regression;
pub use tolerances::tolerances;
pub use verdict::{Case, Finding, Measure, Standing, Verdict, judge};

/// What a run of the recipe, or a folder, gave.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// Instruction set of the processor that it was measured on.
    pub processor: String,
    /// In the order of the data.
    pub layers: Vec<LayerOutcome>,
    /// Absent where the run stopped at a linear that was not stored as it was solved.
    pub overall: Option<Overall>,
    /// That linear, and what differs.
    pub unfaithful: Option<(LayerName, String)>,
}

/// One linear as the files have it.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerOutcome {
    /// Module name.
    pub layer: LayerName,
    /// Output error, measured from the files.
    pub file_error: f64,
    /// What the solver reported; absent where no record tells, or where it tells of other tokens.
    pub recorded: Option<LayerLoss>,
    /// sha256 of codes, scales, zeros and group indices.
    pub content: String,
    /// sha256 of the stored bytes by tensor.
    pub tensors: BTreeMap<String, String>,
}
