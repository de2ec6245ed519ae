//! The pass of the float model beside that of the quantized one: what each linear's input would be had no
//! linear before been rounded.
//!
//! Its weights are never replaced, so an output is added as soon as its input was seen, and only hidden states
//! are stored between two taps. It follows six of eight stretches of the tokens; the other two would cost as
//! much and add little information.

use burn::tensor::Tensor;
use gptq_kernels::stretch_of;

use crate::ModelError;
use crate::backend::DecoderBackend;
use crate::batch::{BatchContext, BlockState, RowState};
use crate::spec::Tap;

/// A batch that is followed.
struct Followed<B: DecoderBackend> {
    place: usize, // slot in the stream's own store, which has none for other batches
    state: RowState<B>,
}

/// Hidden states of the float model, batch by batch, and its resident block.
pub(crate) struct FloatStream<B: DecoderBackend> {
    pub block: Option<BlockState<B>>,
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
    pub fn embed(
        &mut self,
        on: &B::Context,
        start: usize,
        store: &B::ActivationStore,
        hidden: &Tensor<B, 2>,
    ) {
        let place = self.batches.iter().flatten().count();
        self.batches.push(Self::follows(start).then(|| Followed {
            place,
            state: RowState::new(B::offload(on, store, place, hidden)),
        }));
    }

    /// The rows at `tap` for a batch that is followed. `context` makes the batch's context for a slot.
    pub fn reach<'a>(
        &mut self,
        tap: Tap,
        batch: usize,
        context: impl FnOnce(usize) -> BatchContext<'a, B>,
    ) -> Result<Option<Tensor<B, 2>>, ModelError> {
        let Some(followed) = self.batches[batch].as_mut() else {
            return Ok(None);
        };
        let block = self.block.as_ref().expect("a block is resident");
        let context = context(followed.place);
        block.reach(tap, &mut followed.state, &context).map(Some)
    }

    /// Completes the block for a batch.
    pub fn finish<'a>(
        &mut self,
        batch: usize,
        context: impl FnOnce(usize) -> BatchContext<'a, B>,
    ) -> Result<(), ModelError> {
        let Some(followed) = self.batches[batch].as_mut() else {
            return Ok(());
        };
        let block = self.block.as_ref().expect("a block is resident");
        block.finish(&mut followed.state, &context(followed.place))
    }
}
