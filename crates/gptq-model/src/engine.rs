//! A decoder on one backend: the resident block and the hidden states of the pass.

use std::collections::BTreeMap;
use std::sync::Arc;

use burn::tensor::Tensor;
use gptq_kernels::{Rotation, rms_norm};
use gptq_types::{ActivationSink, LayerName, Stage};

use crate::backend::DecoderBackend;
use crate::block::{Block, Linear};
use crate::score::HeadInput;
use crate::weights::WeightSource;
use crate::{Decoder, DecoderConfig, ModelError, Unwatched};

/// Rows of a batch: enough for full speed of the products, few enough that its widest temporary
/// (`rows * intermediate_size`) stays near the processor; 4096 rows were 5 % slower.
const BATCH_TOKENS: usize = 2048;

/// Windows of one length that go through a block together.
struct Batch<B: DecoderBackend> {
    windows: Vec<Vec<u32>>,
    hidden: Tensor<B, 2>,        // [tokens, hidden_size]
    inner: Option<Tensor<B, 2>>, // input of the linear whose output is due: attention or gated
}

impl<B: DecoderBackend> Batch<B> {
    fn tokens(&self) -> usize {
        self.windows[0].len()
    }
}

/// See [`Decoder`].
pub(crate) struct Engine<B: DecoderBackend> {
    source: Arc<dyn WeightSource>,
    config: DecoderConfig,
    head: Option<Arc<Vec<f32>>>, // [vocab_size, hidden_size], read when first asked for
    final_norm: Vec<f32>,        // [hidden_size]
    block: Option<Block<B>>,
    batches: Vec<Batch<B>>,
    rotations: BTreeMap<usize, Rotation>, // by window length
}

impl<B: DecoderBackend> Engine<B> {
    pub fn new(source: Arc<dyn WeightSource>, config: DecoderConfig) -> Result<Self, ModelError> {
        Ok(Engine {
            final_norm: source.plain("model.norm.weight")?,
            source,
            config,
            head: None,
            block: None,
            batches: Vec::new(),
            rotations: BTreeMap::new(),
        })
    }

    /// `[vocab_size, hidden_size]`; not kept, since a pass needs it once and it may be larger
    /// than a block.
    pub fn embedding(&self) -> Result<Arc<Vec<f32>>, ModelError> {
        Ok(Arc::new(self.source.plain("model.embed_tokens.weight")?))
    }

    fn head(&mut self) -> Result<Arc<Vec<f32>>, ModelError> {
        if self.head.is_none() {
            self.head = Some(match self.config.tie_word_embeddings {
                true => self.embedding()?,
                false => Arc::new(self.source.plain("lm_head.weight")?),
            });
        }
        Ok(self.head.clone().expect("it was read just now"))
    }

    /// `[ids, hidden_size]`.
    pub fn embed_ids(&self, embedding: &[f32], ids: &[u32]) -> Result<Tensor<B, 2>, ModelError> {
        let width = self.config.hidden_size;
        let mut rows = Vec::with_capacity(ids.len() * width);
        for &id in ids {
            if id as usize >= self.config.vocab_size {
                return Err(ModelError::TokenOutsideVocabulary {
                    id,
                    vocab_size: self.config.vocab_size,
                });
            }
            rows.extend_from_slice(&embedding[id as usize * width..][..width]);
        }
        Ok(B::upload(rows, ids.len(), width))
    }

    pub fn rotation(&self, positions: std::ops::Range<usize>, tokens: usize) -> Rotation {
        self.config.rope_scaling.rotation(
            self.config.head_dim,
            self.config.rope_theta,
            positions,
            tokens,
        )
    }

    pub fn load(&self, index: usize) -> Result<Block<B>, ModelError> {
        Block::load(self.source.as_ref(), &self.config, index)
    }

    pub fn check_window(&self, tokens: usize) -> Result<(), ModelError> {
        match self.config.sliding_window {
            Some(window) if tokens > window => Err(ModelError::SlidingWindow { tokens, window }),
            _ => Ok(()),
        }
    }

    pub fn head_of(&mut self, hidden: Tensor<B, 2>) -> Result<HeadInput, ModelError> {
        let normed = rms_norm(
            &B::download(hidden),
            &self.final_norm,
            self.config.rms_norm_eps as f32,
        );
        Ok(HeadInput {
            normed,
            head: self.head()?,
            width: self.config.hidden_size,
        })
    }

