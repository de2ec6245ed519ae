//! A batch of windows between the taps of a block, and its activations that are stored meanwhile.

use std::collections::BTreeMap;

use gptq_kernels::RowScale;

use crate::ModelError;
use crate::backend::{ActivationStores, GradientBackend, Tensor};
use crate::forward::Block;
use crate::operations::{Direct, Operations};
use crate::spec::{KeySource, ModelSpec, Tap};
use crate::stream::{OnBackend, SharedKeyValues, Tables, Windows};
use crate::tape::{GradientSink, Tape};

/// Windows of one length that go through a block together.
pub(crate) struct Batch<B: GradientBackend> {
    pub windows: Vec<Vec<u32>>,
    pub state: RowState<B>,
    /// Hidden states before the resident block, where they are kept.
    pub input: Option<B::Offloaded>,
    /// Inputs that each block looks up by token id, for all streams.
    pub by_token: Vec<B::Offloaded>,
}

impl<B: GradientBackend> Batch<B> {
    pub fn new(windows: &[Vec<u32>], hidden: B::Offloaded) -> Self {
        Batch {
            windows: windows.to_vec(),
            state: RowState::new(hidden),
            input: None,
            by_token: Vec::new(),
        }
    }

    pub fn tokens(&self) -> usize {
        self.windows[0].len()
    }

    pub fn rows(&self) -> usize {
        self.windows.len() * self.tokens()
    }
}

/// The state of a batch in one stream.
pub(crate) struct RowState<B: GradientBackend> {
    hidden: Option<B::Offloaded>, // [tokens, hidden_size]; out only while it is changed
    /// Steps of the resident block that were added to the hidden states.
    done: usize,
    /// Inputs of the output linears of the current step, by branch.
    inner: BTreeMap<usize, B::Offloaded>,
    /// Keys and values for later blocks.
    shared_kv: BTreeMap<usize, [B::Offloaded; 2]>,
}

impl<B: GradientBackend> RowState<B> {
    pub fn new(hidden: B::Offloaded) -> Self {
        RowState {
            hidden: Some(hidden),
            done: 0,
            inner: BTreeMap::new(),
            shared_kv: BTreeMap::new(),
        }
    }

    /// Back to the hidden states before a block.
    pub fn restart(&mut self, hidden: B::Offloaded) {
        self.hidden = Some(hidden);
        self.done = 0;
        self.inner.clear();
    }

    pub fn hidden(&self, on: &B::Context) -> Tensor<B, 2> {
        B::fetch(on, self.hidden.as_ref().expect("hidden states are kept"))
    }

    fn take_hidden(&mut self, on: &B::Context) -> Tensor<B, 2> {
        B::take(on, self.hidden.take().expect("hidden states are kept"))
    }
}

/// Where a batch waits, and what its windows share.
pub(crate) struct BatchContext<'a, B: GradientBackend> {
    pub on: &'a B::Context,
    pub hidden: &'a B::ActivationStore,
    /// For the input of an output linear; a stream that adds outputs at once needs none.
    pub inner: Option<&'a B::ActivationStore>,
    /// For keys and values that later blocks read.
    pub shared_kv: &'a B::ActivationStore,
    pub tables: &'a Tables<B>,
    /// Slot of the batch in each activation store.
    pub place: usize,
    /// Tokens of a window.
    pub tokens: usize,
    pub by_token: &'a [B::Offloaded],
    /// Slot of the first shared keys.
    first_shared: usize,
}

impl<'a, B: GradientBackend> BatchContext<'a, B> {
    /// The context of the calibration stream, whose weights are replaced.
    pub fn quantized(
        on: &'a B::Context,
        stores: &'a ActivationStores<B::ActivationStore>,
        tables: &'a Tables<B>,
        tokens: usize,
        place: usize,
        by_token: &'a [B::Offloaded],
    ) -> Self {
        BatchContext {
            on,
            hidden: &stores.hidden,
            inner: Some(&stores.inner),
            shared_kv: &stores.shared_kv,
            tables,
            place,
            tokens,
            by_token,
            first_shared: 2 * stores.donors * place,
        }
    }

