//! A block's operations on rows of text on a GPU: what makes a row writes it in the order of the linear
//! that reads it.

use std::sync::Arc;

use gptq_kernels::Activation;
use gptq_kernels::cuda::{
    CudaError, DeviceKeyValues, DeviceNorm, Gpu, HeadNorms, Output, TextRows, Turn,
};
use gptq_model::ModelError;
use gptq_model::forward::{Attention, BlockOps, Weights};
use gptq_model::spec::{KeySource, RotarySpec};
use gptq_types::DeviceMatrix;

use super::cuda::Spaces;
use super::projection::Projection;

/// Weights on a GPU, packed or not.
pub(super) struct OnGpu;

impl Weights for OnGpu {
    type Linears = Projection;
    type Norm = DeviceNorm;
}

/// Cosines and sines of one rotary table.
pub(super) struct Turns {
    queries: Option<Turn>, // where they differ
    keys: Turn,
}

impl Turns {
    /// Those of positions `0..capacity`.
    pub fn new(gpu: &Arc<Gpu>, table: &RotarySpec, capacity: usize) -> Result<Self, CudaError> {
        let queries = table.queries(0..capacity, capacity);
        Ok(Turns {
            queries: queries.map(|table| Turn::new(gpu, &table)).transpose()?,
            keys: Turn::new(gpu, &table.keys(0..capacity, capacity))?,
        })
    }

    fn both(&self) -> [&Turn; 2] {
        [self.queries.as_ref().unwrap_or(&self.keys), &self.keys]
    }
}

/// A pass of some rows.
pub(super) struct Pass<'a> {
    pub gpu: &'a Arc<Gpu>,
    pub spaces: &'a Spaces,
    pub rows: TextRows<'a>,
    pub caches: &'a [Option<DeviceKeyValues>],
    pub turns: &'a [Turns],
    /// What all blocks looked up by token id, `[rows, blocks * width]`.
    pub by_token: Option<DeviceMatrix>,
    pub padded_by_turns: bool,
}

/// Rows on the GPU.
#[derive(Clone, Copy)]
pub(super) struct Rows {
    at: DeviceMatrix,
    /// They are in the order of channels, not in that of the linear that reads them.
    natural: bool,
}

impl From<DeviceMatrix> for Rows {
    fn from(at: DeviceMatrix) -> Self {
        Rows { at, natural: true }
    }
}

impl Pass<'_> {
    /// Rows of `reader` in the place of inputs.
    fn input_of(&self, reader: &Projection, like: DeviceMatrix) -> Rows {
        Rows {
            at: DeviceMatrix {
                address: self.spaces.input.address(),
                columns: reader.order().width,
                ..like
            },
            natural: false,
        }
    }

    fn multiply(
        &self,
        linears: &Projection,
        out: u64,
        x: Rows,
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
        x: Rows,
    ) -> Result<[Output; N], CudaError> {
        let out = self.spaces.output.address();
        self.multiply(input, out, x, false)?;
        Ok(input.operands(out, x.at.rows))
    }

    /// Norms over whole projections, in place; heads are normed where they are placed.
    fn norm_whole(
        &self,
        x: Output,
        columns: usize,
        norm: Option<&DeviceNorm>,
        head_dim: usize,
        like: DeviceMatrix,
    ) -> Result<(), CudaError> {
        match norm.filter(|norm| norm.width() != head_dim) {
            None => Ok(()),
            Some(norm) => {
                let runs = columns / norm.width();
                self.gpu.norm_outputs(x, like.rows, runs, norm, like.dtype)
            }
        }
    }

    /// Places queries in their buffer, and keys and values in the cache that is returned.
    fn place(
        &self,
        x: Rows,
        input: &Projection,
        attention: &Attention<OnGpu>,
    ) -> Result<&DeviceKeyValues, CudaError> {
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
                self.norm_whole(k, shape.kv_heads * d, of_k, d, x.at)?;
                (attention.block, q, Some([k, v]))
            }
        };
        self.norm_whole(q, shape.heads * d, of_q, d, x.at)?;
        let of_heads = |norm: Option<&'_ DeviceNorm>| norm.is_some_and(|norm| norm.width() == d);
        let norms = HeadNorms {
            query: of_q.filter(|norm| of_heads(Some(norm))),
            key: of_k.filter(|norm| of_heads(Some(norm))),
            value: of_v,
            after_rotation: attention.spec.norms.after_rotation,
        };
        let turns = attention
            .spec
            .rotary
            .map(|rotary| self.turns[rotary].both());
        let cache = self.caches[block]
            .as_ref()
            .expect("a block with keys of its own");
        let queries = self.spaces.queries.address();
        cache.store(queries, q, kv, x.at.rows, self.rows, &norms, turns)?;
        Ok(cache)
    }
}

