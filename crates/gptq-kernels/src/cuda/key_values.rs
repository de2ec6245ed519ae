//! Attention of a pass that reads or writes text, over the keys and values of earlier tokens; the
//! kernels are described in `kernels/text.cu`. Addresses are of sixteen-bit row-major matrices.

use std::sync::Arc;

use gptq_types::{DeviceMatrix, Dtype};

use super::Gpu;
use super::decoder::Turn;
use super::error::CudaError;
use super::memory::Buffer;
use super::text::{Output, RowOrder, address, by_eights, program};
use crate::AttentionShape;

/// Keys of a sequence that a block attends to. More of them left a GPU unevenly filled in a decoder's
/// step, although they were faster alone.
const SHARE: usize = 256;
/// The least, where heads share keys: a warp takes sixteen.
const LEAST_SHARE: usize = 64;
/// Of eight lanes, in a block of one head: each leaves sums of its own.
const TEAMS: usize = 16;
/// Heads that share keys in a block, and its warps: each leaves sums for all of them.
const TOGETHER: usize = 8;
const WARPS: usize = 4;

/// The kernels' own struct.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct RawRows {
    held: u64,
    sequence: i32,
    first: i32,
}

/// Which tokens the rows of a pass are.
#[derive(Clone, Copy)]
pub enum TextRows<'a> {
    /// Tokens of one sequence from position `first` on.
    Prompt {
        /// Of the cache.
        sequence: usize,
        /// Tokens before the first row.
        first: usize,
    },
    /// The newest token of each sequence; i32 `[sequences]`, how many tokens it has, that one
    /// included.
    Newest(&'a Buffer),
}

impl TextRows<'_> {
    fn raw(&self) -> RawRows {
        match *self {
            TextRows::Prompt { sequence, first } => RawRows {
                held: 0,
                sequence: sequence as i32,
                first: first as i32,
            },
            TextRows::Newest(held) => RawRows {
                held: held.address(),
                sequence: 0,
                first: 0,
            },
        }
    }
}

/// Keys and values of a block, `[sequences, capacity, kv_heads * head_dim]` each.
pub struct DeviceKeyValues {
    gpu: Arc<Gpu>,
    keys: Buffer,
    values: Buffer,
    sequences: usize,
    capacity: usize,
    shape: AttentionShape,
    dtype: Dtype,
}

/// The kernel for new tokens, and what its blocks are given.
struct Newest {
    name: &'static str,
    /// Blocks side by side for a share of a sequence.
    over: usize,
    /// What the kernel takes behind the heads of keys: how many heads share one of those, or channels.
    last: usize,
    /// Keys.
    share: usize,
    /// Bytes of shared memory.
    shared: usize,
}

impl DeviceKeyValues {
    /// Room for `capacity` tokens of each sequence.
    pub fn new(
        gpu: &Arc<Gpu>,
        sequences: usize,
        capacity: usize,
        shape: AttentionShape,
        dtype: Dtype,
    ) -> Result<Self, CudaError> {
        let bytes = sequences * capacity * shape.kv_heads * shape.head_dim * 2;
        Ok(DeviceKeyValues {
            gpu: gpu.clone(),
            keys: Buffer::new(gpu, bytes)?,
            values: Buffer::new(gpu, bytes)?,
            sequences,
            capacity,
            shape,
            dtype,
        })
    }

    /// Norms heads where `norms` says so, turns queries and keys, stores keys and values, and
    /// leaves the queries in `out [rows, heads * head_dim]`.
    #[allow(clippy::too_many_arguments)]
    pub fn store(
        &self,
        out: u64,
        [q, k, v]: [Output; 3],
        count: usize,
        rows: TextRows,
        norms: Option<&[Buffer; 2]>,
        eps: f32,
        turn: &Turn,
    ) -> Result<(), CudaError> {
        assert_eq!(k.pitch, v.pitch, "rows of keys and of values");
        let AttentionShape {
            heads,
            kv_heads,
            head_dim,
        } = self.shape;
        let (cosine, sine) = turn.addresses();
        let half = head_dim / 2;
        let values = match by_eights(
            &[half, q.pitch, k.pitch],
            &[q.address, k.address, v.address],
        ) {
            true => 8,
            false => 1,
        };
        let lanes = half.div_ceil(values).next_power_of_two().min(32);
        let args = [
            out.into(),
            (&self.keys).into(),
            (&self.values).into(),
            q.address.into(),
            k.address.into(),
            v.address.into(),
            address(norms.map(|[of_q, _]| of_q)),
            address(norms.map(|[_, of_k]| of_k)),
            cosine.into(),
            sine.into(),
            rows.raw().into(),
            (heads as i32).into(),
            (kv_heads as i32).into(),
            (head_dim as i32).into(),
            (lanes as i32).into(),
            (q.pitch as i32).into(),
            (k.pitch as i32).into(),
            (self.capacity as i32).into(),
            eps.into(),
        ];
        let name = if values == 8 {
            "place_heads_8"
        } else {
            "place_heads_1"
        };
        let teams = heads + 2 * kv_heads;
        let grid = [(teams * lanes).div_ceil(256), count, 1];
        // SAFETY: the caller vouches for the rows; the cache has the positions that it counted.
        unsafe { (self.gpu).launch_behind(program(self.dtype), name, grid, [256, 1, 1], 0, &args) }
    }

