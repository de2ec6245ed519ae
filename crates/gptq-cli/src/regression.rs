//! A baseline file and the run that it is compared with.

mod inputs;
mod outcome;
mod stored;

pub use inputs::{Place, check_same};
pub use outcome::{Bench, Measurement};
pub use stored::{read, write};
