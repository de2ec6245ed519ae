//! All blocks resident on a GPU. A step is recorded once as a CUDA graph and then run: nothing of it
//! is queued from here, and no address in it changes until the cache is made anew.

use std::sync::Arc;

use gptq_kernels::AttentionShape;
use gptq_kernels::cuda::{
    Buffer, CudaError, DeviceKeyValues, Gpu, Pinned, Recorded, TextRows, Turn, WorkingSpace,
};
use gptq_model::DecoderConfig;
use gptq_types::{DeviceMatrix, Dtype, Stage};

use super::projection::{Dense, Projection};
use super::{Lengths, RunError, Runner, memory};
use crate::OpenedModel;

/// Tokens of a prompt that go through the blocks together: enough for cuBLAS's full rate; what they
/// need beside the weights grows with them.
const PROMPT_TOKENS: usize = 2048;

/// See the module.
pub(super) struct GpuRunner {
    gpu: Arc<Gpu>,
    _space: WorkingSpace,
    /// Bytes that others of this process held on the device before.
    held_before: usize,
    config: DecoderConfig,
    dtype: Dtype,
    embedding: Dense,        // [vocab_size, hidden_size]
    own_head: Option<Dense>, // absent where the embedding is the head
    final_norm: Buffer,
    blocks: Vec<Block>,
    /// Some blocks' `o_proj` reads padded rows and others' does not (packed beside float ones): what
    /// one block leaves in the place of attention would be padding of the next.
    padded_by_turns: bool,
    caches: Vec<DeviceKeyValues>, // of each block
    turn: Option<Turn>,
    lengths: Lengths,
    prompt: Option<Spaces>,
    newest: Option<Newest>,
}

struct Block {
    input_norm: Buffer,
    post_attention_norm: Buffer,
    head_norms: Option<[Buffer; 2]>, // queries and keys, [head_dim]
    attention_in: Projection,        // q, k, v
    attention_out: Projection,
    mlp_in: Projection, // gate, up
    mlp_out: Projection,
}

/// Where a pass of up to `rows` rows keeps what it computes.
struct Spaces {
    rows: usize,
    ids: Buffer,      // u32
    hidden: Buffer,   // [rows, hidden_size]
    input: Buffer,    // [rows, widest input], in the order of the linear that reads it
    output: Buffer,   // [rows, widest outputs of a stage]
    queries: Buffer,  // [rows, heads * head_dim]
    attended: Buffer, // the same, as `o_proj` reads it: zero where that has padding
}

/// A step of all sequences.
struct Newest {
    spaces: Spaces,
    held: Buffer,   // i32 [batch], tokens of each sequence
    logits: Buffer, // f32 [batch, vocab_size]
    home: Pinned,
    ran: bool,
    recorded: Option<Recorded>,
}

impl Block {
    fn load(
        gpu: &Arc<Gpu>,
        model: &OpenedModel,
        index: usize,
        dtype: Dtype,
    ) -> Result<Self, RunError> {
        let norm = |name: &str| -> Result<Buffer, RunError> {
            let weight = model.vector(&format!("model.layers.{index}.{name}.weight"))?;
            Ok(Buffer::from_host(gpu, &weight)?)
        };
        let stage = |stage| Projection::load(gpu, model, index, stage, dtype);
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
}

impl GpuRunner {
    /// Reads all weights.
    pub fn open(model: &OpenedModel, ordinal: usize) -> Result<Self, RunError> {
        let gpu = Gpu::open(ordinal)?;
        let space = WorkingSpace::of(&gpu);
        gpu.forget_peak()?;
        let held_before = gpu.memory()?.used;
        gpu.keep_library_space()?;
        let config = model.config.clone();
        let embedding = model.embedding()?;
        let dtype = match model.weights.computing_type() {
            Some(Dtype::BF16) => Dtype::BF16,
            _ => Dtype::F16,
        };
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        let embedding = Dense::new(
            &gpu,
            "model.embed_tokens.weight",
            &[&embedding],
            vocab,
            hidden,
            dtype,
        )?;
        let own_head = match model.own_head()? {
            Some(head) => Some(Dense::new(
                &gpu,
                "lm_head.weight",
                &[&head],
                vocab,
                hidden,
                dtype,
            )?),
            None => None,
        };
        let blocks: Vec<Block> = (0..config.num_hidden_layers)
            .map(|index| Block::load(&gpu, model, index, dtype))
            .collect::<Result<_, _>>()?;
        let width = |block: &Block| block.attention_out.order().width;
        let padded_by_turns = blocks
            .windows(2)
            .any(|two| width(&two[0]) != width(&two[1]));
        Ok(GpuRunner {
            final_norm: Buffer::from_host(&gpu, &model.vector("model.norm.weight")?)?,
            gpu,
            _space: space,
            held_before,
            config,
            dtype,
            embedding,
            own_head,
            blocks,
            padded_by_turns,
            caches: Vec::new(),
            turn: None,
            lengths: Lengths::default(),
            prompt: None,
            newest: None,
        })
    }

