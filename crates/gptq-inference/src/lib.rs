//! Reads what users read: checkpoints as they lie on disk, packed or not.
//!
//! Knows: packed linears as weights of the forward pass, perplexity, divergence from another
//! checkpoint, logits of given tokens.
//!
//! Does not know: how a checkpoint was made. Nothing of the solver or the pipeline is reachable
//! from here, so a number from this crate is a number about the files.

mod logits;
mod open;
mod packed;
mod perplexity;

pub use logits::{LogitComparison, compare, logits};
pub use open::{OpenError, OpenedModel, open};
pub use packed::PackedWeights;
pub use perplexity::{Evaluation, Reference, evaluate};
