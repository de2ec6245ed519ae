//! Tiny models, texts, the command, and what it left on disk.

mod command;
mod data;
mod folder;
mod model;
mod random;
mod text;

pub use command::{Run, gptq, json, quantize, refused, run};
pub use data::{Cause, fixture, shared, skipped, smollm2};
pub use folder::{edit_json, edit_tensor, entries, hashes, same_files, tensor, tensor_names};
pub use model::{Family, Tensor, TinyModel, write_tensors, write_tokenizer};
pub use text::write_text;

use std::path::{Path, PathBuf};

/// Vocabulary of all random decoders of the fixtures.
const RANDOM_VOCAB: usize = 64;

/// A copy of `tests/fixtures/arch/NAME` that text can be given to and that never ends one by itself,
/// and a text of its words.
pub fn random_decoder(folder: &Path, name: &str) -> (PathBuf, PathBuf) {
    let (model, text) = (folder.join("model"), folder.join("text.txt"));
    std::fs::create_dir(&model).unwrap();
    for file in ["config.json", "model.safetensors"] {
        copy(&fixture("arch").join(name).join(file), &model.join(file));
    }
    edit_json(&model.join("config.json"), |config| {
        config.as_object_mut().unwrap().remove("eos_token_id");
    });
    write_tokenizer(&model, RANDOM_VOCAB);
    write_text(&text, RANDOM_VOCAB, 30_000);
    (model, text)
}

/// A model that has learned a text, and that text: copies, which the test may change.
pub fn small_model(folder: &Path) -> (PathBuf, PathBuf) {
    let (model, text) = (folder.join("model"), folder.join("text.txt"));
    std::fs::create_dir(&model).unwrap();
    for file in ["config.json", "model.safetensors", "tokenizer.json"] {
        copy(&fixture("verne").join(file), &model.join(file));
    }
    copy(&fixture("verne-calibration.txt"), &text);
    (model, text)
}

/// The content alone: sources may be read-only.
fn copy(from: &Path, to: &Path) {
    std::fs::write(to, std::fs::read(from).unwrap()).unwrap();
}