    /// The context of the float stream, whose batch has slot `place` in its own store; the calibration stream
    /// has `batches` batches.
    pub fn beside(
        &self,
        stores: &'a ActivationStores<B::ActivationStore>,
        place: usize,
        batches: usize,
    ) -> Self {
        BatchContext {
            on: self.on,
            hidden: &stores.float,
            inner: None,
            place,
            first_shared: 2 * stores.donors * (batches + place),
            shared_kv: self.shared_kv,
            tables: self.tables,
            tokens: self.tokens,
            by_token: self.by_token,
        }
    }
}

/// A block of one stream.
pub(crate) struct BlockState<B: GradientBackend> {
    pub block: Block<OnBackend<B>>,
    pub index: usize,
    /// Blocks whose keys and values this one reads, and its index among the blocks that share theirs.
    reads_from: Vec<usize>,
    donor_index: Option<usize>,
}

impl<B: GradientBackend> BlockState<B> {
    pub fn new(index: usize, spec: &ModelSpec, block: Block<OnBackend<B>>) -> Self {
        let keys = |index: usize| {
            spec.blocks[index]
                .attention()
                .map(|attention| attention.keys)
        };
        let is_donor = |index: usize| keys(index).any(|keys| keys == KeySource::Donor);
        let shared = keys(index).filter_map(|keys| match keys {
            KeySource::Block(block) => Some(block),
            KeySource::Own | KeySource::Donor => None,
        });
        BlockState {
            block,
            index,
            reads_from: shared.collect(),
            donor_index: is_donor(index)
                .then(|| (0..index).filter(|&block| is_donor(block)).count()),
        }
    }

    /// Columns of the first branch's input to its output linear, in a step.
    pub fn inner_columns(&self, step: usize) -> usize {
        self.block.steps[step].branches[0].output.linears[0]
            .spec
            .in_features
    }

