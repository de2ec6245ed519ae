//! All blocks resident in host memory, in the types of their file.

use gptq_kernels::{
    AttentionShape, FloatMatrix, KeyValueCache, Matrix, Rotation, multiply_each, rms_norm, swiglu,
};
use gptq_model::DecoderConfig;
use gptq_types::{SourceError, Stage};

use super::{Lengths, RunError, Runner, memory};
use crate::{OpenedModel, StoredLinear, StoredMatrix, StoredWeight};

/// Tokens of a prompt that go through the blocks together: enough for the dense product's full
/// rate, few enough that their activations stay small beside the weights.
const PROMPT_TOKENS: usize = 512;

/// See the module.
pub(super) struct CpuRunner {
    config: DecoderConfig,
    embedding: FloatMatrix,   // [vocab_size, hidden_size]
    own_head: Option<Matrix>, // absent where the embedding is the head
    final_norm: Vec<f32>,
    blocks: Vec<Block>,
    caches: Vec<KeyValueCache>, // of each block
    rotation: Rotation,
    lengths: Lengths,
    logits: Vec<f32>, // [batch, vocab_size] of the last step
    peak: u64,
}

struct Linear {
    weight: Matrix,
    bias: Option<Vec<f32>>,
}

struct Block {
    input_norm: Vec<f32>,
    post_attention_norm: Vec<f32>,
    head_norms: Option<[Vec<f32>; 2]>, // queries and keys, [head_dim]
    attention_in: Vec<Linear>,         // q, k, v
    attention_out: Vec<Linear>,
    mlp_in: Vec<Linear>, // gate, up
    mlp_out: Vec<Linear>,
}

/// Where the rows of a pass stand.
enum Rows {
    /// Tokens of one sequence from position `first` on.
    Prompt { sequence: usize, first: usize },
    /// The newest token of each sequence; how many each holds, that one counted.
    Newest { held: Vec<usize> },
}

impl Rows {
    fn position(&self, row: usize) -> usize {
        match self {
            Rows::Prompt { first, .. } => first + row,
            Rows::Newest { held } => held[row] - 1,
        }
    }
}

fn float(
    stored: &StoredMatrix,
    name: &str,
    rows: usize,
    columns: usize,
) -> Result<FloatMatrix, SourceError> {
    FloatMatrix::new(stored.dtype, &stored.bytes, columns, rows).ok_or_else(|| {
        let bytes = stored.bytes.len();
        SourceError::Invalid {
            name: name.to_string(),
            reason: format!(
                "{bytes} bytes of {} are not {rows} x {columns}",
                stored.dtype
            ),
        }
    })
}

impl Block {
    fn load(model: &OpenedModel, index: usize) -> Result<Self, SourceError> {
        let norm = |name: &str| model.vector(&format!("model.layers.{index}.{name}.weight"));
        let stage = |stage: Stage| -> Result<Vec<Linear>, SourceError> {
            (model.config.linears(index, stage).into_iter())
                .map(|(layer, k, n)| {
                    let StoredLinear { weight, bias } = model.linear(&layer, [k, n], stage)?;
                    let weight = match weight {
                        StoredWeight::Packed(solved) => Matrix::packed(&solved),
                        StoredWeight::Float(stored) => {
                            Matrix::Float(float(&stored, &layer.0, n, k)?)
                        }
                    };
                    Ok(Linear { weight, bias })
                })
                .collect()
        };
        Ok(Block {
            input_norm: norm("input_layernorm")?,
            post_attention_norm: norm("post_attention_layernorm")?,
            head_norms: match model.config.qk_norm {
                true => Some([norm("self_attn.q_norm")?, norm("self_attn.k_norm")?]),
                false => None,
            },
            attention_in: stage(Stage::AttentionIn)?,
            attention_out: stage(Stage::AttentionOut)?,
            mlp_in: stage(Stage::MlpIn)?,
            mlp_out: stage(Stage::MlpOut)?,
        })
    }

