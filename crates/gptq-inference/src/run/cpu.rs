//! All blocks resident in host memory, in the types of their file.

use gptq_kernels::{
    Activation, FloatMatrix, KeyValueCache, Matrix, Rotation, activate, add_scaled, gated,
    layer_norm, multiply_each, rms_norm, scale, soft_cap,
};
use gptq_model::forward::{Attention, Block, BlockLoader, BlockOps, Weights};
use gptq_model::spec::{KeySource, NormKind, NormSpec, PerBlockInputSpec, Piece};
use gptq_model::{LinearSpec, ModelError, ModelSpec, norm_values};
use gptq_types::SourceError;

use super::{Lengths, RunError, Runner, memory};
use crate::{OpenedModel, StoredLinear, StoredMatrix, StoredWeight};

/// Prefill chunk in tokens: large enough for the dense product's full rate, small enough that activations
/// stay small compared with the weights.
const PROMPT_TOKENS: usize = 512;

/// See the module.
pub(super) struct CpuRunner {
    spec: ModelSpec,
    embedding: FloatMatrix, // [vocab_size, hidden_size]
    by_token: Option<ByToken>,
    own_head: Option<Matrix>, // absent where the embedding is the head
    final_norm: Norm,         // a factor of logits is part of it
    blocks: Vec<Block<Resident>>,
    caches: Vec<Option<KeyValueCache>>, // of each block that has its own
    rotations: Vec<(Option<Rotation>, Rotation)>, // of queries, where theirs differ, and keys
    lengths: Lengths,
    logits: Vec<f32>, // [batch, vocab_size] of the last step
    peak: u64,
}

/// Weights in host memory, not widened.
struct Resident;

impl Weights for Resident {
    type Linears = Linears;
    type Norm = Norm;
}

/// Linears that read the same rows.
struct Linears {
    weights: Vec<Matrix>,
    biases: Vec<Option<Vec<f32>>>,
    widths: Vec<usize>,
    operands: Vec<Piece>,
}

struct Norm {
    kind: NormKind,
    weight: Vec<f32>,
    bias: Option<Vec<f32>>,
    eps: f32,
}

impl Norm {
    fn apply(&self, x: &[f32]) -> Vec<f32> {
        match self.kind {
            NormKind::Rms => rms_norm(x, &self.weight, self.eps),
            NormKind::Layer => layer_norm(x, &self.weight, self.bias.as_deref(), self.eps),
        }
    }

    fn optional(norm: Option<&Norm>, x: Vec<f32>) -> Vec<f32> {
        match norm {
            Some(norm) => norm.apply(&x),
            None => x,
        }
    }
}

impl Linears {
    /// All products with `x [rows, K]`, in one parallel region.
    fn multiply(&self, x: &[f32], rows: usize) -> Vec<Vec<f32>> {
        let weights: Vec<&Matrix> = self.weights.iter().collect();
        let mut outputs = multiply_each(&weights, x, rows);
        for (output, bias) in outputs.iter_mut().zip(&self.biases) {
            if let Some(bias) = bias {
                for row in output.chunks_exact_mut(bias.len()) {
                    row.iter_mut().zip(bias).for_each(|(x, y)| *x += y);
                }
            }
        }
        outputs
    }

    /// The operands of a mixer.
    fn project(&self, x: &[f32], rows: usize) -> Vec<Vec<f32>> {
        let outputs = self.multiply(x, rows);
        let whole = |piece: &Piece| piece.columns == (0..self.widths[piece.linear]);
        let all = self.operands.iter().enumerate();
        if all
            .clone()
            .all(|(at, piece)| piece.linear == at && whole(piece))
        {
            return outputs;
        }
        let copied = |(_, piece): (usize, &Piece)| {
            let rows = outputs[piece.linear].chunks_exact(self.widths[piece.linear]);
            rows.flat_map(|row| &row[piece.columns.clone()])
                .copied()
                .collect()
        };
        all.map(copied).collect()
    }

    fn project_one(&self, x: &[f32], rows: usize) -> Vec<f32> {
        self.multiply(x, rows).swap_remove(0)
    }

    fn bytes(&self) -> usize {
        self.weights.iter().map(Matrix::bytes).sum()
    }
}

/// Reads a model's blocks.
struct Loader<'a>(&'a OpenedModel);

