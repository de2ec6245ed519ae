//! The pass of the float model beside that of the quantized one: what each linear's input would be had no
//! linear before been rounded.
//!
//! Its weights are never replaced, so an output is added as soon as its input was seen, and only hidden states
//! are stored between two taps. For the solver it follows six of eight stretches of the tokens; the other two
//! would cost as much and add little information. For training it follows all of them.

use gptq_kernels::stretch_of;

use crate::ModelError;
use crate::backend::{GradientBackend, Tensor};
use crate::batch::{BatchContext, BlockState, RowState};
use crate::spec::Tap;

/// Whether a float stream follows the batch that begins at token `start`; `all` of them for training.
pub(crate) fn is_followed(start: usize, all: bool) -> bool {
    all || stretch_of(start) < 6
}

/// A batch that is followed.
struct Followed<B: GradientBackend> {
    place: usize, // slot in the stream's own store, which has none for other batches
    state: RowState<B>,
}

/// Hidden states of the float model, batch by batch, and its resident block.
pub(crate) struct FloatStream<B: GradientBackend> {
    pub block: Option<BlockState<B>>,
    batches: Vec<Option<Followed<B>>>,
    /// Every batch is followed.
    all: bool,
    /// Its hidden states are behind the resident block already.
    is_ahead: bool,
}

impl<B: GradientBackend> FloatStream<B> {
    pub fn new(all: bool) -> Self {
        FloatStream {
            block: None,
            batches: Vec::new(),
            all,
            is_ahead: false,
        }
    }

    /// The same before the first batch.
    pub fn emptied(self) -> Self {
        Self::new(self.all)
    }

    /// Whether the batch that begins at token `start` is followed.
    pub fn follows(&self, start: usize) -> bool {
        is_followed(start, self.all)
    }

    /// Takes another block.
    pub fn load(&mut self, block: BlockState<B>) {
        self.block = Some(block);
        self.is_ahead = false;
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
        self.batches.push(self.follows(start).then(|| Followed {
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

    /// Completes the block for a batch, unless all of them are behind it.
    pub fn finish<'a>(
        &mut self,
        batch: usize,
        context: impl FnOnce(usize) -> BatchContext<'a, B>,
    ) -> Result<(), ModelError> {
        let Some(followed) = self.batches[batch].as_mut().filter(|_| !self.is_ahead) else {
            return Ok(());
        };
        let block = self.block.as_ref().expect("a block is resident");
        block.finish(&mut followed.state, &context(followed.place))
    }

    /// All batches were completed ahead of the other stream.
    pub fn set_ahead(&mut self) {
        self.is_ahead = true;
    }

    /// The hidden states of a batch behind the block.
    ///
    /// # Panics
    /// If the stream is not ahead, or does not follow the batch.
    pub fn target(&self, on: &B::Context, batch: usize) -> Tensor<B, 2> {
        assert!(self.is_ahead, "the float stream is behind the block");
        let followed = self.batches[batch].as_ref();
        followed.expect("every batch is followed").state.hidden(on)
    }
}
