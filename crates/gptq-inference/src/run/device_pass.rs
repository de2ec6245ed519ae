//! A block's operations on rows of text on a GPU: what makes a row writes it in the order of the linear
//! that reads it.

use std::sync::Arc;

use gptq_kernels::Activation;
use gptq_kernels::cuda::{
    Buffer, CudaError, DeviceKeyValues, DeviceMatrix, DeviceNorm, Gpu, HeadNorms, RotaryTable,
    TextRows,
};
use gptq_model::ModelError;
use gptq_model::forward::{Attention, BlockOps, Weights};
use gptq_model::spec::{KeySource, RotarySpec};

use gptq_types::Dtype;

use super::cuda::Spaces;
use super::projection::Projection;

/// Weights on a GPU, packed or not.
pub(super) struct OnGpu;

impl Weights for OnGpu {
    type Linears = Projection;
    type Norm = DeviceNorm;
}

/// Cosines and sines of one rotary table.
pub(super) struct RotaryTables {
    queries: Option<RotaryTable>, // where they differ
    keys: RotaryTable,
}

impl RotaryTables {
    /// Tables for positions `0..capacity`.
    pub fn new(gpu: &Arc<Gpu>, table: &RotarySpec, capacity: usize) -> Result<Self, CudaError> {
        let queries = table.queries(0..capacity, capacity);
        Ok(RotaryTables {
            queries: queries
                .map(|table| RotaryTable::new(gpu, &table))
                .transpose()?,
            keys: RotaryTable::new(gpu, &table.keys(0..capacity, capacity))?,
        })
    }

    fn both(&self) -> [&RotaryTable; 2] {
        [self.queries.as_ref().unwrap_or(&self.keys), &self.keys]
    }
}

/// A pass of some rows.
pub(super) struct Pass<'a> {
    pub gpu: &'a Arc<Gpu>,
    pub spaces: &'a Spaces,
    pub rows: TextRows<'a>,
    pub caches: &'a [Option<DeviceKeyValues>],
    pub rotary_tables: &'a [RotaryTables],
    pub dtype: Dtype,
    /// Per-layer embeddings, looked up by token id for all blocks, `[rows, blocks * width]`.
    pub by_token: Option<DeviceMatrix<'a>>,
    pub padded_by_turns: bool,
}

/// Rows on the GPU.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    at: DeviceMatrix<'a>,
    /// They are in the order of channels, not in that of the linear that reads them.
    natural: bool,
}

impl<'a> From<DeviceMatrix<'a>> for Rows<'a> {
    fn from(at: DeviceMatrix<'a>) -> Self {
        Rows { at, natural: true }
    }
}

impl<'a> Pass<'a> {
    /// Rows of `reader` in the place of inputs.
    fn input_of(&self, reader: &Projection, rows: usize) -> Rows<'a> {
        Rows {
            at: self.matrix(&self.spaces.input, rows, reader.order().width()),
            natural: false,
        }
    }

    fn matrix(&self, buffer: &'a Buffer, rows: usize, columns: usize) -> DeviceMatrix<'a> {
        buffer.matrix([rows, columns], self.dtype)
    }

    fn multiply(
        &self,
        linears: &Projection,
        out: DeviceMatrix<'_>,
        x: Rows<'_>,
        add: bool,
    ) -> Result<(), CudaError> {
        match x.natural {
            true => linears.multiply_natural(self.gpu, out, x.at, add),
            false => linears.multiply(self.gpu, out, x.at, add),
        }
    }

    /// The operands of a mixer, in the place of outputs.
    fn project<const N: usize>(
        &self,
        input: &Projection,
        x: Rows<'_>,
    ) -> Result<[DeviceMatrix<'a>; N], CudaError> {
        let out = self.matrix(&self.spaces.output, x.at.rows(), input.outputs_width());
        self.multiply(input, out, x, false)?;
        Ok(input.operands(out))
    }

    /// Norms over whole projections, in place; heads are normed where they are placed.
    fn norm_whole(
        &self,
        x: DeviceMatrix<'_>,
        norm: Option<&DeviceNorm>,
        head_dim: usize,
    ) -> Result<(), CudaError> {
        match norm.filter(|norm| norm.width() != head_dim) {
            None => Ok(()),
            Some(norm) => self.gpu.norm_outputs(x, norm),
        }
    }

    /// Places queries in their buffer, and keys and values in the cache; returns both.
    fn place(
        &self,
        x: Rows<'_>,
        input: &Projection,
        attention: &Attention<OnGpu>,
    ) -> Result<(&'a DeviceKeyValues, DeviceMatrix<'a>), CudaError> {
        let shape = attention.spec.shape;
        let d = shape.head_dim;
        let [of_q, of_k, of_v] = attention.norms.each_ref().map(Option::as_ref);
        let (block, q, kv) = match attention.spec.keys {
            KeySource::Block(block) => {
                let [q] = self.project(input, x)?;
                (block, q, None)
            }
            KeySource::Own | KeySource::Donor => {
                let [q, k, v] = self.project(input, x)?;
                self.norm_whole(k, of_k, d)?;
                (attention.block, q, Some([k, v]))
            }
        };
        self.norm_whole(q, of_q, d)?;
        let of_heads = |norm: Option<&'_ DeviceNorm>| norm.is_some_and(|norm| norm.width() == d);
        let norms = HeadNorms {
            query: of_q.filter(|norm| of_heads(Some(norm))),
            key: of_k.filter(|norm| of_heads(Some(norm))),
            value: of_v,
            after_rotation: attention.spec.norms.after_rotation,
        };
        let rotary_tables = attention
            .spec
            .rotary
            .map(|rotary| self.rotary_tables[rotary].both());
        let cache = self.caches[block]
            .as_ref()
            .expect("a block with keys of its own");
        let queries = self.matrix(&self.spaces.queries, x.at.rows(), shape.heads * d);
        cache.store(queries, q, kv, self.rows, &norms, rotary_tables)?;
        Ok((cache, queries))
    }
}

