//! The pass of the float model beside that of the quantized one: what each linear's input would be had no
//! linear before been rounded.
//!
//! Its weights are never replaced, so an output is added as soon as its input was seen, and nothing but
//! hidden states waits between two stages. It follows seven of eight stretches of the tokens: the eighth
//! would cost as much as any and tells next to nothing more.

use burn::tensor::Tensor;
use gptq_types::{Stage, stretch_of};

use crate::backend::DecoderBackend;
use crate::block::Block;

/// Hidden states of the float model, batch by batch, and its resident block.
pub(crate) struct FloatStream<B: DecoderBackend> {
    pub block: Option<Block<B>>,
    batches: Vec<Option<Option<B::Kept>>>, // [tokens, hidden_size]; out only while it is changed
}

impl<B: DecoderBackend> Default for FloatStream<B> {
    fn default() -> Self {
        FloatStream {
            block: None,
            batches: Vec::new(),
        }
    }
}

impl<B: DecoderBackend> FloatStream<B> {
    /// Whether the batch that begins at token `start` is followed.
    pub fn follows(start: usize) -> bool {
        stretch_of(start) < 7
    }

    /// The next batch; nothing where it is not followed.
    pub fn embed(&mut self, hidden: Option<B::Kept>) {
        self.batches.push(hidden.map(Some));
    }

    /// The input of the linears of `stage` for a batch that is followed. Stages are visited in the order
    /// of [`Stage::ALL`]; the first may be left out.
    pub fn advance(
        &mut self,
        stage: Stage,
        place: usize,
        shelf: &B::Shelf,
        turn: &B::Turn,
        tokens: usize,
    ) -> Option<Tensor<B, 2>> {
        let kept = self.batches[place].as_mut()?;
        let block = self.block.as_ref().expect("a block is resident");
        let hidden = B::peek(kept.as_ref().expect("hidden states are kept"));
        let (input, output) = match stage {
            Stage::AttentionIn => return Some(block.attention_input(&hidden)),
            Stage::MlpIn => return Some(block.mlp_input(&hidden)),
            Stage::AttentionOut => {
                let input = block.attend(&block.attention_input(&hidden), turn, tokens);
                let output = block.attention_out.forward(&input);
                (input, output)
            }
            Stage::MlpOut => {
                let input = block.gated(&block.mlp_input(&hidden));
                let output = block.mlp_out.forward(&input);
                (input, output)
            }
        };
        *kept = None;
        *kept = Some(B::keep(shelf, place, B::add(hidden, output)));
        Some(input)
    }
}
