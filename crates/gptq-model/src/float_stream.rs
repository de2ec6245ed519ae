//! The pass of the float model beside that of the quantized one: what each linear's input would be had no
//! linear before been rounded.
//!
//! Its weights are never replaced, so an output is added as soon as its input was seen, and nothing but
//! hidden states waits between two stages. It follows six of eight stretches of the tokens: the other two
//! would cost as much as any other and tell little more.

use burn::tensor::Tensor;
use gptq_types::{Stage, stretch_of};

use crate::backend::DecoderBackend;
use crate::block::Block;

/// A batch that is followed.
struct Followed<B: DecoderBackend> {
    place: usize,            // on the stream's own shelf, which has none for other batches
    hidden: Option<B::Kept>, // [tokens, hidden_size]; out only while it is changed
}

/// Hidden states of the float model, batch by batch, and its resident block.
pub(crate) struct FloatStream<B: DecoderBackend> {
    pub block: Option<Block<B>>,
    batches: Vec<Option<Followed<B>>>,
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
        stretch_of(start) < 6
    }

    /// The next batch, which begins at token `start`; it is kept where it is followed.
    pub fn embed(&mut self, start: usize, shelf: &B::Shelf, hidden: &Tensor<B, 2>) {
        let place = self.batches.iter().flatten().count();
        self.batches.push(Self::follows(start).then(|| Followed {
            place,
            hidden: Some(B::keep(shelf, place, hidden)),
        }));
    }

    /// The input of the linears of `stage` for a batch that is followed. Stages are visited in the order
    /// of [`Stage::ALL`]; the first may be left out.
    pub fn advance(
        &mut self,
        stage: Stage,
        batch: usize,
        shelf: &B::Shelf,
        turn: &B::Turn,
        tokens: usize,
    ) -> Option<Tensor<B, 2>> {
        let followed = self.batches[batch].as_mut()?;
        let block = self.block.as_ref().expect("a block is resident");
        let hidden = B::peek(followed.hidden.as_ref().expect("hidden states are kept"));
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
        followed.hidden = None;
        let hidden = B::add(hidden, output);
        followed.hidden = Some(B::keep(shelf, followed.place, &hidden));
        Some(input)
    }

    /// All stages of a batch with nobody looking.
    pub fn forward(&mut self, batch: usize, shelf: &B::Shelf, turn: &B::Turn, tokens: usize) {
        let Some(followed) = self.batches[batch].as_mut() else {
            return;
        };
        let block = self.block.as_ref().expect("a block is resident");
        let hidden = B::recall(followed.hidden.take().expect("hidden states are kept"));
        let hidden = block.forward(hidden, turn, tokens);
        followed.hidden = Some(B::keep(shelf, followed.place, &hidden));
    }
}