impl BlockOps<OnGpu> for Pass<'_> {
    type Rows = Rows;

    fn input(
        &mut self,
        hidden: &Rows,
        norm: Option<&DeviceNorm>,
        reader: &Projection,
    ) -> Result<Rows, ModelError> {
        let (order, to) = (reader.order(), self.input_of(reader, hidden.at));
        match norm {
            Some(norm) => self.gpu.norm_rows(to.at.address, order, hidden.at, norm)?,
            None => self.gpu.gather_rows(to.at.address, order, hidden.at)?,
        }
        Ok(to)
    }

    fn attend(
        &mut self,
        x: Rows,
        input: &Projection,
        attention: &Attention<OnGpu>,
        reader: &Projection,
    ) -> Result<Rows, ModelError> {
        let cache = self.place(x, input, attention)?;
        let shape = attention.spec.shape;
        let queries = DeviceMatrix {
            address: self.spaces.queries.address(),
            columns: shape.heads * shape.head_dim,
            ..x.at
        };
        let attended = self.spaces.attended.address();
        Ok(match self.rows {
            TextRows::Newest(held) => {
                let order = reader.order();
                if self.padded_by_turns && order.width > queries.columns {
                    self.spaces.attended.clear()?;
                }
                cache.attend_newest(attended, order, queries.address, held, shape)?;
                Rows {
                    at: DeviceMatrix {
                        address: attended,
                        columns: order.width,
                        ..x.at
                    },
                    natural: false,
                }
            }
            TextRows::Prompt { sequence, first } => {
                cache.attend_prompt(attended, queries, sequence, first, shape)?;
                Rows::from(DeviceMatrix {
                    address: attended,
                    ..queries
                })
            }
        })
    }

    fn gate(
        &mut self,
        x: Rows,
        input: &Projection,
        activation: Activation,
        reader: &Projection,
    ) -> Result<Rows, ModelError> {
        let [gate, up] = self.project(input, x)?;
        let (order, to) = (reader.order(), self.input_of(reader, x.at));
        let size = [x.at.rows, reader.features()];
        (self.gpu).gate_rows(
            to.at.address,
            order,
            [gate, up],
            size,
            x.at.dtype,
            activation,
        )?;
        Ok(to)
    }

    fn activate(
        &mut self,
        x: Rows,
        input: &Projection,
        activation: Activation,
        reader: &Projection,
    ) -> Result<Rows, ModelError> {
        let [from] = self.project(input, x)?;
        let (order, to) = (reader.order(), self.input_of(reader, x.at));
        let size = [x.at.rows, reader.features()];
        (self.gpu).activate_rows(to.at.address, order, from, size, x.at.dtype, activation)?;
        Ok(to)
    }

    fn gate_by_token(
        &mut self,
        x: Rows,
        input: &Projection,
        activation: Activation,
        block: usize,
        reader: &Projection,
    ) -> Result<Rows, ModelError> {
        let [gate] = self.project(input, x)?;
        let all = self.by_token.expect("the pass looked them up");
        let width = reader.features();
        let row = Output {
            address: all.address + 2 * (block * width) as u64,
            pitch: all.columns,
        };
        let (order, to) = (reader.order(), self.input_of(reader, x.at));
        let size = [x.at.rows, width];
        (self.gpu).gate_rows(
            to.at.address,
            order,
            [gate, row],
            size,
            x.at.dtype,
            activation,
        )?;
        Ok(to)
    }

    fn add(
        &mut self,
        hidden: Rows,
        inner: Rows,
        output: &Projection,
        after: Option<&DeviceNorm>,
        factor: f32,
    ) -> Result<Rows, ModelError> {
        if after.is_none() && factor == 1.0 {
            self.multiply(output, hidden.at.address, inner, true)?;
            return Ok(hidden);
        }
        let added = DeviceMatrix {
            address: self.spaces.output.address(),
            ..hidden.at
        };
        self.multiply(output, added.address, inner, false)?;
        match after {
            Some(norm) => self.gpu.add_normed(hidden.at, added, norm, factor)?,
            None => self.gpu.add_scaled(hidden.at, added, factor)?,
        }
        Ok(hidden)
    }

    fn scale(&mut self, hidden: Rows, factor: f32) -> Result<Rows, ModelError> {
        self.gpu.scale(hidden.at, factor)?;
        Ok(hidden)
    }
}
