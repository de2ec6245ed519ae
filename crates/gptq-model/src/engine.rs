//! A decoder on one backend: the resident block and the hidden states of the pass.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::thread::JoinHandle;

use burn::tensor::Tensor;
use gptq_kernels::Rotation;
use gptq_types::{ActivationSink, LayerName, SourceError, Stage, Weight};

use crate::backend::{DecoderBackend, ShelfNeed, Shelves};
use crate::block::{Block, HostBlock, Linear};
use crate::float_stream::FloatStream;
use crate::head::HostHead;
use crate::score::HeadInput;
use crate::weights::WeightSource;
use crate::{Decoder, DecoderConfig, ModelError, Streams};

/// Windows of one length that go through a block together.
struct Batch<B: DecoderBackend> {
    windows: Vec<Vec<u32>>,
    hidden: Option<B::Kept>, // [tokens, hidden_size]; out only while it is changed
    inner: Option<B::Kept>,  // input of the linear whose output is due: attention or gated
}

impl<B: DecoderBackend> Batch<B> {
    fn tokens(&self) -> usize {
        self.windows[0].len()
    }

    fn rows(&self) -> usize {
        self.windows.len() * self.tokens()
    }

    fn hidden(&self) -> Tensor<B, 2> {
        B::peek(self.hidden.as_ref().expect("hidden states are kept"))
    }
}

/// Sees the input of a stage and, where there is a float stream, its partner there.
type Look<'a, B> = dyn FnMut(&Tensor<B, 2>, Option<&Tensor<B, 2>>) + 'a;

/// See [`Decoder`].
pub(crate) struct Engine<B: DecoderBackend> {
    source: Arc<dyn WeightSource>,
    config: DecoderConfig,
    head: Option<B::Head>, // read when first asked for
    block: Option<Block<B>>,
    next: Option<(usize, JoinHandle<Result<HostBlock, SourceError>>)>,
    batches: Vec<Batch<B>>,
    shelves: Option<Shelves<B::Shelf>>,
    float: Option<FloatStream<B>>,
    more_hessians: usize, // that somebody else will keep on the device
    turns: BTreeMap<usize, B::Turn>, // by window length
}

impl<B: DecoderBackend> Engine<B> {
    pub fn new(
        source: Arc<dyn WeightSource>,
        config: DecoderConfig,
        streams: Streams,
    ) -> Result<Self, ModelError> {
        Ok(Engine {
            float: match streams {
                Streams::One => None,
                Streams::BesideFloat => Some(FloatStream::default()),
            },
            source,
            config,
            head: None,
            block: None,
            next: None,
            batches: Vec::new(),
            shelves: None,
            more_hessians: 0,
            turns: BTreeMap::new(),
        })
    }

    /// Not kept, since a pass needs it once and it may be larger than a block.
    pub fn table(&self) -> Result<B::Table, ModelError> {
        let name = "model.embed_tokens.weight";
        Ok(B::table(
            self.source.as_ref(),
            name,
            self.config.hidden_size,
        )?)
    }

    fn head(&mut self) -> Result<&B::Head, ModelError> {
        if self.head.is_none() {
            let head = HostHead::new(self.source.clone(), &self.config)?;
            self.head = Some(B::head(head)?);
            B::check()?;
        }
        Ok(self.head.as_ref().expect("it was read just now"))
    }

    /// `[ids, hidden_size]`.
    pub fn embed_ids(&self, table: &B::Table, ids: &[u32]) -> Result<Tensor<B, 2>, ModelError> {
        let vocab_size = self.config.vocab_size;
        match ids.iter().find(|&&id| id as usize >= vocab_size) {
            Some(&id) => Err(ModelError::TokenOutsideVocabulary { id, vocab_size }),
            None => Ok(B::embed(table, ids)),
        }
    }

    pub fn rotation(&self, positions: std::ops::Range<usize>, tokens: usize) -> Rotation {
        self.config.rotation(positions, tokens)
    }

    pub fn load(&self, index: usize) -> Result<Block<B>, ModelError> {
        let host = HostBlock::read::<B>(self.source.as_ref(), &self.config, index)?;
        Ok(Block::load(host, &self.config))
    }

