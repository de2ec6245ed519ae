//! All blocks resident on a GPU. A step is recorded once as a CUDA graph and then run: nothing of it
//! is queued from here, and no address in it changes until the cache is made anew.

use std::sync::Arc;

use gptq_kernels::cuda::{
    Buffer, CudaError, DeviceKeyValues, DeviceMatrix, DeviceNorm, Gpu, Pinned, Recorded, RowOrder,
    TextRows, WorkingSpace,
};
use gptq_model::forward::{Block, BlockLoader, Branch, Mix};
use gptq_model::spec::{KeySource, NormKind, NormSpec, PerBlockInputSpec, Piece};
use gptq_model::{LinearSpec, ModelError, ModelSpec, norm_values};
use gptq_types::Dtype;

use super::device_pass::{OnGpu, Pass, RotaryTables};
use super::projection::{Dense, Projection};
use super::{Lengths, RunError, Runner, memory};
use crate::OpenedModel;

/// Prefill chunk in tokens: large enough for cuBLAS's full rate; the memory of its activations grows
/// with it.
const PROMPT_TOKENS: usize = 2048;

/// See the module.
pub(super) struct GpuRunner {
    gpu: Arc<Gpu>,
    _space: WorkingSpace,
    /// Bytes that others of this process held on the device before.
    held_before: usize,
    spec: ModelSpec,
    dtype: Dtype,
    embedding: Dense, // [vocab_size, hidden_size]
    by_token: Option<ByToken>,
    own_head: Option<Dense>, // absent where the embedding is the head
    final_norm: DeviceNorm,  // a factor of logits is part of it
    blocks: Vec<Block<OnGpu>>,
    /// Some blocks' `o_proj` reads padded rows and others' does not (packed and float linears are mixed), so
    /// one block's attention output would be the next one's padding.
    padded_by_turns: bool,
    caches: Vec<Option<DeviceKeyValues>>, // of each block that has its own
    rotary_tables: Vec<RotaryTables>,
    lengths: Lengths,
    prompt: Option<Spaces>,
    newest: Option<Newest>,
}

/// Buffers for a pass of up to `rows` rows.
pub(super) struct Spaces {
    rows: usize,
    ids: Buffer,           // u32
    hidden: Buffer,        // [rows, hidden_size]
    pub input: Buffer,     // [rows, widest input], in the order of the linear that reads it
    pub output: Buffer,    // [rows, widest outputs that share an input]
    pub queries: Buffer,   // [rows, widest heads * head_dim]
    pub attended: Buffer,  // as `o_proj` reads it: zero where that has padding
    by_token: [Buffer; 2], // [rows, blocks * width], the rows of all blocks and what they are made of
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

/// Reads a model's blocks.
struct Loader<'a> {
    gpu: &'a Arc<Gpu>,
    model: &'a OpenedModel,
    dtype: Dtype,
}

impl BlockLoader<OnGpu> for Loader<'_> {
    fn linears(
        &mut self,
        linears: &[LinearSpec],
        operands: &[Piece],
    ) -> Result<Projection, ModelError> {
        Projection::load(self.gpu, self.model, linears, operands, self.dtype)
    }

    fn norm(&mut self, norm: &NormSpec) -> Result<DeviceNorm, ModelError> {
        self.scaled_norm(norm, 1.0)
    }

    fn factor(&mut self, name: &str) -> Result<f32, ModelError> {
        Ok(self.model.vector(name)?[0])
    }
}

impl Loader<'_> {
    fn scaled_norm(&self, norm: &NormSpec, factor: f32) -> Result<DeviceNorm, ModelError> {
        let (weight, bias) = norm_values(norm, |name| self.model.vector(name))?;
        let scaled = |values: Vec<f32>| values.into_iter().map(|x| x * factor).collect();
        let (weight, bias): (Vec<f32>, Option<Vec<f32>>) = (scaled(weight), bias.map(scaled));
        let eps = norm.eps as f32;
        Ok(match norm.kind {
            NormKind::Rms => DeviceNorm::rms(self.gpu, &weight, eps)?,
            NormKind::Layer => DeviceNorm::layer(self.gpu, &weight, bias.as_deref(), eps)?,
        })
    }

    fn dense(&self, name: &str, rows: usize, columns: usize) -> Result<Dense, ModelError> {
        let stored = self.model.matrix(name)?;
        Dense::new(self.gpu, name, &[&stored], rows, columns, self.dtype)
    }
}