    fn linear(&self, layer: &LayerName) -> Result<&Linear<B>, ModelError> {
        let found = self.block.as_ref();
        found
            .and_then(|block| block.linears().find(|linear| linear.name == *layer))
            .ok_or_else(|| ModelError::NotResident(layer.clone()))
    }
}

/// Takes the hidden states out, leaving nothing behind that would force a copy.
fn add_output<B: DecoderBackend>(hidden: &mut Tensor<B, 2>, output: Tensor<B, 2>) {
    let empty = B::upload(Vec::new(), 0, 1);
    let taken = std::mem::replace(hidden, empty);
    *hidden = taken + output;
}

impl<B: DecoderBackend> Decoder for Engine<B> {
    fn config(&self) -> &DecoderConfig {
        &self.config
    }

    fn embed(&mut self, windows: &[Vec<u32>]) -> Result<(), ModelError> {
        self.batches.clear();
        let embedding = self.embedding()?;
        for same_length in windows.chunk_by(|a, b| a.len() == b.len()) {
            let tokens = same_length[0].len();
            if tokens == 0 {
                continue;
            }
            self.check_window(tokens)?;
            for windows in same_length.chunks((BATCH_TOKENS / tokens).max(1)) {
                self.batches.push(Batch {
                    hidden: self.embed_ids(&embedding, &windows.concat())?,
                    windows: windows.to_vec(),
                    inner: None,
                });
            }
            let rotation = self.rotation(0..tokens, tokens);
            self.rotations.insert(tokens, rotation);
        }
        Ok(())
    }

    fn load_block(&mut self, index: usize) -> Result<(), ModelError> {
        self.block = None; // frees the old block before the new one is read
        self.block = Some(self.load(index)?);
        Ok(())
    }

    fn stage(&mut self, stage: Stage, sink: &mut dyn ActivationSink) {
        let block = self.block.as_ref().expect("a block is resident");
        for batch in &mut self.batches {
            let tokens = batch.tokens();
            let input = match stage {
                Stage::AttentionIn => block.attention_input(&batch.hidden),
                Stage::AttentionOut => {
                    let x = block.attention_input(&batch.hidden);
                    block.attend(&x, &self.rotations[&tokens], tokens)
                }
                Stage::MlpIn => {
                    let attended = batch.inner.take().expect("attention came before");
                    add_output(&mut batch.hidden, block.attention_out.forward(&attended));
                    block.mlp_input(&batch.hidden)
                }
                Stage::MlpOut => block.gated(&block.mlp_input(&batch.hidden)),
            };
            let [rows, columns] = input.dims();
            B::show(&input, &mut |x| sink.observe(x, rows, columns));
            if matches!(stage, Stage::AttentionOut | Stage::MlpOut) {
                batch.inner = Some(input);
            }
        }
    }

    fn finish_block(&mut self) {
        let block = self.block.as_ref().expect("a block is resident");
        for batch in &mut self.batches {
            let gated = batch.inner.take().expect("the gated product came before");
            add_output(&mut batch.hidden, block.mlp_out.forward(&gated));
        }
    }

    fn forward_block(&mut self) {
        for stage in Stage::ALL {
            // The inputs of these two are computed again on the way to the next stage.
            if stage != Stage::AttentionIn {
                self.stage(stage, &mut Unwatched);
            }
        }
        self.finish_block();
    }

    fn weight(&self, layer: &LayerName) -> Result<Vec<f32>, ModelError> {
        Ok(self.linear(layer)?.weight())
    }

    fn replace_weight(&mut self, layer: &LayerName, weight: Vec<f32>) -> Result<(), ModelError> {
        let block = self.block.as_mut();
        let linear = block
            .and_then(|block| block.linears_mut().find(|linear| linear.name == *layer))
            .ok_or_else(|| ModelError::NotResident(layer.clone()))?;
        linear.replace(weight);
        Ok(())
    }

    fn batches(&self) -> usize {
        self.batches.len()
    }

    fn head_input(&mut self, batch: usize) -> Result<HeadInput, ModelError> {
        self.head_of(self.batches[batch].hidden.clone())
    }

    fn batch_windows(&self, batch: usize) -> &[Vec<u32>] {
        &self.batches[batch].windows
    }
}
