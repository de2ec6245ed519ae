//! One file a command.

pub mod eval;
pub mod import;
pub mod inspect;
pub mod quantize;
pub mod verify;
