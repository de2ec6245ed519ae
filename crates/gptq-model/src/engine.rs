//! A decoder on one backend: the resident block and the hidden states of the pass.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::thread::JoinHandle;

use burn::tensor::{DType, Tensor};
use gptq_types::{ActivationSink, Dtype, LayerName, SourceError, Weight};

use crate::backend::{DecoderBackend, ShelfNeed, Shelves};
use crate::batch::{Batch, BlockState, Track};
use crate::by_token::RowsByToken;
use crate::float_stream::FloatStream;
use crate::forward::Block;
use crate::head::HostHead;
use crate::read_block::HostBlock;
use crate::score::HeadInput;
use crate::spec::{ModelSpec, Tap};
use crate::stream::{Linear, OnBackend, Tables};
use crate::weights::WeightSource;
use crate::{Decoder, ModelError, Streams};

/// See [`Decoder`].
pub(crate) struct Engine<B: DecoderBackend> {
    source: Arc<dyn WeightSource>,
    spec: Arc<ModelSpec>,
    head: Option<B::Head>, // read when first asked for
    block: Option<BlockState<B>>,
    next: Option<(usize, JoinHandle<Result<HostBlock, SourceError>>)>,
    batches: Vec<Batch<B>>,
    shelves: Option<Shelves<B::Shelf>>,
    float: Option<FloatStream<B>>,
    more_hessians: usize, // that somebody else will keep on the device
    tables: BTreeMap<usize, Tables<B>>, // by window length
}

impl<B: DecoderBackend> Engine<B> {
    pub fn new(source: Arc<dyn WeightSource>, spec: ModelSpec, streams: Streams) -> Self {
        Engine {
            float: match streams {
                Streams::One => None,
                Streams::BesideFloat => Some(FloatStream::default()),
            },
            source,
            spec: Arc::new(spec),
            head: None,
            block: None,
            next: None,
            batches: Vec::new(),
            shelves: None,
            more_hessians: 0,
            tables: BTreeMap::new(),
        }
    }

    /// Not kept, since a pass needs it once and it may be larger than a block.
    fn table(&self) -> Result<B::Table, ModelError> {
        let (name, width) = (&self.spec.embedding.name, self.spec.hidden_size);
        Ok(B::table(self.source.as_ref(), name, width)?)
    }

    fn head(&mut self) -> Result<&B::Head, ModelError> {
        if self.head.is_none() {
            let head = HostHead::new(self.source.clone(), &self.spec)?;
            self.head = Some(B::head(head)?);
            B::check()?;
        }
        Ok(self.head.as_ref().expect("it was read just now"))
    }