/// Inputs of every block by token id.
struct ByToken {
    spec: PerBlockInputSpec,
    table: Dense,      // [vocab, blocks * width]
    projection: Dense, // [blocks * width, hidden_size]
    norm: DeviceNorm,
    columns: usize, // blocks * width
}

impl ByToken {
    fn open(loader: &Loader<'_>, spec: &PerBlockInputSpec) -> Result<Self, ModelError> {
        let model = &loader.model.spec;
        let columns = model.blocks.len() * spec.width;
        Ok(ByToken {
            table: loader.dense(&spec.table, spec.vocab, columns)?,
            projection: loader.dense(&spec.projection, columns, model.hidden_size)?,
            norm: loader.scaled_norm(&spec.norm, 1.0)?,
            spec: spec.clone(),
            columns,
        })
    }
}

impl GpuRunner {
    /// Reads all weights.
    pub fn open(model: &OpenedModel, gpu: &Arc<Gpu>) -> Result<Self, RunError> {
        let gpu = gpu.clone();
        let space = WorkingSpace::of(&gpu);
        gpu.forget_peak()?;
        let held_before = gpu.memory()?.used;
        gpu.keep_library_space()?;
        let spec = model.spec.clone();
        let dtype = match model.weights.computing_type(&spec) {
            Some(Dtype::BF16) => Dtype::BF16,
            _ => Dtype::F16,
        };
        let mut loader = Loader {
            gpu: &gpu,
            model,
            dtype,
        };
        let (vocab, hidden) = (spec.vocab_size, spec.hidden_size);
        let embedding = loader.dense(&spec.embedding.name, vocab, hidden)?;
        let own_head = match spec.head.tied {
            true => None,
            false => Some(loader.dense(&spec.head.name, vocab, hidden)?),
        };
        let by_token = spec.embedding.per_block.as_ref();
        let by_token = by_token
            .map(|inputs| ByToken::open(&loader, inputs))
            .transpose()?;
        let blocks: Vec<Block<OnGpu>> = (spec.blocks.iter().enumerate())
            .map(|(index, block)| Block::load(block, index, &mut loader))
            .collect::<Result<_, _>>()?;
        let widths: Vec<usize> = attentions(&blocks)
            .map(|branch| branch.output.order().width())
            .collect();
        Ok(GpuRunner {
            final_norm: loader.scaled_norm(&spec.final_norm, spec.head.factor)?,
            padded_by_turns: widths.windows(2).any(|two| two[0] != two[1]),
            gpu: gpu.clone(),
            _space: space,
            held_before,
            spec,
            dtype,
            embedding,
            by_token,
            own_head,
            blocks,
            caches: Vec::new(),
            rotary_tables: Vec::new(),
            lengths: Lengths::default(),
            prompt: None,
            newest: None,
        })
    }

