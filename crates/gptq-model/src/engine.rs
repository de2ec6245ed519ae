//! A decoder on one backend: the resident block and the hidden states of the pass.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::thread::JoinHandle;

use burn::tensor::DType;
use gptq_kernels::{ActivationSink, RowScale, Weight};
use gptq_types::{Dtype, GroupSize, LayerName, SourceError};

use crate::backend::{ActivationSizes, ActivationStores, GradientBackend, Tensor};
use crate::batch::{Batch, BatchContext, BlockState};
use crate::batches::{WindowRun, windows_of_step};
use crate::budget::GpuRun;
use crate::by_token::RowsByToken;
use crate::float_stream::FloatStream;
use crate::forward::Block;
use crate::head::HostHead;
use crate::read_block::{HostBlock, OnDevice};
use crate::score::HeadInput;
use crate::spec::{ModelSpec, Tap};
use crate::stream::{Linear, OnBackend, Tables};
use crate::tape::GradientSink;
use crate::weights::WeightSource;
use crate::{Decoder, DeviceContext, ModelError, Streams, Trainer};

/// See [`Decoder`].
pub(crate) struct Engine<B: GradientBackend> {
    device: DeviceContext,
    on: B::Context,
    source: Arc<dyn WeightSource>,
    spec: Arc<ModelSpec>,
    head: Option<B::Head>, // read when first asked for
    block: Option<BlockState<B>>,
    next: Option<(usize, JoinHandle<Result<HostBlock, SourceError>>)>,
    batches: Vec<Batch<B>>,
    stores: Option<ActivationStores<B::ActivationStore>>,
    float: Option<FloatStream<B>>,
    trains: Option<GroupSize>,
    row_scale: Option<RowScale>, // of the errors of the resident block's output
    more_hessians: usize,        // that somebody else will keep on the device
    tables: BTreeMap<usize, Tables<B>>, // by window length
}

impl<B: GradientBackend> Engine<B> {
    /// `on` is `device` as the backend wants it.
    pub fn new(
        device: DeviceContext,
        on: B::Context,
        source: Arc<dyn WeightSource>,
        spec: ModelSpec,
        streams: Streams,
    ) -> Self {
        Engine {
            device,
            on,
            float: match streams {
                Streams::One => None,
                Streams::BesideFloat => Some(FloatStream::new(false)),
            },
            trains: None,
            row_scale: None,
            source,
            spec: Arc::new(spec),
            head: None,
            block: None,
            next: None,
            batches: Vec::new(),
            stores: None,
            more_hessians: 0,
            tables: BTreeMap::new(),
        }
    }

    /// The same with a float stream that follows all tokens, and inputs of blocks that are kept.
    pub fn for_training(
        device: DeviceContext,
        on: B::Context,
        source: Arc<dyn WeightSource>,
        spec: ModelSpec,
        group_size: GroupSize,
    ) -> Self {
        Engine {
            float: Some(FloatStream::new(true)),
            trains: Some(group_size),
            ..Self::new(device, on, source, spec, Streams::One)
        }
    }

    /// Not kept, since a pass needs it once and it may be larger than a block.
    fn table(&self) -> Result<B::Table, ModelError> {
        let (name, width) = (&self.spec.embedding.name, self.spec.hidden_size);
        Ok(B::table(&self.on, self.source.as_ref(), name, width)?)
    }

    fn head(&mut self) -> Result<&B::Head, ModelError> {
        if self.head.is_none() {
            let head = HostHead::new(self.source.clone(), &self.spec)?;
            self.head = Some(B::head(&self.on, head)?);
            B::check(&self.on)?;
        }
        Ok(self.head.as_ref().expect("it was read just now"))
    }

    /// `[ids, hidden_size]`.
    fn embed_ids(&self, table: &B::Table, ids: &[u32]) -> Result<Tensor<B, 2>, ModelError> {
        let vocab_size = self.spec.vocab_size;
        match ids.iter().find(|&&id| id as usize >= vocab_size) {
            Some(&id) => Err(ModelError::TokenOutsideVocabulary { id, vocab_size }),
            None => Ok(B::embed(&self.on, table, ids, self.spec.embedding.factor)),
        }
    }

    /// Block `index` from the thread that read it ahead, if one did.
    fn take_next(&mut self, index: usize) -> Result<Block<OnBackend<B>>, ModelError> {
        let spec = &self.spec.blocks[index];
        let mut host = match self.next.take() {
            Some((ahead, reader)) if ahead == index => {
                reader.join().expect("the reader does not panic")?
            }
            _ => HostBlock::read::<B>(self.source.as_ref(), spec)?,
        };
        let on = &self.on;
        Block::load(
            spec,
            index,
            &mut OnDevice {
                host: &mut host,
                on,
            },
        )
    }

