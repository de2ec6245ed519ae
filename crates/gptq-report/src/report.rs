//! The report on finished branches: one data model, rendered as a page and as Markdown.
//!
//! [`Report::of`] joins run records with scores; everything after it only arranges what is there.
//! A value that no record holds stays absent: an en dash in a table, no point in a figure, never 0.

mod axis;
mod command;
mod data;
mod date;
mod degraded;
mod figures;
mod format;
mod html;
mod join;
mod labels;
mod layers;
mod markdown;
mod marks;
mod placing;
mod plot;
mod table;
#[cfg(test)]
mod tests;
mod words;

pub use command::quoted;
pub use data::{Found, FoundRun, Made, Report, ReportError, Row, Score, Text};
pub use degraded::{Damped, Dead, Degraded, Warned, Worse};
