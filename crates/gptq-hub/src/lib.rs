//! Sources of models: folders, the hub, GGUF files, random weights.
//!
//! Knows: model folders ([`Checkpoint`]: one file or an index and its shards, every header checked
//! before the first tensor is read), `owner/name[:branch]` and the hub's cache layout
//! ([`resolve`], [`fetch_dataset_file`]), which files of a dataset hold a split
//! ([`find_dataset`]), GGUF files ([`import_gguf`]), models of random weights
//! ([`synth`]). It is the only crate that touches the network, and only with the cargo feature
//! `hub`.
//!
//! Does not know: architectures beyond their tensor names and configuration keys, GPTQ, tokens.
//! Nothing is printed; progress goes to a callback `(what, done, total)`, in bytes.

mod cache;
mod checkpoint;
#[cfg(feature = "hub")]
mod client;
mod companions;
#[cfg(test)]
#[path = "../../../tests/support/data.rs"]
mod data;
mod dataset;
#[cfg(feature = "hub")]
mod download;
mod eight_bit;
mod endpoint;
mod error;
mod folder;
pub mod gguf;
mod half_type;
mod push;
mod reference;
mod resolve;
mod synth;
mod tensor_names;
mod text_file;
#[cfg(feature = "hub")]
mod transfer;
#[cfg(feature = "hub")]
mod upload;
mod weight_files;

pub use checkpoint::Checkpoint;
pub use companions::is_companion;
pub use dataset::{FoundDataset, find_dataset};
pub use error::HubError;
pub use gguf::import::{ImportReport, import_gguf};
pub use half_type::HalfType;
pub use push::{Push, PushContent, PushFile, Pushed, push_branches};
pub use reference::{ModelRef, parse_model_ref};
pub use resolve::{Patience, ResolveOptions, fetch_dataset_file, resolve};
pub use synth::{ModelShape, ShapeFamily, SynthReport, SynthSpec, SynthWindows, synth};
