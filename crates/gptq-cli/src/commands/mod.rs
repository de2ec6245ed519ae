//! One file a command.

pub mod card;
pub mod chat;
pub mod doctor;
pub mod eval;
pub mod generate;
pub mod import;
pub mod inspect;
pub mod matrix;
pub mod pull;
pub mod push;
pub mod quantize;
pub mod regress;
pub mod report;
pub mod synth;
pub mod verify;