    fn read_ahead(&mut self, index: usize) {
        if !B::PREFETCH || index >= self.spec.blocks.len() {
            return;
        }
        let (source, spec) = (self.source.clone(), self.spec.clone());
        let read = move || HostBlock::read::<B>(source.as_ref(), &spec.blocks[index]);
        self.next = Some((index, std::thread::spawn(read)));
    }

    fn linear(&self, layer: &LayerName) -> Result<&Linear<B>, ModelError> {
        let block = self.block.as_ref();
        block
            .and_then(|state| {
                state
                    .block
                    .linears()
                    .find(|linear| linear.spec.name == *layer)
            })
            .ok_or_else(|| ModelError::NotResident(layer.clone()))
    }

    /// Windows of one length side by side, as many as a batch takes; in training no more than a step takes.
    fn cut<'a>(&self, windows: &'a [Vec<u32>]) -> Vec<&'a [Vec<u32>]> {
        let mut left = windows;
        let mut batches = Vec::new();
        for run in WindowRun::of(windows) {
            let empty = left.iter().take_while(|window| window.is_empty()).count();
            left = &left[empty..];
            for windows in run.batches(B::BATCH_TOKENS, self.trains.is_some()) {
                let (batch, rest) = left.split_at(windows);
                batches.push(batch);
                left = rest;
            }
        }
        batches
    }

    fn need(&self, windows: &[Vec<u32>]) -> ActivationSizes {
        let run = GpuRun {
            windows: &WindowRun::of(windows),
            streams: match self.float {
                None => Streams::One,
                Some(_) => Streams::BesideFloat,
            },
            training: self.trains,
            more_hessians: self.more_hessians,
        };
        ActivationSizes::of_run(&self.spec, &run, B::BATCH_TOKENS)
    }

    /// Brings every batch to `tap` of the resident block and shows what is there.
    fn pass(&mut self, tap: Tap, look: &mut Look<'_, B>) -> Result<(), ModelError> {
        let state = self.block.as_ref().expect("a block is resident");
        let stores = self.stores.as_ref().expect("windows were embedded");
        if tap.branch == Some(0) {
            // All inner activations of the step before were taken back, or dropped.
            let rows = self.batches.iter().map(Batch::rows).max().unwrap_or(0);
            B::clear(&stores.inner, rows, state.inner_columns(tap.step));
        }
        let count = self.batches.len();
        for (place, batch) in self.batches.iter_mut().enumerate() {
            let (tables, tokens) = (&self.tables[&batch.tokens()], batch.tokens());
            let context =
                BatchContext::quantized(&self.on, stores, tables, tokens, place, &batch.by_token);
            let input = state.reach(tap, &mut batch.state, &context)?;
            let beside = |place| context.beside(stores, place, count);
            let float = match &mut self.float {
                None => None,
                Some(stream) => stream.reach(tap, place, beside)?,
            };
            look(&input, float.as_ref());
        }
        B::check(&self.on)
    }
}

impl<B: GradientBackend> Trainer for Engine<B> {
    fn finish_float(&mut self) -> Result<(), ModelError> {
        B::tidy(&self.on); // what solving worked in
        let stores = self.stores.as_ref().expect("windows were embedded");
        let count = self.batches.len();
        let stream = self.float.as_mut().expect("a decoder that trains");
        for (place, batch) in self.batches.iter().enumerate() {
            let (tables, tokens) = (&self.tables[&batch.tokens()], batch.tokens());
            let context =
                BatchContext::quantized(&self.on, stores, tables, tokens, place, &batch.by_token);
            stream.finish(place, |place| context.beside(stores, place, count))?;
        }
        stream.set_ahead();
        let targets = (0..count).map(|batch| stream.target(&self.on, batch));
        let squares = targets.flat_map(|target| B::row_squares(&self.on, &target));
        self.row_scale = Some(RowScale::of(squares.collect()));
        B::check(&self.on)
    }