impl BlockLoader<Resident> for Loader<'_> {
    fn linears(
        &mut self,
        linears: &[LinearSpec],
        operands: &[Piece],
    ) -> Result<Linears, ModelError> {
        let (mut weights, mut biases) = (Vec::new(), Vec::new());
        for linear in linears {
            let [k, n] = linear.shape();
            let StoredLinear { weight, bias } = self.0.linear(linear)?;
            weights.push(match weight {
                StoredWeight::Packed(solved) => Matrix::packed(&solved),
                StoredWeight::Float(stored) => Matrix::Float(float(&stored, &linear.name.0, n, k)?),
            });
            biases.push(bias);
        }
        Ok(Linears {
            weights,
            biases,
            widths: linears.iter().map(|linear| linear.out_features).collect(),
            operands: operands.to_vec(),
        })
    }

    fn norm(&mut self, norm: &NormSpec) -> Result<Norm, ModelError> {
        Ok(self.read_norm(norm)?)
    }

    fn factor(&mut self, name: &str) -> Result<f32, ModelError> {
        Ok(self.0.vector(name)?[0])
    }
}

impl Loader<'_> {
    fn read_norm(&self, norm: &NormSpec) -> Result<Norm, SourceError> {
        let (weight, bias) = norm_values(norm, |name| self.0.vector(name))?;
        Ok(Norm {
            kind: norm.kind,
            weight,
            bias,
            eps: norm.eps as f32,
        })
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

/// Inputs of every block by token id.
struct ByToken {
    spec: PerBlockInputSpec,
    table: FloatMatrix, // [vocab, blocks * width]
    projection: Matrix, // [blocks * width, hidden_size]
    norm: Norm,
}

impl ByToken {
    fn open(model: &OpenedModel, spec: &PerBlockInputSpec) -> Result<Self, SourceError> {
        let (hidden, columns) = (model.spec.hidden_size, model.spec.blocks.len() * spec.width);
        let table = model.matrix(&spec.table)?;
        let projection = model.matrix(&spec.projection)?;
        Ok(ByToken {
            table: float(&table, &spec.table, spec.vocab, columns)?,
            projection: Matrix::Float(float(&projection, &spec.projection, columns, hidden)?),
            norm: Loader(model).read_norm(&spec.norm)?,
            spec: spec.clone(),
        })
    }

    /// `[tokens, blocks * width]`, from the tokens' embeddings.
    fn rows(&self, tokens: &[u32], embedded: &[f32]) -> Vec<f32> {
        let mut projected = self.projection.multiply(embedded, tokens.len());
        scale(&mut projected, self.spec.projection_factor);
        let mut rows = Vec::new();
        for &token in tokens {
            self.table.copy_row(token as usize, &mut rows);
        }
        scale(&mut rows, self.spec.row_factor);
        add_scaled(&mut rows, &self.norm.apply(&projected), 1.0);
        scale(&mut rows, self.spec.factor);
        rows
    }

    fn bytes(&self) -> usize {
        self.table.bytes() + self.projection.bytes()
    }
}

/// Positions of the rows of a pass.
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

/// A pass of some rows.
struct Pass<'a> {
    rows: &'a Rows,
    count: usize,
    caches: &'a mut [Option<KeyValueCache>],
    rotations: &'a [(Option<Rotation>, Rotation)],
    by_token: &'a [f32], // [rows, blocks * width]
}

impl Pass<'_> {
    /// Applies the norm and RoPE to queries or keys, in the order of the model.
    fn with_rope(&self, x: Vec<f32>, attention: &Attention<Resident>, of_keys: bool) -> Vec<f32> {
        let norm = attention.norms[usize::from(of_keys)].as_ref();
        let after = attention.spec.norms.after_rotation;
        let mut x = Norm::optional(norm.filter(|_| !after), x);
        if let Some(rotary) = attention.spec.rotary {
            let (queries, keys) = &self.rotations[rotary];
            let rotation = queries.as_ref().filter(|_| !of_keys).unwrap_or(keys);
            let width = x.len() / self.count;
            rotation.apply_at(&mut x, width, |row| self.rows.position(row));
        }
        Norm::optional(norm.filter(|_| after), x)
    }

    fn store(&mut self, block: usize, k: &[f32], v: &[f32]) {
        let cache = self.caches[block]
            .as_mut()
            .expect("a block with keys of its own");
        match self.rows {
            Rows::Prompt { sequence, first } => cache.store(*sequence, *first, k, v),
            Rows::Newest { held } => {
                let width = k.len() / held.len();
                let tokens = k.chunks_exact(width).zip(v.chunks_exact(width));
                for (sequence, (k, v)) in tokens.enumerate() {
                    cache.store(sequence, held[sequence] - 1, k, v);
                }
            }
        }
    }
}

