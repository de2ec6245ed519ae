//! A matrix of branches: what is kept about it in the repository, the making of a branch, cards.

mod branch;
mod cards;
mod lock;
mod make;
mod state;

pub use branch::Shared;
pub use cards::{card_info, read_branches, render};
pub use make::{make_all, make_together, tidy};
pub use state::{Evaluation, State, read_own, replace};

use std::fs::File;
use std::io::Read;
use std::path::Path;

use crate::failure::Failure;

/// Largest plan, card, template or record that is read.
const MAX_TEXT_BYTES: u64 = 64 << 20;

/// The text of a file that the user named; a pipe will do.
pub fn read_text(path: &Path) -> Result<String, Failure> {
    let failed = |reason: &str| Failure::new(format!("cannot read `{}`: {reason}", path.display()));
    let file = File::open(path).map_err(|error| failed(&error.to_string()))?;
    let mut text = String::new();
    let read = file.take(MAX_TEXT_BYTES + 1).read_to_string(&mut text);
    read.map_err(|error| failed(&error.to_string()))?;
    match text.len() as u64 > MAX_TEXT_BYTES {
        true => Err(failed("it has more than 64 MB")),
        false => Ok(text),
    }
}