    fn steps(&self) -> Vec<Range<usize>> {
        let mut steps: Vec<Range<usize>> = Vec::new();
        let mut open: Option<(usize, usize)> = None; // tokens of a window, windows so far
        for (place, batch) in self.batches.iter().enumerate() {
            let (tokens, windows) = (batch.tokens(), batch.windows.len());
            open = match (open, steps.last_mut()) {
                (Some((of, so_far)), Some(step))
                    if of == tokens && so_far + windows <= windows_of_step(tokens) =>
                {
                    step.end += 1;
                    Some((of, so_far + windows))
                }
                _ => {
                    steps.push(place..place + 1);
                    Some((tokens, windows))
                }
            };
        }
        steps
    }

    fn train(
        &mut self,
        batch: usize,
        factor: f32,
        sink: &mut dyn GradientSink,
    ) -> Result<(), ModelError> {
        let (state, of, context) = self.training(batch);
        let target = self.target(batch);
        let input = B::fetch(&self.on, of.input.as_ref().expect("inputs are kept"));
        let error = (self.row_scale(), factor);
        state.gradients(input, &target, error, &of.state, &context, sink)?;
        B::check(&self.on)
    }

    fn output_error(&mut self, batch: usize) -> Result<f64, ModelError> {
        let (state, of, context) = self.training(batch);
        let input = B::fetch(&self.on, of.input.as_ref().expect("inputs are kept"));
        let output = state.output(input, &of.state, &context)?;
        let error = B::output_error(&self.on, &output, &self.target(batch), self.row_scale());
        B::check(&self.on)?;
        Ok(error)
    }

    fn restart_block(&mut self) -> Result<(), ModelError> {
        let stores = self.stores.as_ref().expect("windows were embedded");
        for (place, batch) in self.batches.iter_mut().enumerate() {
            let input = batch.input.as_ref().expect("inputs are kept");
            let input = B::fetch(&self.on, input);
            let hidden = B::offload(&self.on, &stores.hidden, place, &input);
            batch.state.restart(hidden);
        }
        B::check(&self.on)
    }
}

impl<B: GradientBackend> Engine<B> {
    /// The resident block, a batch, and where it waits.
    fn training(&self, batch: usize) -> (&BlockState<B>, &Batch<B>, BatchContext<'_, B>) {
        let state = self.block.as_ref().expect("a block is resident");
        let stores = self.stores.as_ref().expect("windows were embedded");
        let of = &self.batches[batch];
        let (tables, tokens) = (&self.tables[&of.tokens()], of.tokens());
        let context =
            BatchContext::quantized(&self.on, stores, tables, tokens, batch, &of.by_token);
        (state, of, context)
    }

    fn row_scale(&self) -> RowScale {
        self.row_scale.expect("the float stream is ahead")
    }

    fn target(&self, batch: usize) -> Tensor<B, 2> {
        let stream = self.float.as_ref().expect("a decoder that trains");
        stream.target(&self.on, batch)
    }
}

/// The type in which a backend computes.
fn computed_in(states: DType) -> Dtype {
    match states {
        DType::F16 => Dtype::F16,
        DType::BF16 => Dtype::BF16,
        _ => Dtype::F32,
    }
}

/// Sees the input of a capture group and, where there is a float stream, its partner there.
type Look<'a, B> = dyn FnMut(&Tensor<B, 2>, Option<&Tensor<B, 2>>) + 'a;

impl<B: GradientBackend> Decoder for Engine<B> {
    fn device(&self) -> &DeviceContext {
        &self.device
    }

    fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    fn leave_room(&mut self, hessians: usize) {
        self.more_hessians = hessians;
    }

    fn embed(&mut self, windows: &[Vec<u32>]) -> Result<(), ModelError> {
        self.batches.clear();
        self.float = self.float.take().map(FloatStream::emptied);
        self.stores = None;
        let cut = self.cut(windows);
        let stores = B::stores(&self.on, &self.need(windows));
        B::check(&self.on)?;
        let table = self.table()?;
        let inputs = self.spec.embedding.per_block.as_ref();
        let sizes = (self.spec.blocks.len(), self.spec.hidden_size);
        let by_token = inputs
            .map(|inputs| {
                RowsByToken::<B>::read(&self.on, self.source.as_ref(), inputs, sizes, windows)
            })
            .transpose()?;
        let blocks = self.spec.blocks.len();
        let mut start = 0;
        for (place, windows) in cut.into_iter().enumerate() {
            let ids = windows.concat();
            let hidden = self.embed_ids(&table, &ids)?;
            if let Some(stream) = &mut self.float {
                stream.embed(&self.on, start, &stores.float, &hidden);
            }
            start += ids.len();
            let mut batch = Batch::new(
                windows,
                B::offload(&self.on, &stores.hidden, place, &hidden),
            );
            if let Some((rows, inputs)) = by_token.as_ref().zip(inputs) {
                let all = rows.of(&ids, &hidden);
                for index in 0..blocks {
                    let first = index * inputs.width;
                    let of_block = B::columns(&self.on, &all, first..first + inputs.width);
                    let place = place * blocks + index;
                    let kept = B::offload(&self.on, &stores.by_token, place, &of_block);
                    batch.by_token.push(kept);
                }
            }
            self.batches.push(batch);
            let tokens = windows[0].len();
            (self.tables.entry(tokens)).or_insert_with(|| {
                Tables::new(
                    &self.on,
                    &self.spec,
                    0..tokens,
                    tokens,
                    self.trains.is_some(),
                )
            });
        }
        self.stores = Some(stores);
        B::check(&self.on)
    }

