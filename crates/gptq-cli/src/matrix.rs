//! A matrix of branches: what is kept about it in the repository, the making of a branch, cards.

mod branch;
mod cards;
mod make;
mod state;

pub use branch::Shared;
pub use cards::{card_info, read_branches, render};
pub use make::{make_all, make_together};
pub use state::{Evaluation, State, replace};

use std::path::Path;

use crate::failure::Failure;

/// The text of a file that the user named.
pub fn read_text(path: &Path) -> Result<String, Failure> {
    std::fs::read_to_string(path)
        .map_err(|error| Failure::new(format!("cannot read `{}`: {error}", path.display())))
}
