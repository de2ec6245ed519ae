//! Attention of a pass that reads or writes text, over the keys and values of earlier tokens; the
//! kernels are described in `kernels/llama_block.cu`. Matrices are sixteen-bit.

use std::sync::Arc;

use gptq_types::Dtype;

use super::Gpu;
use super::attention::expect_heads;
use super::decoder::RotaryTable;
use super::error::CudaError;
use super::launch::Arg;
use super::memory::Buffer;
use super::norm::DeviceNorm;
use super::program::Program;
use super::text::{RowOrder, address, by_eights, others, program};
use super::view::{DeviceMatrix, DeviceSlice};
use crate::{AttentionShape, Pairing};

/// Keys of a sequence that a block attends to. More of them left a GPU unevenly filled in a decoder's
/// step, although they were faster alone.
const SPLIT_KEYS: usize = 256;
/// The least, where heads share keys: a warp takes sixteen.
const LEAST_SPLIT_KEYS: usize = 64;
/// Groups of eight lanes in a block of one head; each leaves sums of its own.
const LANE_GROUPS: usize = 16;
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
    /// The newest token of each sequence; how many tokens it has, that one included.
    Newest(DeviceSlice<'a, i32>),
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
    /// Whether queries and keys are normed when they have been rotated, not before.
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
    out: DeviceMatrix<'a>,
    q: DeviceMatrix<'a>,
    kv: Option<[DeviceMatrix<'a>; 2]>,
    rows: RawRows,
    norms: &'a HeadNorms<'a>,
    rotary_tables: Option<[&'a RotaryTable; 2]>,
}

impl Placed<'_> {
    /// The table of all heads, where whole heads are rotated by halves: most models.
    fn common(&self) -> Option<&RotaryTable> {
        let [of_q, of_k] = self.rotary_tables?;
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
    /// Blocks side by side for a split of a sequence.
    over: usize,
    /// What the kernel takes behind the heads of keys: how many heads share one of those, or channels.
    last: usize,
    /// Keys.
    split: usize,
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
        let sizes = [capacity, shape.kv_heads, shape.head_dim, 2];
        let bytes = (sizes.iter()).try_fold(sequences, |bytes, &size| bytes.checked_mul(size));
        let bytes = bytes.ok_or_else(|| {
            let text = format!("{sequences} sequences of {capacity} tokens cannot be counted");
            CudaError::Invalid(text)
        })?;
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

    /// Norms heads where `norms` says so, rotary_tables queries by the first of `rotary_tables` and keys by the second
    /// (not at all without them), stores keys and values, and leaves the queries in
    /// `out [rows, heads * head_dim]`. Without `kv` only queries are placed: the block attends to what
    /// another one stored, with as many heads as `q` has. Values may be read where keys are.
    ///
    /// # Panics
    /// If shapes do not fit the cache, or the rows of a prompt lie beyond its capacity or a table's.
    pub fn store(
        &self,
        out: DeviceMatrix,
        q: DeviceMatrix,
        kv: Option<[DeviceMatrix; 2]>,
        rows: TextRows,
        norms: &HeadNorms,
        rotary_tables: Option<[&RotaryTable; 2]>,
    ) -> Result<(), CudaError> {
        self.expect_rows(out, q, kv, rows);
        for rotary in rotary_tables.into_iter().flatten() {
            assert_eq!(
                rotary.head_dim, self.shape.head_dim,
                "heads that are rotated"
            );
            assert!(
                rotary.positions() >= self.capacity,
                "positions of the table"
            );
        }
        let rows = rows.raw();
        let placed = Placed {
            out,
            q,
            kv,
            rows,
            norms,
            rotary_tables,
        };
        match (placed.common(), kv) {
            (Some(rotary), Some([k, v])) if k.pitch == v.pitch => {
                self.place_common(&placed, [k, v], rotary)
            }
            _ => self.place_any(&placed),
        }
    }

    fn expect_rows(
        &self,
        out: DeviceMatrix,
        q: DeviceMatrix,
        kv: Option<[DeviceMatrix; 2]>,
        rows: TextRows,
    ) {
        let AttentionShape {
            kv_heads, head_dim, ..
        } = self.shape;
        for x in [out].into_iter().chain(kv.into_iter().flatten()) {
            x.like(q);
        }
        assert_eq!(q.dtype, self.dtype, "type of the cache");
        assert!(q.columns.is_multiple_of(head_dim), "whole heads of queries");
        out.contiguous()
            .expect([q.rows, q.columns], "heads of queries");
        for x in kv.into_iter().flatten() {
            x.expect([q.rows, kv_heads * head_dim], "heads of keys and values");
        }
        match rows {
            TextRows::Prompt { sequence, first } => {
                assert!(sequence < self.sequences, "sequences of the cache");
                let end = first.checked_add(q.rows);
                assert!(
                    end.is_some_and(|end| end <= self.capacity),
                    "tokens of the cache"
                );
            }
            TextRows::Newest(held) => {
                assert_eq!(
                    [q.rows, held.len()],
                    [self.sequences; 2],
                    "sequences of the cache"
                );
            }
        }
    }

    /// Keys and values of as many columns, whole heads rotated by halves of one table.
    fn place_common(
        &self,
        placed: &Placed,
        [k, v]: [DeviceMatrix; 2],
        rotary: &RotaryTable,
    ) -> Result<(), CudaError> {
        let AttentionShape {
            kv_heads, head_dim, ..
        } = self.shape;
        let q = placed.q;
        let heads = q.columns / head_dim;
        let eights = by_eights(
            &[head_dim / 2, q.pitch, k.pitch],
            &[q.address, k.address, v.address],
        );
        let (name, values) = match eights {
            true => ("qk_norm_rope_cache_8", 8),
            false => ("qk_norm_rope_cache_1", 1),
        };
        let lanes = Placed::lanes(head_dim, values);
        let (cosine, sine) = rotary.addresses();
        let [q_norm, k_norm, _] = placed.norms.weights(head_dim);
        let args = [
            placed.out.address.into(),
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
        let all_heads = heads + 2 * kv_heads;
        let grid = [(all_heads * lanes).div_ceil(256), placed.q.rows, 1];
        // SAFETY: the rows fit the cache, whose positions the caller counts in `held`.
        unsafe { (self.gpu).launch_pdl(program(self.dtype), name, grid, [256, 1, 1], 0, &args) }
    }

    /// Everything else.
    fn place_any(&self, placed: &Placed) -> Result<(), CudaError> {
        let AttentionShape {
            kv_heads, head_dim, ..
        } = self.shape;
        let Placed { q, norms, .. } = *placed;
        let heads = q.columns / head_dim;
        let [k, v] = placed.kv.unwrap_or([q; 2]);
        let [of_q, of_k] = match placed.rotary_tables {
            Some(rotary_tables) => rotary_tables.map(Some),
            None => [None; 2],
        };
        let turning = of_q.map_or(0, |rotary| rotary.rotary_dim / 2);
        let pairing = of_q.map_or(Pairing::Halves, |rotary| rotary.pairing);
        if let (Some(of_q), Some(of_k)) = (of_q, of_k) {
            let kind = |rotary: &RotaryTable| (rotary.rotary_dim, rotary.pairing);
            assert_eq!(kind(of_q), kind(of_k), "queries and keys are rotated alike");
        }
        let passing = head_dim / 2 - turning;
        let eights = by_eights(
            &[turning, passing, q.pitch, k.pitch, v.pitch],
            &[q.address, k.address, v.address],
        );
        let name = match (pairing, eights) {
            (Pairing::Halves, true) => "qk_norm_rope_cache_any_8",
            (Pairing::Halves, false) => "qk_norm_rope_cache_any_1",
            (Pairing::Interleaved, true) => "qk_norm_rope_cache_interleaved_8",
            (Pairing::Interleaved, false) => "qk_norm_rope_cache_interleaved_1",
        };
        let lanes = Placed::lanes(head_dim, if eights { 8 } else { 1 });
        let stored = placed.kv.map_or(0, |_| kv_heads);
        let mut args: Vec<Arg> = vec![
            placed.out.address.into(),
            (&self.keys).into(),
            (&self.values).into(),
            q.address.into(),
            k.address.into(),
            v.address.into(),
        ];
        args.extend(norms.weights(head_dim));
        for rotary in [of_q, of_k] {
            let (cosine, sine) = rotary.map_or((0, 0), RotaryTable::addresses);
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
        let all_heads = heads + 2 * stored;
        let grid = [(all_heads * lanes).div_ceil(256), placed.q.rows, 1];
        // SAFETY: as for `place_common`; without keys none is stored.
        unsafe { (self.gpu).launch_pdl(others(self.dtype), name, grid, [256, 1, 1], 0, &args) }
    }

    fn matrix<'a>(&self, cache: &'a Buffer) -> DeviceMatrix<'a> {
        let columns = self.shape.kv_heads * self.shape.head_dim;
        cache.matrix([self.sequences * self.capacity, columns], self.dtype)
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
        out: DeviceMatrix,
        order: RowOrder,
        q: DeviceMatrix,
        held: DeviceSlice<'_, i32>,
        shape: AttentionShape,
    ) -> Result<(), CudaError> {
        let shape = self.seen_by(shape);
        let (heads, d) = (shape.heads, shape.head_dim);
        assert_eq!(held.len(), self.sequences, "sequences of the cache");
        q.contiguous()
            .expect([self.sequences, heads * d], "heads of queries");
        out.contiguous()
            .expect([self.sequences, order.width], "rows of the order");
        order.expect(heads * d);
        let Newest {
            name,
            over,
            last,
            split,
            shared,
        } = self.newest(shape)?;
        let splits = self.capacity.div_ceil(split);
        let parts = (self.gpu).scratch(
            "attention splits",
            self.sequences * heads * splits * (d + 2) * 4,
        )?;
        let [scale, cap, window] = scored(shape);
        let args = [
            (&*parts).into(),
            q.address.into(),
            (&self.keys).into(),
            (&self.values).into(),
            held.address().into(),
            (self.capacity as i32).into(),
            (shape.kv_heads as i32).into(),
            (last as i32).into(),
            (split as i32).into(),
            scale,
            cap,
            window,
        ];
        let grid = [splits, over, self.sequences];
        let program = attention(self.dtype, shape);
        // SAFETY: the caches hold what `held` counts; a part for every split.
        unsafe { (self.gpu).launch_pdl(program, name, grid, [128, 1, 1], shared, &args)? };
        let args = [
            out.address.into(),
            (&*parts).into(),
            held.address().into(),
            address(order.places),
            (splits as i32).into(),
            (split as i32).into(),
            (d as i32).into(),
            (order.width as i32).into(),
            window,
        ];
        let (grid, block) = ([heads, self.sequences, 1], [d.next_multiple_of(32), 1, 1]);
        // SAFETY: out has a row of the order's width a sequence.
        unsafe { (self.gpu).launch_pdl(program, "merge_splits", grid, block, 0, &args) }
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
                    "attention_decode_gqa_64"
                } else {
                    "attention_decode_gqa_128"
                },
                over,
                last: of,
                split: self.split(over, shape),
                shared: WARPS * TOGETHER * (d + 2) * 4,
            });
        }
        let name = match d {
            64 => "attention_decode_8_1",
            128 => "attention_decode_8_2",
            256 => "attention_decode_8_4",
            ..=128 => "attention_decode_2_8",
            129..=256 => "attention_decode_2_16",
            257..=512 if d.is_multiple_of(8) => "attention_decode_8_8",
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
            split: SPLIT_KEYS,
            shared: LANE_GROUPS * (d + 2) * 4,
        })
    }

    /// Keys that a block attends to where there are `over` of them side by side: as many as leave two
    /// blocks to each multiprocessor.
    fn split(&self, over: usize, shape: AttentionShape) -> usize {
        let mut split = SPLIT_KEYS;
        let keys = shape.window.unwrap_or(self.capacity);
        let blocks = |split| keys.div_ceil(split) * over * self.sequences;
        while split > LEAST_SPLIT_KEYS && blocks(split) < 2 * self.gpu.multiprocessors() {
            split /= 2;
        }
        split
    }

    /// Attends from rows `q [count, shape.heads * head_dim]` of `sequence`, the first at position
    /// `first`, whose keys and values are stored, as `shape` says.
    pub fn attend_prompt(
        &self,
        out: DeviceMatrix,
        q: DeviceMatrix,
        sequence: usize,
        first: usize,
        shape: AttentionShape,
    ) -> Result<(), CudaError> {
        let shape = self.seen_by(shape);
        assert!(sequence < self.sequences, "sequences of the cache");
        let end = first.checked_add(q.rows);
        assert!(
            end.is_some_and(|end| end <= self.capacity),
            "tokens of the cache"
        );
        let held = sequence * self.capacity..sequence * self.capacity + first + q.rows;
        let [keys, values] =
            [&self.keys, &self.values].map(|cache| self.matrix(cache).row_range(held.clone()));
        expect_heads(out, q, [keys, values], held.len(), shape);
        let out = out.address;
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
        (cap, window) => Program::Attention { bf16, cap, window },
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
            (true, 64) => "attention_prefill_wgmma_64",
            (true, 128) => "attention_prefill_wgmma_128",
            (false, 64) => "attention_prefill_64",
            (false, 128) => "attention_prefill_128",
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
        unsafe { self.launch_pdl(program, name, grid, block, shared, &args)? };
        Ok(true)
    }
}
