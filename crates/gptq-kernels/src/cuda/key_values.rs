//! Attention of a pass that reads or writes text, over the keys and values of earlier tokens; the
//! kernels are described in the files that `kernels/attend.cuh` includes. Addresses are of sixteen-bit
//! row-major matrices.

use std::sync::Arc;

use gptq_types::{DeviceMatrix, Dtype};

use super::Gpu;
use super::decoder::Turn;
use super::error::CudaError;
use super::launch::Arg;
use super::memory::Buffer;
use super::norm::DeviceNorm;
use super::program::Program;
use super::text::{Output, RowOrder, address, by_eights, others, program};
use crate::{AttentionShape, Pairing};

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

/// Root-mean-square norms of the heads of a block, each of `head_dim` and with the same epsilon.
#[derive(Clone, Copy, Default)]
pub struct HeadNorms<'a> {
    /// Of queries.
    pub query: Option<&'a DeviceNorm>,
    /// Of keys.
    pub key: Option<&'a DeviceNorm>,
    /// Of values.
    pub value: Option<&'a DeviceNorm>,
    /// Whether queries and keys are normed when they have been turned, not before.
    pub after_rotation: bool,
}

impl HeadNorms<'_> {
    fn all(&self) -> [Option<&DeviceNorm>; 3] {
        [self.query, self.key, self.value]
    }

    /// Of all of them; any where there are none.
    fn eps(&self, head_dim: usize) -> f32 {
        let of = |norm: &DeviceNorm| norm.root_mean_square(head_dim).1;
        let mut all = self.all().into_iter().flatten().map(of);
        let eps = all.next().unwrap_or(0.0);
        assert!(all.all(|other| other == eps), "one epsilon for all heads");
        eps
    }

    /// The weights of each, null where there is none.
    fn weights(&self, head_dim: usize) -> [Arg; 3] {
        (self.all()).map(|norm| address(norm.map(|norm| norm.root_mean_square(head_dim).0)))
    }
}

/// What [`DeviceKeyValues::store`] places.
struct Placed<'a> {
    out: u64,
    q: Output,
    kv: Option<[Output; 2]>,
    count: usize,
    rows: RawRows,
    norms: &'a HeadNorms<'a>,
    turns: Option<[&'a Turn; 2]>,
}

