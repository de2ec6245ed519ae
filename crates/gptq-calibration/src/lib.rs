//! Texts become token windows: exact, seeded, hashed.
//!
//! Knows: the registry of named datasets (`calibration/manifests`, embedded), the file kinds that
//! texts come in ([`Format`]), CPython's random numbers ([`PythonRandom`]), the sampling and
//! evaluation rules of the original GPTQ repository ([`windows`], [`evaluation_windows`]), the
//! passages of LAMBADA and questions of multiple choice as lm-evaluation-harness cuts them
//! ([`Passages`], [`Questions`]), and the hash by which two runs can tell that they saw the same
//! tokens ([`token_sha256`]).
//!
//! Does not know: the network (files of the hub come through [`DatasetFiles`]), models and
//! their templates ([`ChatTemplate`]), devices, and where generated windows come from: [`Windows::from_ids`] takes them as they are.
//!
//! The rules are copied to the last draw, so that a window of this crate is the window of the
//! papers. One deviation: a document of exactly `seq_len` tokens, on which the original stops with
//! a `ValueError`, is drawn again.

mod begin;
mod conversation;
mod digest;
mod distinct;
mod document;
mod error;
mod evaluation;
mod held_out;
mod json;
mod json_row;
mod lambada;
mod layout;
mod manifest;
mod material;
mod message_sizes;
mod nested;
mod page_sizes;
mod python_random;
mod row_sink;
mod rows;
mod sample;
mod sentencepiece;
mod source;
mod stored;
mod table;
mod task;
mod task_layout;
mod tokenizer;

pub use begin::window_bos;
pub use conversation::{ChatTemplate, NoTemplate, Turn};
pub use digest::{file_sha256, token_sha256};
pub use error::CalibrationError;
pub use evaluation::{EvaluationWindows, evaluation_windows};
pub use lambada::{Passage, Passages};
pub use manifest::{HubFile, Manifest, RawCopy, Rule};
pub use material::{DatasetFiles, FoundDataset, Means};
pub use python_random::PythonRandom;
pub use sample::{WindowSpec, Windows, windows, windows_and_held_out};
pub use source::{Dataset, Format, Origin, Source};
pub use task::{Choice, Question, Questions};
pub use tokenizer::{Tokenizer, rebuilt_tokenizer, special_tokens};