impl<'a> BlockOps<OnGpu> for Pass<'a> {
    type Rows = Rows<'a>;

    fn input(
        &mut self,
        hidden: &Rows<'a>,
        norm: Option<&DeviceNorm>,
        reader: &Projection,
    ) -> Result<Rows<'a>, ModelError> {
        let (order, to) = (reader.order(), self.input_of(reader, hidden.at.rows()));
        match norm {
            Some(norm) => self.gpu.norm_rows(to.at, order, hidden.at, norm)?,
            None => self.gpu.gather_rows(to.at, order, hidden.at)?,
        }
        Ok(to)
    }

    fn attend(
        &mut self,
        x: Rows<'a>,
        input: &Projection,
        attention: &Attention<OnGpu>,
        reader: &Projection,
    ) -> Result<Rows<'a>, ModelError> {
        let (cache, queries) = self.place(x, input, attention)?;
        let shape = attention.spec.shape;
        let attended = |columns| self.matrix(&self.spaces.attended, queries.rows(), columns);
        Ok(match self.rows {
            TextRows::Newest(held) => {
                let order = reader.order();
                if self.padded_by_turns && order.width() > queries.columns() {
                    self.spaces.attended.clear()?;
                }
                let at = attended(order.width());
                cache.attend_newest(at, order, queries, held, shape)?;
                Rows { at, natural: false }
            }
            TextRows::Prompt { sequence, first } => {
                let at = attended(queries.columns());
                cache.attend_prompt(at, queries, sequence, first, shape)?;
                Rows::from(at)
            }
        })
    }

    fn gate(
        &mut self,
        x: Rows<'a>,
        input: &Projection,
        activation: Activation,
        reader: &Projection,
    ) -> Result<Rows<'a>, ModelError> {
        let [gate, up] = self.project(input, x)?;
        let (order, to) = (reader.order(), self.input_of(reader, x.at.rows()));
        (self.gpu).gate_rows(to.at, order, [gate, up], activation)?;
        Ok(to)
    }

    fn activate(
        &mut self,
        x: Rows<'a>,
        input: &Projection,
        activation: Activation,
        reader: &Projection,
    ) -> Result<Rows<'a>, ModelError> {
        let [from] = self.project(input, x)?;
        let (order, to) = (reader.order(), self.input_of(reader, x.at.rows()));
        (self.gpu).activate_rows(to.at, order, from, activation)?;
        Ok(to)
    }

    fn gate_by_token(
        &mut self,
        x: Rows<'a>,
        input: &Projection,
        activation: Activation,
        block: usize,
        reader: &Projection,
    ) -> Result<Rows<'a>, ModelError> {
        let [gate] = self.project(input, x)?;
        let all = self.by_token.expect("the pass looked them up");
        let width = reader.features();
        let row = all.column_range(block * width..(block + 1) * width);
        let (order, to) = (reader.order(), self.input_of(reader, x.at.rows()));
        (self.gpu).gate_rows(to.at, order, [gate, row], activation)?;
        Ok(to)
    }

    fn add(
        &mut self,
        hidden: Rows<'a>,
        inner: Rows<'a>,
        output: &Projection,
        after: Option<&DeviceNorm>,
        factor: f32,
    ) -> Result<Rows<'a>, ModelError> {
        if after.is_none() && factor == 1.0 {
            self.multiply(output, hidden.at, inner, true)?;
            return Ok(hidden);
        }
        let (rows, columns) = (hidden.at.rows(), hidden.at.columns());
        let added = self.matrix(&self.spaces.output, rows, columns);
        self.multiply(output, added, inner, false)?;
        match after {
            Some(norm) => self.gpu.add_normed(hidden.at, added, norm, factor)?,
            None => self.gpu.add_scaled(hidden.at, added, factor)?,
        }
        Ok(hidden)
    }

    fn scale(&mut self, hidden: Rows<'a>, factor: f32) -> Result<Rows<'a>, ModelError> {
        self.gpu.scale(hidden.at, factor)?;
        Ok(hidden)
    }
}