    fn load_block(&mut self, index: usize) -> Result<(), ModelError> {
        self.block = None; // frees the old block before the new one is read
        let block = self.take_next(index)?;
        if let Some(stream) = &mut self.float {
            let place = stream.block.take().map(|state| state.block);
            let copy = block.copied(&self.on, place);
            stream.load(BlockState::new(index, &self.spec, copy));
        }
        self.block = Some(BlockState::new(index, &self.spec, block));
        if let Some(stores) = self.stores.as_ref().filter(|_| self.trains.is_some()) {
            for (place, batch) in self.batches.iter_mut().enumerate() {
                let hidden = batch.state.hidden(&self.on);
                batch.input = Some(B::offload(&self.on, &stores.inputs, place, &hidden));
            }
        }
        self.read_ahead(index + 1);
        B::check(&self.on)
    }

    fn capture(&mut self, tap: Tap, sink: &mut dyn ActivationSink) -> Result<(), ModelError> {
        self.pass(tap, &mut |input, float| {
            let [rows, columns] = input.dims();
            B::show(input, &mut |x| match float {
                None => sink.observe(x, rows, columns),
                Some(float) => B::show(float, &mut |float| {
                    sink.observe_pair(x, float, rows, columns);
                }),
            });
        })?;
        B::tidy(&self.on);
        Ok(())
    }

    fn finish_block(&mut self) -> Result<(), ModelError> {
        let state = self.block.as_ref().expect("a block is resident");
        let stores = self.stores.as_ref().expect("windows were embedded");
        let count = self.batches.len();
        for (place, batch) in self.batches.iter_mut().enumerate() {
            let (tables, tokens) = (&self.tables[&batch.tokens()], batch.tokens());
            let context =
                BatchContext::quantized(&self.on, stores, tables, tokens, place, &batch.by_token);
            state.finish(&mut batch.state, &context)?;
            if let Some(stream) = &mut self.float {
                stream.finish(place, |place| context.beside(stores, place, count))?;
            }
        }
        B::tidy(&self.on);
        B::check(&self.on)
    }

    fn forward_block(&mut self) -> Result<(), ModelError> {
        // No weight is replaced on the way: a batch passes at once, and nothing inside it waits.
        self.finish_block()?;
        let index = self.block.as_ref().map_or(0, |state| state.index);
        for batch in &self.batches {
            let hidden = batch.state.hidden(&self.on);
            if !B::is_finite(&self.on, &hidden) {
                let computed = computed_in(hidden.dtype());
                return Err(ModelError::NotFinite {
                    block: index,
                    computed,
                });
            }
        }
        B::check(&self.on)
    }

    fn weight(&self, layer: &LayerName) -> Result<Weight<'_>, ModelError> {
        Ok(self.linear(layer)?.weight())
    }

    fn replace_weight(&mut self, layer: &LayerName, values: Vec<f32>) -> Result<(), ModelError> {
        let block = self.block.as_mut();
        let linear = block
            .and_then(|state| {
                let mut linears = state.block.linears_mut();
                linears.find(|linear| linear.spec.name == *layer)
            })
            .ok_or_else(|| ModelError::NotResident(layer.clone()))?;
        linear.replace(&self.on, values);
        B::check(&self.on)
    }

    fn batches(&self) -> usize {
        self.batches.len()
    }

    fn head_input(&mut self, batch: usize) -> Result<HeadInput, ModelError> {
        let hidden = self.batches[batch].state.hidden(&self.on);
        let input = B::head_input(self.head()?, hidden)?;
        B::check(&self.on)?;
        Ok(input)
    }

    fn batch_windows(&self, batch: usize) -> &[Vec<u32>] {
        &self.batches[batch].windows
    }
}

#[cfg(test)]
mod tests;
