//! Texts for the word-level tokenizer of [`super::TinyModel`].

use std::path::Path;

use super::random::Random;

/// Words that mostly follow from the word before, so that the text is not noise.
pub fn write_text(path: &Path, vocab: usize, words: usize) {
    let mut random = Random::new(7);
    let known = vocab as u64 - 1;
    let mut word = 0;
    let mut text = String::new();
    for index in 0..words {
        word = match random.next() % 4 {
            0 => random.next() % known,
            _ => (word * 5 + 3) % known,
        };
        text.push_str(&format!("w{word}"));
        text.push(if index % 20 == 19 { '\n' } else { ' ' });
    }
    std::fs::write(path, text).unwrap();
}