    fn matrix(&self, buffer: &Buffer, rows: usize, columns: usize) -> DeviceMatrix {
        DeviceMatrix {
            address: buffer.address(),
            rows,
            columns,
            dtype: self.dtype,
        }
    }

    fn spaces(&self, rows: usize) -> Result<Spaces, CudaError> {
        let config = &self.config;
        let widest = |of: fn(&Projection) -> usize| {
            (self.blocks.iter())
                .flat_map(|block| {
                    [
                        &block.attention_in,
                        &block.attention_out,
                        &block.mlp_in,
                        &block.mlp_out,
                    ]
                })
                .map(of)
                .max()
                .unwrap_or(0)
        };
        let queries = config.num_attention_heads * config.head_dim;
        let attended = (self.blocks.iter())
            .map(|block| block.attention_out.order().width)
            .max()
            .unwrap_or(0);
        let buffer = |columns: usize| Buffer::new(&self.gpu, rows * columns * 2);
        Ok(Spaces {
            rows,
            ids: Buffer::new(&self.gpu, rows * 4)?,
            hidden: buffer(config.hidden_size)?,
            input: buffer(widest(|projection| projection.order().width))?,
            output: buffer(widest(Projection::outputs_width))?,
            queries: buffer(queries)?,
            attended: Buffer::zeros(&self.gpu, rows * attended * 2)?,
        })
    }

    /// Queues a pass of `count` rows whose ids are in place; final hidden states, not normed, are
    /// then in `spaces.hidden`.
    fn pass(&self, spaces: &Spaces, count: usize, rows: TextRows) -> Result<(), CudaError> {
        let (gpu, config) = (&self.gpu, &self.config);
        let eps = config.rms_norm_eps as f32;
        let hidden = self.matrix(&spaces.hidden, count, config.hidden_size);
        gpu.look_up(hidden.address, self.embedding.matrix(), &spaces.ids, count)?;
        for (block, cache) in self.blocks.iter().zip(&self.caches) {
            self.attend(spaces, hidden, count, rows, block, cache)?;
            let order = block.mlp_in.order();
            let input = self.matrix(&spaces.input, count, order.width);
            gpu.norm_rows(
                input.address,
                order,
                hidden,
                &block.post_attention_norm,
                eps,
            )?;
            let output = spaces.output.address();
            block.mlp_in.multiply(gpu, output, input, false)?;
            let [gate, up] = block.mlp_in.outputs(output, count);
            let order = block.mlp_out.order();
            let input = self.matrix(&spaces.input, count, order.width);
            let size = [count, config.intermediate_size];
            gpu.gate_rows(input.address, order, [gate, up], size, self.dtype)?;
            block.mlp_out.multiply(gpu, hidden.address, input, true)?;
        }
        Ok(())
    }

    fn attend(
        &self,
        spaces: &Spaces,
        hidden: DeviceMatrix,
        count: usize,
        rows: TextRows,
        block: &Block,
        cache: &DeviceKeyValues,
    ) -> Result<(), CudaError> {
        let (gpu, config) = (&self.gpu, &self.config);
        let eps = config.rms_norm_eps as f32;
        let turn = self.turn.as_ref().expect("reset made the table");
        let order = block.attention_in.order();
        let input = self.matrix(&spaces.input, count, order.width);
        gpu.norm_rows(input.address, order, hidden, &block.input_norm, eps)?;
        let output = spaces.output.address();
        block.attention_in.multiply(gpu, output, input, false)?;
        let queries = self.matrix(
            &spaces.queries,
            count,
            config.num_attention_heads * config.head_dim,
        );
        cache.store(
            queries.address,
            block.attention_in.outputs(output, count),
            count,
            rows,
            block.head_norms.as_ref(),
            eps,
            turn,
        )?;
        let attended = spaces.attended.address();
        match rows {
            TextRows::Newest(held) => {
                let order = block.attention_out.order();
                if self.padded_by_turns && order.width > queries.columns {
                    spaces.attended.clear()?;
                }
                cache.attend_newest(attended, order, queries.address, held)?;
                let attended = self.matrix(&spaces.attended, count, order.width);
                (block.attention_out).multiply(gpu, hidden.address, attended, true)
            }
            TextRows::Prompt { sequence, first } => {
                cache.attend_prompt(attended, queries, sequence, first)?;
                let attended = self.matrix(&spaces.attended, count, queries.columns);
                (block.attention_out).multiply_natural(gpu, hidden.address, attended, true)
            }
        }
    }