    /// Block `index` from the thread that read it ahead, if one did.
    fn take_next(&mut self, index: usize) -> Result<Block<B>, ModelError> {
        match self.next.take() {
            Some((ahead, reader)) if ahead == index => {
                let host = reader.join().expect("the reader does not panic")?;
                Ok(Block::load(host, &self.config))
            }
            _ => self.load(index),
        }
    }

    fn read_ahead(&mut self, index: usize) {
        if !B::PREFETCH || index >= self.config.num_hidden_layers {
            return;
        }
        let (source, config) = (self.source.clone(), self.config.clone());
        let read = move || HostBlock::read::<B>(source.as_ref(), &config, index);
        self.next = Some((index, std::thread::spawn(read)));
    }

    pub fn check_window(&self, tokens: usize) -> Result<(), ModelError> {
        match self.config.sliding_window {
            Some(window) if tokens > window => Err(ModelError::SlidingWindow { tokens, window }),
            _ => Ok(()),
        }
    }

    pub fn head_of(&mut self, hidden: Tensor<B, 2>) -> Result<HeadInput, ModelError> {
        let input = B::head_input(self.head()?, hidden)?;
        B::check()?;
        Ok(input)
    }

    fn linear(&self, layer: &LayerName) -> Result<&Linear<B>, ModelError> {
        let found = self.block.as_ref();
        found
            .and_then(|block| block.linears().find(|linear| linear.name == *layer))
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
        ShelfNeed {
            batches: batches.len(),
            rows: batches.iter().map(rows).max().unwrap_or(0),
            hidden: self.config.hidden_size,
            attention: self.attention_width(),
            inner: self.attention_width().max(self.config.intermediate_size),
            block_elements: self.config.block_bytes() / 4,
            float: self.float.as_ref().map(|_| followed.count()),
            more_hessians: self.more_hessians,
        }
    }

    /// Columns of the input of `o_proj`.
    fn attention_width(&self) -> usize {
        self.config.num_attention_heads * self.config.head_dim
    }

    /// Adds the output of the linear that `inner` waits for to the hidden states; these. A gated product for
    /// which there was no room is computed again, from the same values to the same bits.
    fn add_output(
        batch: &mut Batch<B>,
        block: &Block<B>,
        linear: &Linear<B>,
        shelf: &B::Shelf,
        place: usize,
    ) -> Tensor<B, 2> {
        let inner = match batch.inner.take() {
            Some(kept) => B::recall(kept),
            None => block.gated(&block.mlp_input(&batch.hidden())),
        };
        let output = linear.forward(&inner);
        drop(inner);
        let hidden = B::recall(batch.hidden.take().expect("hidden states are kept"));
        let hidden = B::add(hidden, output);
        batch.hidden = Some(B::keep(shelf, place, &hidden));
        hidden
    }

    fn pass(&mut self, stage: Stage, look: &mut Look<'_, B>) -> Result<(), ModelError> {
        let block = self.block.as_ref().expect("a block is resident");
        let shelves = self.shelves.as_ref().expect("windows were embedded");
        // All inner activations of the stage before were taken back.
        let rows = self.batches.iter().map(Batch::rows).max().unwrap_or(0);
        match stage {
            Stage::AttentionOut => B::clear(&shelves.inner, rows, self.attention_width()),
            Stage::MlpOut => B::clear(&shelves.inner, rows, self.config.intermediate_size),
            Stage::AttentionIn | Stage::MlpIn => {}
        }
        for (place, batch) in self.batches.iter_mut().enumerate() {
            let tokens = batch.tokens();
            let input = match stage {
                Stage::AttentionIn => block.attention_input(&batch.hidden()),
                Stage::AttentionOut => {
                    let x = block.attention_input(&batch.hidden());
                    block.attend(&x, &self.turns[&tokens], tokens)
                }
                Stage::MlpIn => {
                    let shelf = &shelves.hidden;
                    let linear = &block.attention_out;
                    let hidden = Self::add_output(batch, block, linear, shelf, place);
                    block.mlp_input(&hidden)
                }
                Stage::MlpOut => block.gated(&block.mlp_input(&batch.hidden())),
            };
            let turn = &self.turns[&tokens];
            let float = (self.float.as_mut())
                .and_then(|stream| stream.advance(stage, place, &shelves.float, turn, tokens));
            look(&input, float.as_ref());
            let awaits = matches!(stage, Stage::AttentionOut | Stage::MlpOut);
            if awaits && B::has_room(&shelves.inner, place) {
                batch.inner = Some(B::keep(&shelves.inner, place, &input));
            }
        }
        B::check()
    }
}