impl BlockOps<Resident> for Pass<'_> {
    type Rows = Vec<f32>;

    fn input(
        &mut self,
        hidden: &Vec<f32>,
        norm: Option<&Norm>,
        _: &Linears,
    ) -> Result<Vec<f32>, ModelError> {
        Ok(match norm {
            Some(norm) => norm.apply(hidden),
            None => hidden.clone(),
        })
    }

    fn attend(
        &mut self,
        x: Vec<f32>,
        input: &Linears,
        attention: &Attention<Resident>,
        _: &Linears,
    ) -> Result<Vec<f32>, ModelError> {
        let mut operands = input.project(&x, self.count).into_iter();
        let mut next = || operands.next().expect("the spec names the operands");
        let q = self.with_rope(next(), attention, false);
        let block = match attention.spec.keys {
            KeySource::Block(block) => block,
            KeySource::Own | KeySource::Donor => {
                let k = self.with_rope(next(), attention, true);
                let v = Norm::optional(attention.norms[2].as_ref(), next());
                self.store(attention.block, &k, &v);
                attention.block
            }
        };
        let cache = self.caches[block]
            .as_ref()
            .expect("a block with keys of its own");
        Ok(match self.rows {
            Rows::Prompt { sequence, first } => cache.attend_prompt(*sequence, *first, &q),
            Rows::Newest { held } => cache.attend_newest(&q, held),
        })
    }

    fn gate(
        &mut self,
        x: Vec<f32>,
        input: &Linears,
        activation: Activation,
        _: &Linears,
    ) -> Result<Vec<f32>, ModelError> {
        let mut operands = input.project(&x, self.count).into_iter();
        let mut next = || operands.next().expect("the spec names gate and up");
        let (mut gate, up) = (next(), next());
        gated(&mut gate, &up, activation);
        Ok(gate)
    }

    fn activate(
        &mut self,
        x: Vec<f32>,
        input: &Linears,
        activation: Activation,
        _: &Linears,
    ) -> Result<Vec<f32>, ModelError> {
        let mut x = input.project_one(&x, self.count);
        activate(&mut x, activation);
        Ok(x)
    }

    fn gate_by_token(
        &mut self,
        x: Vec<f32>,
        input: &Linears,
        activation: Activation,
        block: usize,
        _: &Linears,
    ) -> Result<Vec<f32>, ModelError> {
        let mut gate = input.project_one(&x, self.count);
        let (width, all) = (gate.len() / self.count, self.by_token.len() / self.count);
        let rows = self.by_token.chunks_exact(all);
        let own = rows.flat_map(|row| &row[block * width..][..width]).copied();
        gated(&mut gate, &own.collect::<Vec<f32>>(), activation);
        Ok(gate)
    }

    fn add(
        &mut self,
        mut hidden: Vec<f32>,
        inner: Vec<f32>,
        output: &Linears,
        after: Option<&Norm>,
        factor: f32,
    ) -> Result<Vec<f32>, ModelError> {
        let added = Norm::optional(after, output.project_one(&inner, self.count));
        add_scaled(&mut hidden, &added, factor);
        Ok(hidden)
    }

    fn scale(&mut self, mut hidden: Vec<f32>, factor: f32) -> Result<Vec<f32>, ModelError> {
        scale(&mut hidden, factor);
        Ok(hidden)
    }
}

impl CpuRunner {
    /// Reads all weights.
    pub fn open(model: &OpenedModel) -> Result<Self, RunError> {
        let spec = model.spec.clone();
        let (vocab, hidden) = (spec.vocab_size, spec.hidden_size);
        let embedding = float(&model.embedding()?, &spec.embedding.name, vocab, hidden)?;
        let own_head = match model.own_head()? {
            Some(stored) => Some(Matrix::Float(float(
                &stored,
                &spec.head.name,
                vocab,
                hidden,
            )?)),
            None => None,
        };
        let by_token = spec.embedding.per_block.as_ref();
        let by_token = by_token
            .map(|inputs| ByToken::open(model, inputs))
            .transpose()?;
        let mut loader = Loader(model);
        let mut final_norm = loader.read_norm(&spec.final_norm)?;
        scale(&mut final_norm.weight, spec.head.factor);
        if let Some(bias) = &mut final_norm.bias {
            scale(bias, spec.head.factor);
        }
        let blocks = (spec.blocks.iter().enumerate())
            .map(|(index, block)| Block::load(block, index, &mut loader))
            .collect::<Result<_, _>>()?;
        Ok(CpuRunner {
            embedding,
            by_token,
            own_head,
            final_norm,
            blocks,
            caches: Vec::new(),
            rotations: Vec::new(),
            lengths: Lengths::default(),
            logits: Vec::new(),
            peak: 0,
            spec,
        })
    }