    /// `[ids, hidden_size]`.
    fn embed_ids(&self, table: &B::Table, ids: &[u32]) -> Result<Tensor<B, 2>, ModelError> {
        let vocab_size = self.spec.vocab_size;
        match ids.iter().find(|&&id| id as usize >= vocab_size) {
            Some(&id) => Err(ModelError::TokenOutsideVocabulary { id, vocab_size }),
            None => Ok(B::embed(table, ids, self.spec.embedding.factor)),
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
        Block::load(spec, index, &mut host)
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

    /// Windows of one length side by side, as many as a batch takes.
    fn cut(windows: &[Vec<u32>]) -> Vec<&[Vec<u32>]> {
        (windows.chunk_by(|a, b| a.len() == b.len()))
            .filter(|same| !same[0].is_empty())
            .flat_map(|same| same.chunks((B::BATCH_TOKENS / same[0].len()).max(1)))
            .collect()
    }

    fn need(&self, batches: &[&[Vec<u32>]]) -> ShelfNeed {
        let rows = |batch: &&[Vec<u32>]| batch.len() * batch[0].len();
        let starts = batches.iter().scan(0, |start, batch| {
            let this = *start;
            *start += rows(batch);
            Some(this)
        });
        let followed = starts.filter(|&start| FloatStream::<B>::follows(start));
        let rows = batches.iter().map(rows).max().unwrap_or(0);
        let float = self.float.as_ref().map(|_| followed.count());
        ShelfNeed {
            more_hessians: self.more_hessians,
            ..ShelfNeed::of(&self.spec, batches.len(), rows, float)
        }
    }

    /// Brings every batch to `tap` of the resident block and shows what is there.
    fn pass(&mut self, tap: Tap, look: &mut Look<'_, B>) -> Result<(), ModelError> {
        let state = self.block.as_ref().expect("a block is resident");
        let shelves = self.shelves.as_ref().expect("windows were embedded");
        if tap.branch == Some(0) {
            // All inner activations of the step before were taken back.
            let rows = self.batches.iter().map(Batch::rows).max().unwrap_or(0);
            B::clear(&shelves.inner, rows, state.inner_columns(tap.step));
        }
        let count = self.batches.len();
        for (place, batch) in self.batches.iter_mut().enumerate() {
            let (tables, tokens) = (&self.tables[&batch.tokens()], batch.tokens());
            let track = Track::quantized(shelves, tables, tokens, place, &batch.by_token);
            let input = state.reach(tap, &mut batch.state, &track)?;
            let beside = |place| track.beside(shelves, place, count);
            let float = match &mut self.float {
                None => None,
                Some(stream) => stream.reach(tap, place, beside)?,
            };
            look(&input, float.as_ref());
        }
        B::check()
    }
}

/// The type in which a backend computes.
fn computed_in<B: DecoderBackend>(states: &Tensor<B, 2>) -> Dtype {
    match states.dtype() {
        DType::F16 => Dtype::F16,
        DType::BF16 => Dtype::BF16,
        _ => Dtype::F32,
    }
}

/// Sees the input of a capture group and, where there is a float stream, its partner there.
type Look<'a, B> = dyn FnMut(&Tensor<B, 2>, Option<&Tensor<B, 2>>) + 'a;

impl<B: DecoderBackend> Decoder for Engine<B> {
    fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    fn leave_room(&mut self, hessians: usize) {
        self.more_hessians = hessians;
    }

    fn embed(&mut self, windows: &[Vec<u32>]) -> Result<(), ModelError> {
        self.batches.clear();
        self.float = self.float.take().map(|_| FloatStream::default());
        self.shelves = None;
        let cut = Self::cut(windows);
        let shelves = B::shelves(&self.need(&cut));
        B::check()?;
        let table = self.table()?;
        let inputs = self.spec.embedding.per_block.as_ref();
        let sizes = (self.spec.blocks.len(), self.spec.hidden_size);
        let by_token = inputs
            .map(|inputs| RowsByToken::<B>::read(self.source.as_ref(), inputs, sizes, windows))
            .transpose()?;
        let blocks = self.spec.blocks.len();
        let mut start = 0;
        for (place, windows) in cut.into_iter().enumerate() {
            let ids = windows.concat();
            let hidden = self.embed_ids(&table, &ids)?;
            if let Some(stream) = &mut self.float {
                stream.embed(start, &shelves.float, &hidden);
            }
            start += ids.len();
            let mut batch = Batch::new(windows, B::keep(&shelves.hidden, place, &hidden));
            if let Some((rows, inputs)) = by_token.as_ref().zip(inputs) {
                let all = rows.of(&ids, &hidden);
                for index in 0..blocks {
                    let first = index * inputs.width;
                    let of_block = B::columns(&all, first..first + inputs.width);
                    let place = place * blocks + index;
                    let kept = B::keep(&shelves.by_token, place, &of_block);
                    batch.by_token.push(kept);
                }
            }
            self.batches.push(batch);
            let tokens = windows[0].len();
            (self.tables.entry(tokens))
                .or_insert_with(|| Tables::new(&self.spec, 0..tokens, tokens));
        }
        self.shelves = Some(shelves);
        B::check()
    }

    fn load_block(&mut self, index: usize) -> Result<(), ModelError> {
        self.block = None; // frees the old block before the new one is read
        let block = self.take_next(index)?;
        if let Some(stream) = &mut self.float {
            let place = stream.block.take().map(|state| state.block);
            stream.block = Some(BlockState::new(index, &self.spec, block.copied(place)));
        }
        self.block = Some(BlockState::new(index, &self.spec, block));
        self.read_ahead(index + 1);
        B::check()
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
        B::tidy();
        Ok(())
    }

    fn finish_block(&mut self) -> Result<(), ModelError> {
        let state = self.block.as_ref().expect("a block is resident");
        let shelves = self.shelves.as_ref().expect("windows were embedded");
        let count = self.batches.len();
        for (place, batch) in self.batches.iter_mut().enumerate() {
            let (tables, tokens) = (&self.tables[&batch.tokens()], batch.tokens());
            let track = Track::quantized(shelves, tables, tokens, place, &batch.by_token);
            state.finish(&mut batch.state, &track)?;
            if let Some(stream) = &mut self.float {
                stream.finish(place, |place| track.beside(shelves, place, count))?;
            }
        }
        B::tidy();
        B::check()
    }

    fn forward_block(&mut self) -> Result<(), ModelError> {
        // No weight is replaced on the way: a batch passes at once, and nothing inside it waits.
        self.finish_block()?;
        let index = self.block.as_ref().map_or(0, |state| state.index);
        for batch in &self.batches {
            if !B::is_finite(&batch.state.hidden()) {
                let computed = computed_in(&batch.state.hidden());
                return Err(ModelError::NotFinite {
                    block: index,
                    computed,
                });
            }
        }
        B::check()
    }

    fn weight(&self, layer: &LayerName) -> Result<Weight, ModelError> {
        Ok(self.linear(layer)?.weight())
    }

    fn replace_weight(&mut self, layer: &LayerName, weight: Weight) -> Result<(), ModelError> {
        let block = self.block.as_mut();
        let linear = block
            .and_then(|state| {
                let mut linears = state.block.linears_mut();
                linears.find(|linear| linear.spec.name == *layer)
            })
            .ok_or_else(|| ModelError::NotResident(layer.clone()))?;
        linear.replace(weight);
        B::check()
    }

    fn batches(&self) -> usize {
        self.batches.len()
    }

    fn head_input(&mut self, batch: usize) -> Result<HeadInput, ModelError> {
        let hidden = self.batches[batch].state.hidden();
        let input = B::head_input(self.head()?, hidden)?;
        B::check()?;
        Ok(input)
    }

    fn batch_windows(&self, batch: usize) -> &[Vec<u32>] {
        &self.batches[batch].windows
    }
}