    fn matrix<'a>(&self, buffer: &'a Buffer, rows: usize, columns: usize) -> DeviceMatrix<'a> {
        buffer.matrix([rows, columns], self.dtype)
    }

    fn spaces(&self, rows: usize) -> Result<Spaces, CudaError> {
        let widest = |of: fn(&Projection) -> usize| {
            let branches = self.blocks.iter().flat_map(Block::branches);
            let projections = branches.flat_map(|branch| [&branch.input, &branch.output]);
            projections.map(of).max().unwrap_or(0)
        };
        let queries = (self.spec.blocks.iter())
            .flat_map(|block| block.attention())
            .map(|attention| attention.shape.heads * attention.shape.head_dim);
        let attended = attentions(&self.blocks).map(|branch| branch.output.order().width());
        let by_token = self.by_token.as_ref().map_or(0, |inputs| inputs.columns);
        let buffer = |columns: usize| Buffer::new(&self.gpu, (rows * columns * 2).max(2));
        Ok(Spaces {
            rows,
            ids: Buffer::new(&self.gpu, rows * 4)?,
            hidden: buffer(self.spec.hidden_size)?,
            input: buffer(widest(|projection| projection.order().width()))?,
            output: buffer(widest(Projection::outputs_width))?,
            queries: buffer(queries.max().unwrap_or(0))?,
            attended: Buffer::zeros(&self.gpu, rows * attended.max().unwrap_or(0) * 2)?,
            by_token: [buffer(by_token)?, buffer(by_token)?],
        })
    }

    /// Queues a pass of `count` rows whose ids are in place; final hidden states, not normed, are
    /// then in `spaces.hidden`.
    fn pass(&self, spaces: &Spaces, count: usize, rows: TextRows) -> Result<(), ModelError> {
        let (gpu, factor) = (&self.gpu, self.spec.embedding.factor);
        let hidden = self.matrix(&spaces.hidden, count, self.spec.hidden_size);
        let table = self.embedding.matrix();
        gpu.look_up(hidden, table, spaces.ids.slice(count), factor)?;
        let by_token = self.look_up_by_token(spaces, hidden)?;
        let mut pass = Pass {
            gpu,
            spaces,
            rows,
            caches: &self.caches,
            rotary_tables: &self.rotary_tables,
            dtype: self.dtype,
            by_token,
            padded_by_turns: self.padded_by_turns,
        };
        let mut rows = hidden.into();
        for block in &self.blocks {
            rows = block.forward(&mut pass, rows)?;
        }
        Ok(())
    }

    /// The rows of all blocks, `[rows, blocks * width]`, from the embeddings.
    fn look_up_by_token<'a>(
        &self,
        spaces: &'a Spaces,
        hidden: DeviceMatrix<'_>,
    ) -> Result<Option<DeviceMatrix<'a>>, CudaError> {
        let Some(inputs) = &self.by_token else {
            return Ok(None);
        };
        let gpu = &self.gpu;
        let [rows, projected] = (spaces.by_token.each_ref())
            .map(|buffer| self.matrix(buffer, hidden.rows(), inputs.columns));
        gpu.project(projected, hidden, inputs.projection.matrix())?;
        gpu.scale(projected, inputs.spec.projection_factor)?;
        gpu.norm(projected, projected, &inputs.norm)?;
        let (table, factor) = (inputs.table.matrix(), inputs.spec.row_factor);
        gpu.look_up(rows, table, spaces.ids.slice(hidden.rows()), factor)?;
        gpu.add(rows, projected)?;
        gpu.scale(rows, inputs.spec.factor)?;
        Ok(Some(rows))
    }

    /// f32 logits of the rows of `hidden`.
    fn logits(
        &self,
        out: &Buffer,
        spaces: &Spaces,
        hidden: DeviceMatrix<'_>,
    ) -> Result<(), CudaError> {
        let out = out.matrix([hidden.rows(), self.spec.vocab_size], Dtype::F32);
        let normed = self.matrix(&spaces.input, hidden.rows(), hidden.columns());
        let order = RowOrder::natural(hidden.columns());
        (self.gpu).norm_rows(normed, order, hidden, &self.final_norm)?;
        let head = self.own_head.as_ref().unwrap_or(&self.embedding);
        self.gpu.project(out, normed, head.matrix())?;
        match self.spec.head.soft_cap {
            None => Ok(()),
            Some(cap) => self.gpu.soft_cap(out, cap),
        }
    }

    fn run_step(&self, newest: &mut Newest, tokens: &[u32]) -> Result<(), ModelError> {
        let gpu = &self.gpu;
        let held: Vec<i32> = (self.lengths.held().iter())
            .map(|&held| held as i32)
            .collect();
        gpu.write(newest.held.slice(held.len()), &held)?;
        gpu.write(newest.spaces.ids.slice(tokens.len()), tokens)?;
        if newest.ran && newest.recorded.is_none() {
            let queue = || self.queue_step(newest).map_err(into_cuda);
            newest.recorded = Some(gpu.record(queue)?);
        }
        match &newest.recorded {
            Some(recorded) => recorded.run()?,
            None => self.queue_step(newest)?,
        }
        newest.ran = true;
        let logits = newest.logits.slice(newest.logits.bytes());
        Ok(gpu.to_pinned(&mut newest.home, logits)?)
    }

    fn queue_step(&self, newest: &Newest) -> Result<(), ModelError> {
        let batch = newest.spaces.rows;
        let held = TextRows::Newest(newest.held.slice(batch));
        self.pass(&newest.spaces, batch, held)?;
        let hidden = self.matrix(&newest.spaces.hidden, batch, self.spec.hidden_size);
        Ok(self.logits(&newest.logits, &newest.spaces, hidden)?)
    }
}