    fn bytes(&self) -> usize {
        let stages = [
            &self.attention_in,
            &self.attention_out,
            &self.mlp_in,
            &self.mlp_out,
        ];
        (stages.into_iter().flatten())
            .map(|linear| linear.weight.bytes())
            .sum()
    }

    /// Adds the block's outputs to `hidden [rows, hidden_size]`.
    fn forward(
        &self,
        config: &DecoderConfig,
        rotation: &Rotation,
        cache: &mut KeyValueCache,
        rows: &Rows,
        hidden: &mut [f32],
    ) {
        let count = hidden.len() / config.hidden_size;
        let eps = config.rms_norm_eps as f32;
        let normed = rms_norm(hidden, &self.input_norm, eps);
        let [mut q, mut k, v] = project(&self.attention_in, &normed, count);
        if let Some([of_q, of_k]) = &self.head_norms {
            q = rms_norm(&q, of_q, eps);
            k = rms_norm(&k, of_k, eps);
        }
        for x in [&mut q, &mut k] {
            let width = x.len() / count;
            rotation.apply_at(x, width, |row| rows.position(row));
        }
        let attended = attend(cache, rows, &q, &k, &v);
        let [output] = project(&self.attention_out, &attended, count);
        add(hidden, &output);

        let normed = rms_norm(hidden, &self.post_attention_norm, eps);
        let [mut gate, up] = project(&self.mlp_in, &normed, count);
        swiglu(&mut gate, &up);
        let [output] = project(&self.mlp_out, &gate, count);
        add(hidden, &output);
    }
}

/// The linears of a stage, which share their input, in one parallel region.
fn project<const N: usize>(linears: &[Linear], x: &[f32], rows: usize) -> [Vec<f32>; N] {
    let weights: Vec<&Matrix> = linears.iter().map(|linear| &linear.weight).collect();
    let mut outputs = multiply_each(&weights, x, rows);
    for (output, linear) in outputs.iter_mut().zip(linears) {
        if let Some(bias) = &linear.bias {
            for row in output.chunks_exact_mut(bias.len()) {
                add(row, bias);
            }
        }
    }
    outputs
        .try_into()
        .expect("the config names the linears of a stage")
}

fn attend(cache: &mut KeyValueCache, rows: &Rows, q: &[f32], k: &[f32], v: &[f32]) -> Vec<f32> {
    match rows {
        Rows::Prompt { sequence, first } => {
            cache.store(*sequence, *first, k, v);
            cache.attend_prompt(*sequence, *first, q)
        }
        Rows::Newest { held } => {
            let width = k.len() / held.len();
            let tokens = k.chunks_exact(width).zip(v.chunks_exact(width));
            for (sequence, (k, v)) in tokens.enumerate() {
                cache.store(sequence, held[sequence] - 1, k, v);
            }
            cache.attend_newest(q, held)
        }
    }
}

