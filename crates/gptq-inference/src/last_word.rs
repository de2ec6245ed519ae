//! The last word of a passage, guessed by greedy tokens: what LAMBADA counts.

use std::collections::HashMap;

use gptq_model::{Decoder, ModelError};

use crate::perplexity::run_blocks;

/// A passage whose last tokens are the word to be guessed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Passage {
    /// Context and word.
    pub ids: Vec<u32>,
    /// Tokens of the word: at least 1, and fewer than `ids` holds.
    pub answer: usize,
}

impl Passage {
    /// What the model sees: nothing follows the last token.
    fn seen(&self) -> &[u32] {
        &self.ids[..self.ids.len() - 1]
    }

    fn word(&self) -> &[u32] {
        &self.ids[self.ids.len() - self.answer..]
    }
}

/// Whether each passage's word is what the model would write: each token of it is the likeliest
/// one after the true tokens before it. Greedy writing takes the same tokens as long as they are
/// right, so one pass over the whole passage is enough.
///
/// Passages of one length go through a block together, without padding. `progress` hears of each
/// block, and of the head as one more.
pub fn guess_last_words(
    decoder: &mut dyn Decoder,
    passages: &[Passage],
    progress: &mut dyn FnMut(),
) -> Result<Vec<bool>, ModelError> {
    let mut order: Vec<usize> = (0..passages.len()).collect();
    order.sort_by_key(|&index| passages[index].ids.len());
    let windows: Vec<Vec<u32>> = (order.iter())
        .map(|&index| passages[index].seen().to_vec())
        .collect();
    run_blocks(decoder, &windows, progress)?;
    let mut right = HashMap::new();
    let mut next = order.into_iter();
    for batch in 0..decoder.batches() {
        let input = decoder.head_input(batch)?;
        let mut end = 0;
        let asked: Vec<(usize, usize)> = (decoder.batch_windows(batch).iter().zip(&mut next))
            .map(|(window, index)| {
                end += window.len();
                (index, end)
            })
            .collect();
        let rows: Vec<usize> = (asked.iter())
            .flat_map(|&(index, end)| end - passages[index].answer..end)
            .collect();
        let mut guessed = input.likeliest(&rows)?.into_iter();
        for (index, _) in asked {
            let passage = &passages[index];
            let guess: Vec<u32> = guessed.by_ref().take(passage.answer).collect();
            right.insert(index, guess == passage.word());
        }
    }
    progress();
    Ok((0..passages.len()).map(|index| right[&index]).collect())
}