/// Attention branches of all blocks.
fn attentions(blocks: &[Block<OnGpu>]) -> impl Iterator<Item = &Branch<OnGpu>> {
    let branches = blocks.iter().flat_map(Block::branches);
    branches.filter(|branch| matches!(branch.mix, Mix::Attention(_)))
}

/// A pass on a GPU fails there alone.
fn into_cuda(error: ModelError) -> CudaError {
    match error {
        ModelError::Cuda(error) => error,
        other => CudaError::Invalid(other.to_string()),
    }
}

impl Runner for GpuRunner {
    fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    fn reset(&mut self, batch: usize, capacity: usize) -> Result<(), RunError> {
        // A lack of device memory is reported by its allocator.
        memory::check(&self.spec, batch, capacity, 2, usize::MAX)?;
        self.lengths = Lengths::new(batch, capacity);
        // The old ones go first: they may be most of what is held.
        (self.newest, self.prompt) = (None, None);
        self.caches.clear();
        for block in &self.spec.blocks {
            let own = |keys: KeySource| !matches!(keys, KeySource::Block(_));
            let attention = block.attention().find(|attention| own(attention.keys));
            let cache = attention.map(|attention| {
                DeviceKeyValues::new(&self.gpu, batch, capacity, attention.shape, self.dtype)
            });
            self.caches.push(cache.transpose()?);
        }
        self.rotary_tables = (self.spec.rotaries.iter())
            .map(|table| RotaryTables::new(&self.gpu, table, capacity))
            .collect::<Result<_, _>>()?;
        let logits = batch * self.spec.vocab_size * 4;
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
        let first = self.lengths.append(&self.spec, sequence, tokens)?;
        let rows = tokens.len().min(PROMPT_TOKENS);
        if self.prompt.as_ref().is_none_or(|spaces| spaces.rows < rows) {
            self.prompt = None;
            self.prompt = Some(self.spaces(rows)?);
        }
        let spaces = self.prompt.as_ref().expect("made above");
        for (piece, tokens) in tokens.chunks(PROMPT_TOKENS).enumerate() {
            self.gpu.write(spaces.ids.slice(tokens.len()), tokens)?;
            let first = first + piece * PROMPT_TOKENS;
            let rows = TextRows::Prompt { sequence, first };
            self.pass(spaces, tokens.len(), rows)?;
        }
        let (vocab, width) = (self.spec.vocab_size, self.spec.hidden_size);
        let last = (tokens.len() - 1) % PROMPT_TOKENS;
        let hidden = self.matrix(&spaces.hidden, spaces.rows, width);
        let hidden = hidden.row_range(last..last + 1);
        let logits = Buffer::new(&self.gpu, vocab * 4)?;
        self.logits(&logits, spaces, hidden)?;
        Ok(logits.to_host(vocab)?)
    }

    fn step(&mut self, tokens: &[u32]) -> Result<&[f32], RunError> {
        self.lengths.append_each(&self.spec, tokens)?;
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
