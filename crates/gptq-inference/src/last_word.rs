//! The last word of a passage, guessed by greedy tokens: what LAMBADA counts.

use gptq_model::{Decoder, ModelError};

use crate::passage::{Passage, ask};

/// Whether greedy decoding would produce each passage's last word: each of its tokens is the likeliest after
/// the true tokens before it. Greedy decoding follows the true tokens as long as it is right, so one pass
/// over the whole passage is enough.
///
/// `progress` is called for each block, and once more for the lm_head.
pub fn guess_last_words(
    decoder: &mut dyn Decoder,
    passages: &[Passage],
    progress: &mut dyn FnMut(),
) -> Result<Vec<bool>, ModelError> {
    let mut right = vec![false; passages.len()];
    ask(decoder, passages, progress, &mut |input, asked| {
        let rows: Vec<usize> = asked.iter().flat_map(|asked| asked.rows.clone()).collect();
        let mut guessed = input.likeliest(&rows)?.into_iter();
        for asked in asked {
            let guess: Vec<u32> = guessed.by_ref().take(asked.rows.len()).collect();
            right[asked.passage] = guess == passages[asked.passage].answer();
        }
        Ok(())
    })?;
    Ok(right)
}