    fn ops<'a>(
        &self,
        state: &RowState<B>,
        context: &BatchContext<'a, B>,
    ) -> Windows<'a, B, Direct<'a, B>> {
        self.windows(Direct { on: context.on }, state, context)
    }

    fn windows<'a, O: Operations<B>>(
        &self,
        mut operations: O,
        state: &RowState<B>,
        context: &BatchContext<'a, B>,
    ) -> Windows<'a, B, O> {
        let mut fetch = |kept: &B::Offloaded| operations.constant(B::fetch(context.on, kept));
        let shared = (self.reads_from.iter())
            .map(|block| (*block, state.shared_kv[block].each_ref().map(&mut fetch)))
            .collect();
        let by_token = context.by_token.get(self.index).map(&mut fetch);
        Windows {
            operations,
            tables: context.tables,
            tokens: context.tokens,
            shared_kv: shared,
            by_token,
        }
    }

    /// The whole block from its input, with nothing kept of it.
    pub fn output(
        &self,
        input: Tensor<B, 2>,
        state: &RowState<B>,
        context: &BatchContext<'_, B>,
    ) -> Result<Tensor<B, 2>, ModelError> {
        self.block.forward(&mut self.ops(state, context), input)
    }

    /// Half of the error of the block's output against `target`, from its input: its gradient, times
    /// `factor`, goes back to the linears. Rows of the error have the scale `scale`.
    pub fn gradients(
        &self,
        input: Tensor<B, 2>,
        target: &Tensor<B, 2>,
        (scale, factor): (RowScale, f32),
        state: &RowState<B>,
        context: &BatchContext<'_, B>,
        sink: &mut dyn GradientSink,
    ) -> Result<(), ModelError> {
        let mut tape = Tape::new(context.on);
        let input = tape.constant(input);
        let mut ops = self.windows(tape, state, context);
        let output = self.block.forward(&mut ops, input)?;
        let y = Tape::tensor(&output);
        let dy = B::error_gradient(context.on, y, target, scale, factor);
        ops.operations.backward(&output, dy, sink);
        Ok(())
    }

    /// Advances the batch to `tap` and returns the rows there. Taps are reached in the order of the data, each
    /// once; some may be left out.
    pub fn reach(
        &self,
        tap: Tap,
        state: &mut RowState<B>,
        context: &BatchContext<'_, B>,
    ) -> Result<Tensor<B, 2>, ModelError> {
        let mut ops = self.ops(state, context);
        let hidden = match state.done < tap.step {
            false => state.hidden(context.on),
            true => {
                let hidden = state.take_hidden(context.on);
                let hidden = self.advance(&mut ops, state, hidden, tap.step)?;
                state.hidden = Some(B::offload(
                    context.on,
                    context.hidden,
                    context.place,
                    &hidden,
                ));
                hidden
            }
        };
        let step = &self.block.steps[tap.step];
        let Some(at) = tap.branch else {
            return step.branches[0].input(&mut ops, &hidden);
        };
        let x = step.branches[at].input(&mut ops, &hidden)?;
        let inner = step.branches[at].mix(&mut ops, x)?;
        self.store_shared(&mut ops.shared_kv, state, context);
        let last = at + 1 == step.branches.len();
        match context.inner {
            // The input of the first branch is stored if there is room. Otherwise it is computed again, from
            // the same values to the same bits.
            Some(store) if (at == 0 || B::EVERY_INNER) && B::has_room(store, context.place) => {
                state
                    .inner
                    .insert(at, B::offload(context.on, store, context.place, &inner));
            }
            None if last => {
                drop(hidden);
                let hidden = state.take_hidden(context.on);
                let hidden = self.add_step(&mut ops, state, hidden, Some(inner.clone()))?;
                state.hidden = Some(B::offload(
                    context.on,
                    context.hidden,
                    context.place,
                    &hidden,
                ));
            }
            Some(_) | None => {}
        }
        Ok(inner)
    }

    /// Brings the batch behind the block.
    pub fn finish(
        &self,
        state: &mut RowState<B>,
        context: &BatchContext<'_, B>,
    ) -> Result<(), ModelError> {
        let mut ops = self.ops(state, context);
        let hidden = state.take_hidden(context.on);
        let hidden = self.advance(&mut ops, state, hidden, self.block.steps.len())?;
        let hidden = self.block.finish(&mut ops, hidden)?;
        self.store_shared(&mut ops.shared_kv, state, context);
        state.hidden = Some(B::offload(
            context.on,
            context.hidden,
            context.place,
            &hidden,
        ));
        state.done = 0;
        Ok(())
    }

    /// The hidden states before step `to`.
    fn advance(
        &self,
        ops: &mut Windows<'_, B, Direct<'_, B>>,
        state: &mut RowState<B>,
        hidden: Tensor<B, 2>,
        to: usize,
    ) -> Result<Tensor<B, 2>, ModelError> {
        let mut hidden = hidden;
        while state.done < to {
            hidden = self.add_step(ops, state, hidden, None)?;
        }
        Ok(hidden)
    }

    /// Adds the current step; `last` is the mixed input of its last branch, if known.
    fn add_step(
        &self,
        ops: &mut Windows<'_, B, Direct<'_, B>>,
        state: &mut RowState<B>,
        hidden: Tensor<B, 2>,
        last: Option<Tensor<B, 2>>,
    ) -> Result<Tensor<B, 2>, ModelError> {
        let step = &self.block.steps[state.done];
        let (mut last, end) = (last, step.branches.len() - 1);
        let mut inner = Vec::with_capacity(step.branches.len());
        for (at, branch) in step.branches.iter().enumerate() {
            let kept = state
                .inner
                .remove(&at)
                .map(|kept| B::take(ops.operations.on, kept));
            let there = kept.or_else(|| last.take_if(|_| at == end));
            inner.push(match there {
                Some(inner) => inner,
                None => {
                    let x = branch.input(ops, &hidden)?;
                    branch.mix(ops, x)?
                }
            });
        }
        let mut hidden = hidden;
        for (branch, inner) in step.branches.iter().zip(inner) {
            hidden = branch.add(ops, hidden, inner, step.residual_factor)?;
        }
        state.done += 1;
        Ok(hidden)
    }

    /// Stores the keys and values that later blocks read.
    fn store_shared(
        &self,
        made: &mut SharedKeyValues<B>,
        state: &mut RowState<B>,
        context: &BatchContext<'_, B>,
    ) {
        let Some((donor, [k, v])) = self.donor_index.zip(made.remove(&self.index)) else {
            return;
        };
        let place = context.first_shared + 2 * donor;
        let pair = [(&k, place), (&v, place + 1)];
        let pair = pair.map(|(x, place)| B::offload(context.on, context.shared_kv, place, x));
        state.shared_kv.insert(self.index, pair);
    }
}
