//! Texts of which the last tokens are asked about, through a model.

use std::ops::Range;

use gptq_model::{Decoder, HeadInput, ModelError};

use crate::perplexity::run_blocks;

/// A text whose last tokens are asked about: a word to be guessed, a choice to be weighed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Passage {
    /// Context and answer.
    pub ids: Vec<u32>,
    /// Tokens of the answer: at least 1, and fewer than `ids` holds.
    pub answer: usize,
}

impl Passage {
    /// The tokens that the model reads: all but the last, which nothing follows.
    pub(crate) fn seen(&self) -> &[u32] {
        &self.ids[..self.ids.len() - 1]
    }

    /// The tokens that are asked about.
    pub(crate) fn answer(&self) -> &[u32] {
        &self.ids[self.ids.len() - self.answer..]
    }
}

/// A passage in a batch.
pub(crate) struct Asked {
    /// Index of the passage.
    pub(crate) passage: usize,
    /// Rows of the batch before each token of the answer.
    pub(crate) rows: Range<usize>,
}

/// Takes the final hidden states of a batch, and the passages in it.
pub(crate) type Look<'a> = dyn FnMut(&HeadInput, &[Asked]) -> Result<(), ModelError> + 'a;

/// Runs all passages through the model and hands each batch to `look`, with the passages in it.
///
/// Passages of one length go through a block together, without padding; what the model sees alike
/// goes through once, as where choices of one token follow one text. `progress` hears of each block,
/// and of the head as one more.
pub(crate) fn ask(
    decoder: &mut dyn Decoder,
    passages: &[Passage],
    progress: &mut dyn FnMut(),
    look: &mut Look<'_>,
) -> Result<(), ModelError> {
    let seen = |index: usize| passages[index].seen();
    let mut order: Vec<usize> = (0..passages.len()).collect();
    order.sort_by_key(|&index| (seen(index).len(), seen(index)));
    let alike: Vec<&[usize]> = order.chunk_by(|&a, &b| seen(a) == seen(b)).collect();
    let windows: Vec<Vec<u32>> = alike.iter().map(|same| seen(same[0]).to_vec()).collect();
    run_blocks(decoder, &windows, progress)?;
    let mut next = alike.into_iter();
    for batch in 0..decoder.batches() {
        let input = decoder.head_input(batch)?;
        let mut asked = Vec::new();
        let mut end = 0;
        for (window, same) in decoder.batch_windows(batch).iter().zip(&mut next) {
            end += window.len();
            asked.extend(same.iter().map(|&passage| Asked {
                passage,
                rows: end - passages[passage].answer..end,
            }));
        }
        look(&input, &asked)?;
    }
    progress();
    Ok(())
}