    fn weight_bytes(&self) -> usize {
        let head = self.own_head.as_ref().map_or(0, Matrix::bytes);
        let branches = self.blocks.iter().flat_map(Block::branches);
        let blocks: usize = branches
            .map(|branch| branch.input.bytes() + branch.output.bytes())
            .sum();
        let by_token = self.by_token.as_ref().map_or(0, ByToken::bytes);
        self.embedding.bytes() + head + by_token + blocks
    }

    /// The widest moment of a pass of `rows`: the outputs of linears that share an input, once more before
    /// they are transposed to row-major, and the hidden states with their norm.
    fn note_peak(&mut self, rows: usize) {
        let widest = memory::widest_outputs(&self.spec);
        let workspace = rows * (2 * widest + 3 * self.spec.hidden_size) * 4;
        let caches = self.caches.iter().flatten();
        let caches: usize = caches.map(KeyValueCache::bytes).sum();
        let logits = self.logits.len() * 4;
        let held = (self.weight_bytes() + caches + workspace + logits) as u64;
        self.peak = self.peak.max(held);
    }

    /// Final hidden states `[rows, hidden_size]`, not normed.
    fn pass(&mut self, tokens: &[u32], rows: &Rows) -> Result<Vec<f32>, ModelError> {
        self.note_peak(tokens.len());
        let mut hidden = Vec::with_capacity(tokens.len() * self.spec.hidden_size);
        for &token in tokens {
            self.embedding.copy_row(token as usize, &mut hidden);
        }
        if self.spec.embedding.factor != 1.0 {
            scale(&mut hidden, self.spec.embedding.factor);
        }
        let by_token = self.by_token.as_ref();
        let by_token = by_token.map_or(Vec::new(), |inputs| inputs.rows(tokens, &hidden));
        let mut pass = Pass {
            rows,
            count: tokens.len(),
            caches: &mut self.caches,
            rotations: &self.rotations,
            by_token: &by_token,
        };
        for block in &self.blocks {
            hidden = block.forward(&mut pass, hidden)?;
        }
        Ok(hidden)
    }

    /// `[rows, vocab_size]`.
    fn logits(&self, hidden: &[f32]) -> Vec<f32> {
        let normed = self.final_norm.apply(hidden);
        let rows = hidden.len() / self.spec.hidden_size;
        let mut logits = match &self.own_head {
            Some(head) => head.multiply(&normed, rows),
            None => self.embedding.multiply(&normed, rows),
        };
        if let Some(cap) = self.spec.head.soft_cap {
            soft_cap(&mut logits, cap);
        }
        logits
    }
}

impl Runner for CpuRunner {
    fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    fn reset(&mut self, batch: usize, capacity: usize) -> Result<(), RunError> {
        // The old ones go first: they may be most of what is held.
        self.caches.clear();
        memory::check(&self.spec, batch, capacity, 4, memory::free_on_host())?;
        self.lengths = Lengths::new(batch, capacity);
        self.caches = (self.spec.blocks.iter())
            .map(|block| {
                let own = |keys: KeySource| !matches!(keys, KeySource::Block(_));
                let attention = block.attention().find(|attention| own(attention.keys))?;
                Some(KeyValueCache::new(batch, capacity, attention.shape))
            })
            .collect();
        self.rotations = (self.spec.rotaries.iter())
            .map(|table| {
                let queries = table.queries(0..capacity, capacity);
                (queries, table.keys(0..capacity, capacity))
            })
            .collect();
        self.note_peak(0);
        Ok(())
    }

    fn prefill(&mut self, sequence: usize, tokens: &[u32]) -> Result<Vec<f32>, RunError> {
        let first = self.lengths.append(&self.spec, sequence, tokens)?;
        // On a thread of the pool from the start, so that no region has to wake it.
        rayon::scope(|_| {
            let mut hidden = Vec::new();
            for (piece, tokens) in tokens.chunks(PROMPT_TOKENS).enumerate() {
                let first = first + piece * PROMPT_TOKENS;
                hidden = self.pass(tokens, &Rows::Prompt { sequence, first })?;
            }
            let last = hidden.len() - self.spec.hidden_size;
            Ok(self.logits(&hidden[last..]))
        })
    }

    fn step(&mut self, tokens: &[u32]) -> Result<&[f32], RunError> {
        self.lengths.append_each(&self.spec, tokens)?;
        let held = self.lengths.held().to_vec();
        rayon::scope(|_| {
            let hidden = self.pass(tokens, &Rows::Newest { held })?;
            self.logits = self.logits(&hidden);
            Ok::<(), RunError>(())
        })?;
        Ok(&self.logits)
    }

    fn peak_memory(&self) -> u64 {
        self.peak
    }
}