impl Placed<'_> {
    /// The table of all heads, where whole heads are turned by halves: most models.
    fn common(&self) -> Option<&Turn> {
        let [of_q, of_k] = self.turns?;
        let common = of_q.addresses() == of_k.addresses()
            && of_q.pairing == Pairing::Halves
            && of_q.rotary_dim == of_q.head_dim
            && self.norms.value.is_none()
            && !self.norms.after_rotation;
        common.then_some(of_q)
    }

    /// Threads that take a head, `values` pairs at a time.
    fn lanes(head_dim: usize, values: usize) -> usize {
        (head_dim / 2).div_ceil(values).next_power_of_two().min(32)
    }
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

    /// Norms heads where `norms` says so, turns queries by the first of `turns` and keys by the second
    /// (not at all without them), stores keys and values, and leaves the queries in
    /// `out [rows, heads * head_dim]`. Without `kv` only queries are placed: the block attends to what
    /// another one stored. Values may be read where keys are.
    #[allow(clippy::too_many_arguments)]
    pub fn store(
        &self,
        out: u64,
        q: Output,
        kv: Option<[Output; 2]>,
        count: usize,
        rows: TextRows,
        norms: &HeadNorms,
        turns: Option<[&Turn; 2]>,
    ) -> Result<(), CudaError> {
        for turn in turns.into_iter().flatten() {
            assert_eq!(turn.head_dim, self.shape.head_dim, "heads that are turned");
        }
        let rows = rows.raw();
        let placed = Placed {
            out,
            q,
            kv,
            count,
            rows,
            norms,
            turns,
        };
        match (placed.common(), kv) {
            (Some(turn), Some([k, v])) if k.pitch == v.pitch => {
                self.place_common(&placed, [k, v], turn)
            }
            _ => self.place_any(&placed),
        }
    }

    /// Keys and values of as many columns, whole heads turned by halves of one table.
    fn place_common(
        &self,
        placed: &Placed,
        [k, v]: [Output; 2],
        turn: &Turn,
    ) -> Result<(), CudaError> {
        let AttentionShape {
            heads,
            kv_heads,
            head_dim,
            ..
        } = self.shape;
        let q = placed.q;
        let eights = by_eights(
            &[head_dim / 2, q.pitch, k.pitch],
            &[q.address, k.address, v.address],
        );
        let (name, values) = match eights {
            true => ("place_heads_8", 8),
            false => ("place_heads_1", 1),
        };
        let lanes = Placed::lanes(head_dim, values);
        let (cosine, sine) = turn.addresses();
        let [q_norm, k_norm, _] = placed.norms.weights(head_dim);
        let args = [
            placed.out.into(),
            (&self.keys).into(),
            (&self.values).into(),
            q.address.into(),
            k.address.into(),
            v.address.into(),
            q_norm,
            k_norm,
            cosine.into(),
            sine.into(),
            placed.rows.into(),
            (heads as i32).into(),
            (kv_heads as i32).into(),
            (head_dim as i32).into(),
            (lanes as i32).into(),
            (q.pitch as i32).into(),
            (k.pitch as i32).into(),
            (self.capacity as i32).into(),
            placed.norms.eps(head_dim).into(),
        ];
        let teams = heads + 2 * kv_heads;
        let grid = [(teams * lanes).div_ceil(256), placed.count, 1];
        // SAFETY: the caller vouches for the rows; the cache has the positions that it counted.
        unsafe { (self.gpu).launch_behind(program(self.dtype), name, grid, [256, 1, 1], 0, &args) }
    }

    /// Everything else.
    fn place_any(&self, placed: &Placed) -> Result<(), CudaError> {
        let AttentionShape {
            heads,
            kv_heads,
            head_dim,
            ..
        } = self.shape;
        let Placed { q, norms, .. } = *placed;
        let [k, v] = placed.kv.unwrap_or([q; 2]);
        let [of_q, of_k] = match placed.turns {
            Some(turns) => turns.map(Some),
            None => [None; 2],
        };
        let turning = of_q.map_or(0, |turn| turn.rotary_dim / 2);
        let pairing = of_q.map_or(Pairing::Halves, |turn| turn.pairing);
        if let (Some(of_q), Some(of_k)) = (of_q, of_k) {
            let kind = |turn: &Turn| (turn.rotary_dim, turn.pairing);
            assert_eq!(kind(of_q), kind(of_k), "queries and keys turn alike");
        }
        let passing = head_dim / 2 - turning;
        let eights = by_eights(
            &[turning, passing, q.pitch, k.pitch, v.pitch],
            &[q.address, k.address, v.address],
        );
        let name = match (pairing, eights) {
            (Pairing::Halves, true) => "place_any_heads_8",
            (Pairing::Halves, false) => "place_any_heads_1",
            (Pairing::Interleaved, true) => "place_paired_heads_8",
            (Pairing::Interleaved, false) => "place_paired_heads_1",
        };
        let lanes = Placed::lanes(head_dim, if eights { 8 } else { 1 });
        let stored = placed.kv.map_or(0, |_| kv_heads);
        let mut args: Vec<Arg> = vec![
            placed.out.into(),
            (&self.keys).into(),
            (&self.values).into(),
            q.address.into(),
            k.address.into(),
            v.address.into(),
        ];
        args.extend(norms.weights(head_dim));
        for turn in [of_q, of_k] {
            let (cosine, sine) = turn.map_or((0, 0), Turn::addresses);
            args.push(cosine.into());
            args.push(sine.into());
        }
        args.push(placed.rows.into());
        let numbers = [
            heads,
            stored,
            head_dim,
            turning,
            lanes,
            q.pitch,
            k.pitch,
            v.pitch,
            self.capacity,
            usize::from(norms.after_rotation),
        ];
        args.extend(numbers.map(|number| Arg::from(number as i32)));
        args.push(norms.eps(head_dim).into());
        let teams = heads + 2 * stored;
        let grid = [(teams * lanes).div_ceil(256), placed.count, 1];
        // SAFETY: as for `place_common`; without keys none is stored.
        unsafe { (self.gpu).launch_behind(others(self.dtype), name, grid, [256, 1, 1], 0, &args) }
    }

    /// Heads of keys as the block that attends has them, and a window only where one hides what the
    /// cache has room for.
    fn seen_by(&self, shape: AttentionShape) -> AttentionShape {
        let of = |shape: AttentionShape| [shape.kv_heads, shape.head_dim];
        assert_eq!(of(shape), of(self.shape), "heads of keys in the cache");
        among(shape, self.capacity)
    }

    /// Attends from the newest token of each sequence as `shape` says, whose heads of keys are the
    /// cache's; `out` has rows in `order`. `held` as in [`TextRows::Newest`].
    pub fn attend_newest(
        &self,
        out: u64,
        order: RowOrder,
        q: u64,
        held: &Buffer,
        shape: AttentionShape,
    ) -> Result<(), CudaError> {
        let shape = self.seen_by(shape);
        let (heads, d) = (shape.heads, shape.head_dim);
        let Newest {
            name,
            over,
            last,
            share,
            shared,
        } = self.newest(shape)?;
        let shares = self.capacity.div_ceil(share);
        let parts = (self.gpu).scratch(
            "attention shares",
            self.sequences * heads * shares * (d + 2) * 4,
        )?;
        let [scale, cap, window] = scored(shape);
        let args = [
            (&*parts).into(),
            q.into(),
            (&self.keys).into(),
            (&self.values).into(),
            held.into(),
            (self.capacity as i32).into(),
            (shape.kv_heads as i32).into(),
            (last as i32).into(),
            (share as i32).into(),
            scale,
            cap,
            window,
        ];
        let grid = [shares, over, self.sequences];
        let program = attention(self.dtype, shape);
        // SAFETY: the caches hold what `held` counts; a part for every share.
        unsafe { (self.gpu).launch_behind(program, name, grid, [128, 1, 1], shared, &args)? };
        let args = [
            out.into(),
            (&*parts).into(),
            held.into(),
            address(order.places),
            (shares as i32).into(),
            (share as i32).into(),
            (d as i32).into(),
            (order.width as i32).into(),
            window,
        ];
        let (grid, block) = ([heads, self.sequences, 1], [d.next_multiple_of(32), 1, 1]);
        // SAFETY: out has a row of the order's width a sequence.
        unsafe { (self.gpu).launch_behind(program, "merge_shares", grid, block, 0, &args) }
    }

    fn newest(&self, shape: AttentionShape) -> Result<Newest, CudaError> {
        let AttentionShape {
            heads,
            kv_heads,
            head_dim: d,
            ..
        } = shape;
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
                share: self.share(over, shape),
                shared: WARPS * TOGETHER * (d + 2) * 4,
            });
        }
        let name = match d {
            64 => "attend_share_8_1",
            128 => "attend_share_8_2",
            256 => "attend_share_8_4",
            ..=128 => "attend_share_2_8",
            129..=256 => "attend_share_2_16",
            257..=512 if d.is_multiple_of(8) => "attend_share_8_8",
            _ => {
                return Err(CudaError::Invalid(format!(
                    "attention heads of {d} are wider than 256, and no multiple of 8 up to 512"
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
    fn share(&self, over: usize, shape: AttentionShape) -> usize {
        let mut share = SHARE;
        let keys = shape.window.unwrap_or(self.capacity);
        let blocks = |share| keys.div_ceil(share) * over * self.sequences;
        while share > LEAST_SHARE && blocks(share) < 2 * self.gpu.multiprocessors() {
            share /= 2;
        }
        share
    }

    /// Attends from rows `q [count, shape.heads * head_dim]` of `sequence`, the first at position
    /// `first`, whose keys and values are stored, as `shape` says.
    pub fn attend_prompt(
        &self,
        out: u64,
        q: DeviceMatrix,
        sequence: usize,
        first: usize,
        shape: AttentionShape,
    ) -> Result<(), CudaError> {
        let shape = self.seen_by(shape);
        let columns = shape.kv_heads * shape.head_dim;
        let matrix = |buffer: &Buffer| DeviceMatrix {
            address: buffer.address() + 2 * (sequence * self.capacity * columns) as u64,
            rows: first + q.rows,
            columns,
            dtype: self.dtype,
        };
        let (keys, values) = (matrix(&self.keys), matrix(&self.values));
        match (self.gpu).attend_tiled(out, q, keys, values, first, shape)? {
            true => Ok(()),
            false => (self.gpu).attend_behind(out, q, keys, values, first, shape),
        }
    }
}

/// The same attention to `keys` keys: a window of all of them is none.
pub(super) fn among(shape: AttentionShape, keys: usize) -> AttentionShape {
    assert_ne!(shape.window, Some(0), "a token sees itself");
    AttentionShape {
        window: shape.window.filter(|window| *window < keys),
        ..shape
    }
}

/// The program whose kernels attend as `shape` says.
fn attention(dtype: Dtype, shape: AttentionShape) -> Program {
    let bf16 = dtype == Dtype::BF16;
    match (shape.soft_cap.is_some(), shape.window.is_some()) {
        (false, false) => program(dtype),
        (cap, window) => Program::Attend { bf16, cap, window },
    }
}

/// Scale, cap (0 for none) and window as the kernels take them.
pub(super) fn scored(shape: AttentionShape) -> [Arg; 3] {
    [
        shape.scale.into(),
        shape.soft_cap.unwrap_or(0.0).into(),
        (shape
            .window
            .map_or(i32::MAX, |keys| keys.min(i32::MAX as usize) as i32))
        .into(),
    ]
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
        let shape = among(shape, first + q.rows);
        let [scale, cap, window] = scored(shape);
        let args = [
            out.into(),
            q.address.into(),
            keys.address.into(),
            values.address.into(),
            (q.rows as i32).into(),
            (first as i32).into(),
            (shape.kv_heads as i32).into(),
            scale,
            cap,
            window,
        ];
        let grid = [q.rows.div_ceil(queries), shape.heads, 1];
        let (program, block) = (attention(q.dtype, shape), [threads, 1, 1]);
        // SAFETY: keys and values have first + rows rows; out is as large as q.
        unsafe { self.launch_behind(program, name, grid, block, shared, &args)? };
        Ok(true)
    }
}