    /// Attends from the newest token of each sequence; `out` has rows in `order`. `held` as in
    /// [`TextRows::Newest`].
    pub fn attend_newest(
        &self,
        out: u64,
        order: RowOrder,
        q: u64,
        held: &Buffer,
    ) -> Result<(), CudaError> {
        let AttentionShape {
            heads,
            kv_heads,
            head_dim: d,
        } = self.shape;
        let Newest {
            name,
            over,
            last,
            share,
            shared,
        } = self.newest()?;
        let shares = self.capacity.div_ceil(share);
        let parts = (self.gpu).scratch(
            "attention shares",
            self.sequences * heads * shares * (d + 2) * 4,
        )?;
        let args = [
            (&*parts).into(),
            q.into(),
            (&self.keys).into(),
            (&self.values).into(),
            held.into(),
            (self.capacity as i32).into(),
            (kv_heads as i32).into(),
            (last as i32).into(),
            (share as i32).into(),
            (1.0 / (d as f32).sqrt()).into(),
        ];
        let grid = [shares, over, self.sequences];
        let dtype = program(self.dtype);
        // SAFETY: the caches hold what `held` counts; a part for every share.
        unsafe { (self.gpu).launch_behind(dtype, name, grid, [128, 1, 1], shared, &args)? };
        let args = [
            out.into(),
            (&*parts).into(),
            held.into(),
            address(order.places),
            (shares as i32).into(),
            (share as i32).into(),
            (d as i32).into(),
            (order.width as i32).into(),
        ];
        let (grid, block) = ([heads, self.sequences, 1], [d.next_multiple_of(32), 1, 1]);
        // SAFETY: out has a row of the order's width a sequence.
        unsafe { (self.gpu).launch_behind(dtype, "merge_shares", grid, block, 0, &args) }
    }

    fn newest(&self) -> Result<Newest, CudaError> {
        let AttentionShape {
            heads,
            kv_heads,
            head_dim: d,
        } = self.shape;
        let of = heads / kv_heads;
        if of > 1 && matches!(d, 64 | 128) {
            let over = kv_heads * of.div_ceil(TOGETHER);
            return Ok(Newest {
                name: if d == 64 {
                    "attend_heads_64"
                } else {
                    "attend_heads_128"
                },
                over,
                last: of,
                share: self.share(over),
                shared: WARPS * TOGETHER * (d + 2) * 4,
            });
        }
        let name = match d {
            64 => "attend_share_8_1",
            128 => "attend_share_8_2",
            256 => "attend_share_8_4",
            ..=128 => "attend_share_2_8",
            129..=256 => "attend_share_2_16",
            _ => {
                return Err(CudaError::Invalid(format!(
                    "attention heads of {d} are wider than 256"
                )));
            }
        };
        Ok(Newest {
            name,
            over: heads,
            last: d,
            share: SHARE,
            shared: TEAMS * (d + 2) * 4,
        })
    }

    /// Keys that a block attends to where there are `over` of them side by side: as many as leave two
    /// blocks to each multiprocessor.
    fn share(&self, over: usize) -> usize {
        let mut share = SHARE;
        let blocks = |share| self.capacity.div_ceil(share) * over * self.sequences;
        while share > LEAST_SHARE && blocks(share) < 2 * self.gpu.multiprocessors() {
            share /= 2;
        }
        share
    }

    /// Attends from rows `q [count, heads * head_dim]` of `sequence`, the first at position
    /// `first`, whose keys and values are stored.
    pub fn attend_prompt(
        &self,
        out: u64,
        q: DeviceMatrix,
        sequence: usize,
        first: usize,
    ) -> Result<(), CudaError> {
        let columns = self.shape.kv_heads * self.shape.head_dim;
        let matrix = |buffer: &Buffer| DeviceMatrix {
            address: buffer.address() + 2 * (sequence * self.capacity * columns) as u64,
            rows: first + q.rows,
            columns,
            dtype: self.dtype,
        };
        let (keys, values) = (matrix(&self.keys), matrix(&self.values));
        match (self.gpu).attend_tiled(out, q, keys, values, first, self.shape)? {
            true => Ok(()),
            false => (self.gpu).attend_behind(out, q, keys, values, first, self.shape),
        }
    }
}

impl Gpu {
    /// Attention of rows `q` at positions from `first` on that never writes scores; whether there
    /// is a kernel for heads of this width.
    pub(super) fn attend_tiled(
        &self,
        out: u64,
        q: DeviceMatrix,
        keys: DeviceMatrix,
        values: DeviceMatrix,
        first: usize,
        shape: AttentionShape,
    ) -> Result<bool, CudaError> {
        let d = shape.head_dim;
        // Queries of a block; its threads; bytes of shared memory.
        let by_groups = self.is_hopper();
        let (queries, threads, shared) = match by_groups {
            true => (128, 256, 8 * 64 * d * 2),
            false => (64, 128, 4 * 64 * (d + 8) * 2),
        };
        let name = match (by_groups, d) {
            (true, 64) => "attend_group_64",
            (true, 128) => "attend_group_128",
            (false, 64) => "attend_prompt_64",
            (false, 128) => "attend_prompt_128",
            _ => return Ok(false),
        };
        let args = [
            out.into(),
            q.address.into(),
            keys.address.into(),
            values.address.into(),
            (q.rows as i32).into(),
            (first as i32).into(),
            (shape.kv_heads as i32).into(),
            (1.0 / (d as f32).sqrt()).into(),
        ];
        let grid = [q.rows.div_ceil(queries), shape.heads, 1];
        let block = [threads, 1, 1];
        // SAFETY: keys and values have first + rows rows; out is as large as q.
        unsafe { self.launch_behind(program(q.dtype), name, grid, block, shared, &args)? };
        Ok(true)
    }
}