impl<B: DecoderBackend> Decoder for Engine<B> {
    fn config(&self) -> &DecoderConfig {
        &self.config
    }

    fn leave_room(&mut self, hessians: usize) {
        self.more_hessians = hessians;
    }

    fn embed(&mut self, windows: &[Vec<u32>]) -> Result<(), ModelError> {
        self.batches.clear();
        self.float = self.float.take().map(|_| FloatStream::default());
        self.shelves = None;
        let cut = Self::cut(windows);
        for batch in &cut {
            self.check_window(batch[0].len())?;
        }
        let shelves = B::shelves(&self.need(&cut));
        B::check()?;
        let table = self.table()?;
        let mut start = 0;
        for (place, windows) in cut.into_iter().enumerate() {
            let hidden = self.embed_ids(&table, &windows.concat())?;
            if let Some(stream) = &mut self.float {
                stream.embed(start, &shelves.float, &hidden);
            }
            start += windows.len() * windows[0].len();
            self.batches.push(Batch {
                hidden: Some(B::keep(&shelves.hidden, place, &hidden)),
                windows: windows.to_vec(),
                inner: None,
            });
            let tokens = windows[0].len();
            if !self.turns.contains_key(&tokens) {
                let turn = B::turn(self.rotation(0..tokens, tokens));
                self.turns.insert(tokens, turn);
            }
        }
        self.shelves = Some(shelves);
        B::check()
    }

    fn load_block(&mut self, index: usize) -> Result<(), ModelError> {
        self.block = None; // frees the old block before the new one is read
        let block = self.take_next(index)?;
        if let Some(stream) = &mut self.float {
            stream.block = Some(block.copied(stream.block.take()));
        }
        self.block = Some(block);
        self.read_ahead(index + 1);
        B::check()
    }

    fn stage(&mut self, stage: Stage, sink: &mut dyn ActivationSink) -> Result<(), ModelError> {
        self.pass(stage, &mut |input, float| {
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
        let block = self.block.as_ref().expect("a block is resident");
        let shelf = &self.shelves.as_ref().expect("windows were embedded").hidden;
        for (place, batch) in self.batches.iter_mut().enumerate() {
            Self::add_output(batch, block, &block.mlp_out, shelf, place);
        }
        B::tidy();
        B::check()
    }

    fn forward_block(&mut self) -> Result<(), ModelError> {
        // No weight is replaced on the way: a batch passes at once, and nothing inside it waits.
        let block = self.block.as_ref().expect("a block is resident");
        let shelves = self.shelves.as_ref().expect("windows were embedded");
        for (place, batch) in self.batches.iter_mut().enumerate() {
            let tokens = batch.tokens();
            let turn = &self.turns[&tokens];
            let hidden = B::recall(batch.hidden.take().expect("hidden states are kept"));
            let hidden = block.forward(hidden, turn, tokens);
            batch.hidden = Some(B::keep(&shelves.hidden, place, &hidden));
            drop(hidden);
            if let Some(stream) = &mut self.float {
                stream.forward(place, &shelves.float, turn, tokens);
            }
        }
        B::tidy();
        B::check()
    }

    fn weight(&self, layer: &LayerName) -> Result<Weight, ModelError> {
        Ok(self.linear(layer)?.weight())
    }

    fn replace_weight(&mut self, layer: &LayerName, weight: Weight) -> Result<(), ModelError> {
        let block = self.block.as_mut();
        let linear = block
            .and_then(|block| block.linears_mut().find(|linear| linear.name == *layer))
            .ok_or_else(|| ModelError::NotResident(layer.clone()))?;
        linear.replace(weight);
        B::check()
    }

    fn batches(&self) -> usize {
        self.batches.len()
    }

    fn head_input(&mut self, batch: usize) -> Result<HeadInput, ModelError> {
        self.head_of(self.batches[batch].hidden())
    }

    fn batch_windows(&self, batch: usize) -> &[Vec<u32>] {
        &self.batches[batch].windows
    }
}
