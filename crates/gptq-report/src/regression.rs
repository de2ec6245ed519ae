//! Accuracy regression: a verdict that compares a run or a folder with a baseline, as a table, as JUnit
//! and as GitHub annotations.
//!
//! A linear with the baseline's bytes passes, whatever error was measured. With other bytes its output
//! error is compared, since another kind of processor may round differently. Two checks need no such
//! tolerance: files with the baseline's codes but other words were packed differently; and files whose
//! error is not the one that the solver reported do not hold the solver's codes.

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

/// Measurements of a run of the recipe, or of a folder.
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
    /// The loss that the solver reported; absent without a record, or where the record is of other tokens.
    pub recorded: Option<LayerLoss>,
    /// sha256 of codes, scales, zeros and group indices.
    pub content: String,
    /// sha256 of the stored bytes by tensor.
    pub tensors: BTreeMap<String, String>,
}
