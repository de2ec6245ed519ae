//! Run records rendered for people.
//!
//! Knows: the comparison table of evaluated checkpoints, the summary of a quantization run and
//! its time profile, the table of a planned matrix and the model card of a finished one, the report
//! on finished branches as a page with figures, and whether a quantization is still worth what its
//! baseline says; all from records alone: any of them can be made again from JSON.
//!
//! Does not know: models, files, how a number was measured.

mod card;
mod comparison;
mod markup;
mod matrix;
mod profile;
mod regression;
mod report;
mod summary;

pub use card::{CardError, CardInfo, card};
pub use comparison::comparison;
pub use matrix::matrix_table;
pub use profile::{Rates, profile};
pub use regression::{
    Case, Finding, LayerOutcome, Measure, Outcome, Standing, Verdict, annotation, annotations,
    judge, junit, regression, tolerances,
};
pub use report::{
    Damped, Dead, Degraded, Found, FoundRun, Made, Report, ReportError, Row, Score, Text, Warned,
    Worse, quoted,
};
pub use summary::summary;
pub(crate) use summary::{divergence, measured, trained};

/// Bytes with a decimal unit, three digits.
fn size(bytes: u64) -> String {
    let units = ["B", "kB", "MB", "GB", "TB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < units.len() {
        value /= 1000.0;
        unit += 1;
    }
    format!(
        "{value:.*} {}",
        if unit == 0 || value >= 100.0 { 0 } else { 1 },
        units[unit]
    )
}
