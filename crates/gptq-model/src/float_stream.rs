//! The pass of the float model beside that of the quantized one: what each linear's input would be had no
//! linear before been rounded.
//!
//! Its weights are never replaced, so an output is added as soon as its input was seen, and nothing but
//! hidden states waits between two taps. It follows six of eight stretches of the tokens: the other two
//! would cost as much as any other and tell little more.

use burn::tensor::Tensor;
use gptq_kernels::stretch_of;

use crate::ModelError;
use crate::backend::DecoderBackend;
use crate::batch::{BlockState, RowState, Track};
use crate::spec::Tap;

/// A batch that is followed.
struct Followed<B: DecoderBackend> {
    place: usize, // on the stream's own shelf, which has none for other batches
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
        shelf: &B::Shelf,
        hidden: &Tensor<B, 2>,
    ) {
        let place = self.batches.iter().flatten().count();
        self.batches.push(Self::follows(start).then(|| Followed {
            place,
            state: RowState::new(B::keep(on, shelf, place, hidden)),
        }));
    }

    /// What is at `tap` for a batch that is followed. `track` is that of the batch, but for its place.
    pub fn reach<'a>(
        &mut self,
        tap: Tap,
        batch: usize,
        track: impl FnOnce(usize) -> Track<'a, B>,
    ) -> Result<Option<Tensor<B, 2>>, ModelError> {
        let Some(followed) = self.batches[batch].as_mut() else {
            return Ok(None);
        };
        let block = self.block.as_ref().expect("a block is resident");
        let track = track(followed.place);
        block.reach(tap, &mut followed.state, &track).map(Some)
    }

    /// Brings a batch behind the block.
    pub fn finish<'a>(
        &mut self,
        batch: usize,
        track: impl FnOnce(usize) -> Track<'a, B>,
    ) -> Result<(), ModelError> {
        let Some(followed) = self.batches[batch].as_mut() else {
            return Ok(());
        };
        let block = self.block.as_ref().expect("a block is resident");
        block.finish(&mut followed.state, &track(followed.place))
    }
}
