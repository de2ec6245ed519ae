//! One file a command.

pub mod doctor;
pub mod eval;
pub mod import;
pub mod inspect;
pub mod quantize;
pub mod synth;
pub mod verify;
