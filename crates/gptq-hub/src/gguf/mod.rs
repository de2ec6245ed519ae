//! GGUF files (llama.cpp's container) turned into model folders.
//!
//! ```text
//! "GGUF" | u32 version | u64 tensors | u64 keys | keys and values | tensor infos | padding | data
//! ```
//!
//! `header` parses and checks the header, [`read`] the bytes, [`dequant`] knows the block types,
//! [`narrow`] f16 and bf16, `architecture`, `names` and `config` the architectures, `tokenizer` the
//! vocabularies, [`import`] puts a folder together.

mod architecture;
mod config;
pub mod dequant;
mod header;
pub mod import;
mod names;
pub mod narrow;
mod pretokenizer;
pub mod read;
mod rope;
mod sentencepiece;
mod tokenizer;
mod value;
mod vocabulary;
mod windows;

pub use dequant::BlockType;
pub use read::{GgufFile, GgufTensor};
pub use value::Value;

#[cfg(test)]
pub(crate) mod fixture;