    /// f32 logits of the rows of `hidden`.
    fn logits(&self, out: u64, spaces: &Spaces, hidden: DeviceMatrix) -> Result<(), CudaError> {
        let normed = DeviceMatrix {
            address: spaces.input.address(),
            ..hidden
        };
        let eps = self.config.rms_norm_eps as f32;
        let order = gptq_kernels::cuda::RowOrder::natural(hidden.columns);
        (self.gpu).norm_rows(normed.address, order, hidden, &self.final_norm, eps)?;
        let head = self.own_head.as_ref().unwrap_or(&self.embedding);
        self.gpu.project(out, true, normed, head.matrix())
    }

    fn run_step(&self, newest: &mut Newest, tokens: &[u32]) -> Result<(), CudaError> {
        let gpu = &self.gpu;
        let held: Vec<i32> = (self.lengths.held().iter())
            .map(|&held| held as i32)
            .collect();
        gpu.to_device(newest.held.address(), &held)?;
        gpu.to_device(newest.spaces.ids.address(), tokens)?;
        if newest.ran && newest.recorded.is_none() {
            newest.recorded = Some(gpu.record(|| self.queue_step(newest))?);
        }
        match &newest.recorded {
            Some(recorded) => recorded.run()?,
            None => self.queue_step(newest)?,
        }
        newest.ran = true;
        let bytes = newest.logits.bytes();
        gpu.to_pinned(&mut newest.home, newest.logits.address(), bytes)
    }

    fn queue_step(&self, newest: &Newest) -> Result<(), CudaError> {
        let batch = newest.spaces.rows;
        self.pass(&newest.spaces, batch, TextRows::Newest(&newest.held))?;
        let hidden = self.matrix(&newest.spaces.hidden, batch, self.config.hidden_size);
        self.logits(newest.logits.address(), &newest.spaces, hidden)
    }
}

impl Runner for GpuRunner {
    fn config(&self) -> &DecoderConfig {
        &self.config
    }

    fn reset(&mut self, batch: usize, capacity: usize) -> Result<(), RunError> {
        // What the device itself lacks, its allocator says.
        memory::check(&self.config, batch, capacity, 2, usize::MAX)?;
        self.lengths = Lengths::new(&self.config, batch, capacity)?;
        // The old ones go first: they may be most of what is held.
        (self.newest, self.prompt) = (None, None);
        self.caches.clear();
        let shape = AttentionShape {
            heads: self.config.num_attention_heads,
            kv_heads: self.config.num_key_value_heads,
            head_dim: self.config.head_dim,
        };
        self.caches = (self.blocks.iter())
            .map(|_| DeviceKeyValues::new(&self.gpu, batch, capacity, shape, self.dtype))
            .collect::<Result<_, _>>()?;
        let rotation = self.config.rotation(0..capacity, capacity);
        self.turn = Some(Turn::new(&self.gpu, &rotation)?);
        let logits = batch * self.config.vocab_size * 4;
        self.newest = Some(Newest {
            spaces: self.spaces(batch)?,
            held: Buffer::new(&self.gpu, batch * 4)?,
            logits: Buffer::new(&self.gpu, logits)?,
            home: Pinned::new(logits)?,
            ran: false,
            recorded: None,
        });
        Ok(())
    }

    fn prefill(&mut self, sequence: usize, tokens: &[u32]) -> Result<Vec<f32>, RunError> {
        let first = self.lengths.append(&self.config, sequence, tokens)?;
        let rows = tokens.len().min(PROMPT_TOKENS);
        if self.prompt.as_ref().is_none_or(|spaces| spaces.rows < rows) {
            self.prompt = None;
            self.prompt = Some(self.spaces(rows)?);
        }
        let spaces = self.prompt.as_ref().expect("made above");
        for (piece, tokens) in tokens.chunks(PROMPT_TOKENS).enumerate() {
            self.gpu.to_device(spaces.ids.address(), tokens)?;
            let first = first + piece * PROMPT_TOKENS;
            let rows = TextRows::Prompt { sequence, first };
            self.pass(spaces, tokens.len(), rows)?;
        }
        let (vocab, width) = (self.config.vocab_size, self.config.hidden_size);
        let last = (tokens.len() - 1) % PROMPT_TOKENS;
        let hidden = DeviceMatrix {
            address: spaces.hidden.address() + 2 * (last * width) as u64,
            ..self.matrix(&spaces.hidden, 1, width)
        };
        let logits = Buffer::new(&self.gpu, vocab * 4)?;
        self.logits(logits.address(), spaces, hidden)?;
        Ok(logits.to_host(vocab)?)
    }

    fn step(&mut self, tokens: &[u32]) -> Result<&[f32], RunError> {
        self.lengths.append_each(&self.config, tokens)?;
        let mut newest = (self.newest.take()).expect("lengths exist after a reset only");
        let ran = self.run_step(&mut newest, tokens);
        let newest = self.newest.insert(newest);
        ran?;
        Ok(newest.home.as_floats())
    }

    fn peak_memory(&self) -> u64 {
        let peak = self.gpu.memory().map_or(0, |memory| memory.peak);
        peak.saturating_sub(self.held_before) as u64
    }
}