fn add(x: &mut [f32], y: &[f32]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

impl CpuRunner {
    /// Reads all weights.
    pub fn open(model: &OpenedModel) -> Result<Self, RunError> {
        let config = model.config.clone();
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        let embedding = float(
            &model.embedding()?,
            "model.embed_tokens.weight",
            vocab,
            hidden,
        )?;
        let own_head = match model.own_head()? {
            Some(stored) => Some(Matrix::Float(float(
                &stored,
                "lm_head.weight",
                vocab,
                hidden,
            )?)),
            None => None,
        };
        let blocks = (0..config.num_hidden_layers)
            .map(|index| Block::load(model, index))
            .collect::<Result<_, _>>()?;
        Ok(CpuRunner {
            embedding,
            own_head,
            final_norm: model.vector("model.norm.weight")?,
            blocks,
            caches: Vec::new(),
            rotation: model.rotation(0),
            lengths: Lengths::default(),
            logits: Vec::new(),
            peak: 0,
            config,
        })
    }

    fn weight_bytes(&self) -> usize {
        let head = self.own_head.as_ref().map_or(0, Matrix::bytes);
        let blocks: usize = self.blocks.iter().map(Block::bytes).sum();
        self.embedding.bytes() + head + blocks
    }

    /// The widest moment of a pass of `rows`: the gated product, its halves once more before they
    /// are turned row-major, and the hidden states with their norm.
    fn note_peak(&mut self, rows: usize) {
        let config = &self.config;
        let attention =
            (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim;
        let widest = (2 * config.intermediate_size).max(attention);
        let workspace = rows * (2 * widest + 3 * config.hidden_size) * 4;
        let caches: usize = self.caches.iter().map(KeyValueCache::bytes).sum();
        let logits = self.logits.len() * 4;
        let held = (self.weight_bytes() + caches + workspace + logits) as u64;
        self.peak = self.peak.max(held);
    }

    /// Final hidden states `[rows, hidden_size]`, not normed.
    fn pass(&mut self, tokens: &[u32], rows: &Rows) -> Vec<f32> {
        self.note_peak(tokens.len());
        let mut hidden = Vec::with_capacity(tokens.len() * self.config.hidden_size);
        for &token in tokens {
            self.embedding.copy_row(token as usize, &mut hidden);
        }
        for (block, cache) in self.blocks.iter().zip(&mut self.caches) {
            block.forward(&self.config, &self.rotation, cache, rows, &mut hidden);
        }
        hidden
    }

    /// `[rows, vocab_size]`.
    fn logits(&self, hidden: &[f32]) -> Vec<f32> {
        let eps = self.config.rms_norm_eps as f32;
        let normed = rms_norm(hidden, &self.final_norm, eps);
        let rows = hidden.len() / self.config.hidden_size;
        match &self.own_head {
            Some(head) => head.multiply(&normed, rows),
            None => self.embedding.multiply(&normed, rows),
        }
    }
}

impl Runner for CpuRunner {
    fn config(&self) -> &DecoderConfig {
        &self.config
    }

    fn reset(&mut self, batch: usize, capacity: usize) -> Result<(), RunError> {
        // The old ones go first: they may be most of what is held.
        self.caches.clear();
        memory::check(&self.config, batch, capacity, 4, memory::free_on_host())?;
        self.lengths = Lengths::new(&self.config, batch, capacity)?;
        let shape = AttentionShape {
            heads: self.config.num_attention_heads,
            kv_heads: self.config.num_key_value_heads,
            head_dim: self.config.head_dim,
        };
        self.caches.resize_with(self.blocks.len(), || {
            KeyValueCache::new(batch, capacity, shape)
        });
        self.rotation = self.config.rotation(0..capacity, capacity);
        self.note_peak(0);
        Ok(())
    }

    fn prefill(&mut self, sequence: usize, tokens: &[u32]) -> Result<Vec<f32>, RunError> {
        let first = self.lengths.append(&self.config, sequence, tokens)?;
        // On a thread of the pool from the start, so that no region has to wake it.
        rayon::scope(|_| {
            let mut hidden = Vec::new();
            for (piece, tokens) in tokens.chunks(PROMPT_TOKENS).enumerate() {
                let first = first + piece * PROMPT_TOKENS;
                hidden = self.pass(tokens, &Rows::Prompt { sequence, first });
            }
            let last = hidden.len() - self.config.hidden_size;
            Ok(self.logits(&hidden[last..]))
        })
    }

    fn step(&mut self, tokens: &[u32]) -> Result<&[f32], RunError> {
        self.lengths.append_each(&self.config, tokens)?;
        let held = self.lengths.held().to_vec();
        rayon::scope(|_| {
            let hidden = self.pass(tokens, &Rows::Newest { held });
            self.logits = self.logits(&hidden);
        });
        Ok(&self.logits)
    }

    fn peak_memory(&self) -> u64 {
        self.peak
    }
}
