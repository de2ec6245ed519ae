//! Tiny models, texts, the command, and what it left on disk.

mod command;
mod data;
mod folder;
mod model;
mod random;
mod text;

pub use command::{Run, gptq, json, quantize, refused, run};
pub use data::{Cause, shared, skipped};
pub use folder::{edit_json, edit_tensor, entries, hashes, same_files, tensor, tensor_names};
pub use model::{Family, TinyModel, write_tensors};
pub use text::write_text;

use std::path::{Path, PathBuf};

/// The first `characters` of the text that stories260k was trained on.
pub fn tiny_stories(characters: usize) -> Option<String> {
    let file = shared("data/tinystories/tinystories_head_944k.txt")?;
    let text = std::fs::read_to_string(file).unwrap();
    Some(text.chars().take(characters).collect())
}

/// A model with a text of its own: stories260k, whose 172 channels no usual group size divides,
/// or, where it is absent, an untrained model of the same shapes.
pub fn small_model(folder: &Path) -> (PathBuf, PathBuf) {
    let text = folder.join("text.txt");
    let stories = (shared("data/stories260k"), tiny_stories(40_000));
    if let (Some(model), Some(story)) = stories {
        std::fs::write(&text, story).unwrap();
        return (model, text);
    }
    let model = folder.join("model");
    let shapes = TinyModel {
        ffn: 172,
        layers: 3,
        vocab: 512,
        ..TinyModel::new(Family::Llama)
    };
    shapes.write(&model);
    write_text(&text, shapes.vocab, 12_000);
    (model, text)
}
