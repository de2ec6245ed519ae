//! The pass of the float model beside that of the quantized one: what each linear's input would be had no
//! linear before been rounded.
//!
//! Its weights are never replaced, so an output is added as soon as its input was seen, and nothing but
//! hidden states waits between two stages.

use burn::tensor::Tensor;
use gptq_types::Stage;

use crate::backend::DecoderBackend;
use crate::block::Block;

/// Hidden states of the float model, batch by batch, and its resident block.
pub(crate) struct FloatStream<B: DecoderBackend> {
    pub block: Option<Block<B>>,
    hidden: Vec<Option<B::Kept>>, // [tokens, hidden_size]; out only while it is changed
}

impl<B: DecoderBackend> Default for FloatStream<B> {
    fn default() -> Self {
        FloatStream {
            block: None,
            hidden: Vec::new(),
        }
    }
}

impl<B: DecoderBackend> FloatStream<B> {
    /// The next batch.
    pub fn embed(&mut self, hidden: B::Kept) {
        self.hidden.push(Some(hidden));
    }

    /// The input of the linears of `stage` for a batch. Stages are visited in the order of
    /// [`Stage::ALL`]; the first may be left out.
    pub fn advance(
        &mut self,
        stage: Stage,
        place: usize,
        shelf: &B::Shelf,
        turn: &B::Turn,
        tokens: usize,
    ) -> Tensor<B, 2> {
        let block = self.block.as_ref().expect("a block is resident");
        let kept = self.hidden[place].as_ref();
        let hidden = B::peek(kept.expect("hidden states are kept"));
        let (input, output) = match stage {
            Stage::AttentionIn => return block.attention_input(&hidden),
            Stage::MlpIn => return block.mlp_input(&hidden),
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
        self.hidden[place] = None;
        self.hidden[place] = Some(B::keep(shelf, place, B::add(hidden, output)));
        input
    }
}
