//! Products with packed weights on the GPU: which kernel, and how much of the GPU it is given.

use super::error::CudaError;
use super::launch::Arg;
use super::layout::{GRANULE, K_STEP, LANES, TILE};
use super::memory::Buffer;
use super::packed::PackedLinear;
use super::view::DeviceMatrix;

/// Up to so many rows a block takes all of them, and all positions.
const FEW_ROWS: usize = 32;
/// Bytes of shared memory that it may take, on Hopper and elsewhere, as in the kernel.
const HOPPERS_ROOM: usize = 216 << 10;
const ROOM: usize = 96 << 10;
/// Outputs that are widened at a time: what they take is held beside the packed weights.
const WIDENED_OUTPUTS: usize = 12288;
/// K steps of a split that are worth a block of their own.
const SPLIT_STEPS: usize = 4;
/// What a block of more rows costs in steps, after times on an H200 (`docs/runs/2026-11-22-h200-shared-keys/`):
/// to begin and end; to leave sums for the others and read them; and how much longer a step takes where two
/// blocks do not share a multiprocessor and wait in turns.
const BEGIN: f64 = 4.0;
const SUMS: f64 = 2.6;
const ALONE: f64 = 1.15;
const ALONE_OF_8: f64 = 1.4;
/// Bytes of shared memory that every block takes beside its own.
const OF_BLOCK: usize = 1 << 10;
/// Splits at most: each leaves its sums in memory, and the last one reads them all.
const MAX_SPLITS: usize = 8;

impl PackedLinear {
    /// The same with rows of x in the linear's own [order](PackedLinear::order), zero at padding.
    pub fn multiply_ordered(
        &self,
        out: DeviceMatrix,
        x: DeviceMatrix,
        add: bool,
    ) -> Result<(), CudaError> {
        assert_eq!(
            x.contiguous().columns,
            self.steps * K_STEP,
            "places of the order"
        );
        out.contiguous()
            .expect([x.rows, self.outputs], "rows of the product");
        assert_eq!([x.dtype, out.dtype], [self.dtype; 2], "type of the rows");
        match x.rows {
            0 => Ok(()),
            rows if rows <= FEW_ROWS => self.multiply_few(out, x, add),
            rows if rows <= self.more_rows() => self.multiply_more(out, x, add),
            _ => self.multiply_many(out, x, add),
        }
    }

    fn arguments(&self, out: DeviceMatrix, x: DeviceMatrix, add: bool) -> Vec<Arg> {
        vec![
            out.address.into(),
            x.address.into(),
            self.bias.as_ref().map_or(0, Buffer::address).into(),
            self.raw().into(),
            (x.rows as i32).into(),
            (x.columns as i32).into(),
            i32::from(add).into(),
        ]
    }

    /// Up to so many rows blocks take codes apart for themselves; from there on the weight is widened
    /// once and cuBLAS does the product. On Hopper the two cross beyond 256; elsewhere not timed.
    fn more_rows(&self) -> usize {
        if self.gpu.is_hopper() { 256 } else { 64 }
    }

    /// One zero, and a scale for each whole step.
    fn is_plain(&self) -> bool {
        self.granule * GRANULE == K_STEP && self.zeros.is_none()
    }

    fn multiply_few(&self, out: DeviceMatrix, x: DeviceMatrix, add: bool) -> Result<(), CudaError> {
        let room = if self.gpu.is_hopper() {
            HOPPERS_ROOM
        } else {
            ROOM
        };
        let tiles = self.outputs.div_ceil(TILE);
        let multiprocessors = self.gpu.multiprocessors();
        let few = Few::of(self.bits as usize, x.rows, tiles, multiprocessors, room);
        let grid = [tiles.div_ceil(2 * few.warps), 1, 1];
        let block = [LANES * few.warps * few.k_slices, 1, 1];
        let args = self.arguments(out, x, add);
        let (program, name) = (self.program(), few.name(self.is_plain()));
        // SAFETY: out has rows x N elements, x as many columns as positions, asserted before.
        unsafe { (self.gpu).launch_pdl(program, name, grid, block, few.shared(), &args) }
    }

    fn multiply_more(
        &self,
        out: DeviceMatrix,
        x: DeviceMatrix,
        add: bool,
    ) -> Result<(), CudaError> {
        let (row_tiles, warpgroups) = more_shape(self.bits, self.gpu.shared_memory);
        let name = match (row_tiles, self.is_plain()) {
            (4, true) => "more_rows_4_PLAIN",
            (4, false) => "more_rows_4_ANY",
            (_, true) => "more_rows_8_PLAIN",
            (_, false) => "more_rows_8_ANY",
        };
        let blocks = self.outputs.div_ceil(4 * warpgroups * TILE);
        let over = x.rows.div_ceil(8 * row_tiles);
        let multiprocessors = self.gpu.multiprocessors();
        let shared = more_shared(self.bits, row_tiles, warpgroups);
        let two_fit = 2 * (shared + OF_BLOCK) <= self.gpu.shared_memory + OF_BLOCK;
        let alone = match (two_fit, self.bits) {
            (false, _) => None,
            (true, 8) => Some(ALONE_OF_8),
            (true, _) => Some(ALONE),
        };
        let splits = splits(alone, self.steps, blocks * over, multiprocessors);
        let sums = 4 * row_tiles * 128 * warpgroups; // of a block
        let parts = (self.gpu).scratch("split sums", splits * blocks * over * sums * 4)?;
        let arrived = self.gpu.counters(blocks * over)?;
        let mut args = self.arguments(out, x, add);
        args.extend([Arg::from(parts.address()), Arg::from(arrived.address())]);
        let shared = match blocks * over * splits <= multiprocessors {
            // So much that two do not fit: beside the end of another kernel some multiprocessors would
            // be given two of them, and others none.
            true => shared.max(self.gpu.shared_memory / 2 + OF_BLOCK),
            false => shared,
        };
        let (grid, block) = ([blocks, over, splits], [128 * warpgroups, 1, 1]);
        // SAFETY: as above; parts and counters for every block.
        unsafe { (self.gpu).launch_pdl(self.program(), name, grid, block, shared, &args) }
    }

    fn multiply_many(
        &self,
        out: DeviceMatrix,
        x: DeviceMatrix,
        add: bool,
    ) -> Result<(), CudaError> {
        let stride = self.steps * K_STEP;
        let most = WIDENED_OUTPUTS.min(self.outputs.next_multiple_of(TILE));
        let place = self.gpu.scratch("widened", most * stride * 2)?;
        for first in (0..self.outputs).step_by(WIDENED_OUTPUTS) {
            let rows = WIDENED_OUTPUTS.min(self.outputs - first);
            let args = [place.address().into(), self.raw_from(first, rows).into()];
            let grid = [(2 * self.steps).div_ceil(8), rows.div_ceil(TILE), 1];
            // SAFETY: the place holds rows x stride elements.
            unsafe {
                let program = self.program();
                self.gpu
                    .launch(program, "dequantize_packed", grid, [256, 1, 1], 0, &args)?
            };
            let weight = place.matrix([rows, stride], self.dtype);
            let out = out.column_range(first..first + rows);
            self.gpu.project_onto(out, x, weight, add)?;
        }
        match &self.bias {
            None => Ok(()),
            Some(bias) => self.gpu.add_bias(out, bias),
        }
    }
}

/// A block of few rows: K slices of `warps`, each with `stages` K steps in shared memory. `FewRowsShape` in
/// `kernels/few_rows.cuh` computes the same, and what the two differ in only a GPU's tests see.
#[derive(Clone, Copy, Debug)]
struct Few {
    row_tiles: usize,
    warps: usize,
    k_slices: usize,
    stages: usize,
    /// Bytes of a K step of a slice: x, and codes, scales and zeros.
    stage_bytes: usize,
}

impl Few {
    /// The width of block that reads least where all multiprocessors work at once: tiles of the
    /// busiest one, and what it reads of x beside them, which comes from the cache. Of equals the widest.
    fn of(bits: usize, rows: usize, tiles: usize, multiprocessors: usize, room: usize) -> Few {
        let row_tiles = rows.div_ceil(8).next_power_of_two();
        let read = |warps: usize| {
            let rounds = tiles.div_ceil(2 * warps).div_ceil(multiprocessors);
            rounds * (2 * warps + row_tiles)
        };
        let widths = [6, 3, 2, 1];
        let warps = widths.into_iter().min_by_key(|&warps| read(warps));
        Few::with(bits, row_tiles, warps.expect("there are widths"), room)
    }

    fn with(bits: usize, row_tiles: usize, warps: usize, room: usize) -> Few {
        let stage_bytes = row_tiles * 8 * K_STEP * 2 + warps * 2 * (bits * 256 + 256);
        let mut k_slices = match warps {
            1 => 8,
            6 => 2,
            _ => 4,
        };
        while k_slices > 1 && room / (k_slices * stage_bytes) < 2 {
            k_slices /= 2;
        }
        let most = if row_tiles == 1 || warps == 1 { 4 } else { 3 };
        let stages = most.min(room / (k_slices * stage_bytes));
        Few {
            row_tiles,
            warps,
            k_slices,
            stages,
            stage_bytes,
        }
    }

    fn shared(self) -> usize {
        self.k_slices * self.stages * self.stage_bytes
    }

    fn name(self, plain: bool) -> &'static str {
        macro_rules! names {
            ($($row_tiles:literal $warps:literal)*) => {
                match (self.row_tiles, self.warps, plain) {
                    $(($row_tiles, $warps, true) => concat!("few_rows_", $row_tiles, "_", $warps, "_PLAIN"),
                      ($row_tiles, $warps, false) => concat!("few_rows_", $row_tiles, "_", $warps, "_ANY"),)*
                    _ => unreachable!("no kernel of {self:?}"),
                }
            };
        }
        names!(1 1 1 2 1 3 1 6 2 1 2 2 2 3 2 6 4 1 4 2 4 3 4 6)
    }
}

/// How many blocks share the `steps` of positions of each of `blocks`: the number that leaves the busiest
/// multiprocessor the least work, in steps of a block. `alone`: how much longer a step takes without a block
/// beside it, none where two do not fit.
fn splits(alone: Option<f64>, steps: usize, blocks: usize, multiprocessors: usize) -> usize {
    let work = |splits: usize| {
        let busiest = (blocks * splits).div_ceil(multiprocessors);
        let rounds = match alone {
            Some(alone) => (busiest / 2 * 2) as f64 + (busiest % 2) as f64 * alone,
            None => busiest as f64,
        };
        let sums = match splits {
            1 => 0.0,
            _ => SUMS * (blocks * splits) as f64 / multiprocessors as f64,
        };
        rounds * (steps as f64 / splits as f64 + BEGIN) + sums
    };
    let most = (steps / SPLIT_STEPS).clamp(1, MAX_SPLITS);
    let best = (1..=most).min_by(|&a, &b| work(a).total_cmp(&work(b)));
    best.unwrap_or(1)
}

/// Bytes of shared memory of a block of more rows: steps of x, and of each warp's codes, scales and
/// zeros.
fn more_shared(bits: i32, row_tiles: usize, warpgroups: usize) -> usize {
    let of_warp = bits as usize * LANES * 8 + 2 * 8 * 16;
    let stages = if bits == 4 { 4 } else { 3 };
    stages * (8 * row_tiles * K_STEP * 2 + 4 * warpgroups * of_warp)
}

/// Eights of rows of a block, and its warpgroups: the most for which there is shared memory.
fn more_shape(bits: i32, room: usize) -> (usize, usize) {
    match (more_shared(bits, 8, 2) <= room, bits) {
        (true, _) => (8, 2),
        (false, 4) => (4, 2),
        (false, _) => (4, 1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOPPER: usize = 227 << 10;
    const ADA: usize = 99 << 10;

    #[test]
    fn blocks_of_more_rows_fit_into_shared_memory() {
        for bits in [4, 8] {
            assert_eq!(more_shape(bits, HOPPER), (8, 2), "{bits} bits");
            let (row_tiles, warpgroups) = more_shape(bits, ADA);
            assert!(
                more_shared(bits, row_tiles, warpgroups) <= ADA,
                "{bits} bits"
            );
        }
    }

    #[test]
    fn blocks_of_few_rows_fit_with_two_stages_of_each_slice() {
        for (room, most) in [(HOPPERS_ROOM, HOPPER), (ROOM, ADA)] {
            for (bits, row_tiles) in [(4, 1), (4, 2), (4, 4), (8, 1), (8, 2), (8, 4)] {
                for warps in [1, 2, 3, 6] {
                    let few = Few::with(bits, row_tiles, warps, room);
                    let sums = few.k_slices * few.warps * few.row_tiles * 1024;
                    assert!(few.stages >= 2 && few.shared() <= most, "{few:?}");
                    assert!(
                        sums <= few.shared() && few.k_slices * few.warps <= 16,
                        "{few:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn positions_are_shared_so_that_all_multiprocessors_have_work() {
        for (steps, blocks, want) in [
            (32, 86, 3),  // 4096 x 11008, 64 rows
            (32, 172, 3), // 128
            (32, 258, 1), // 192: two blocks for almost every one
            (32, 32, 4),  // 4096 x 4096, 64 rows
            (32, 128, 1), // 256
            (86, 96, 4),  // 11008 x 4096, 192 rows
            (3, 9, 1),
        ] {
            let got = splits(Some(ALONE), steps, blocks, 132);
            assert_eq!(got, want, "{blocks} blocks");
        }
        // Where two do not fit, two rounds of half the steps save nothing.
        assert_eq!(splits(None, 16, 98, 128), 1);
        assert_eq!(splits(Some(ALONE_OF_8), 16, 98, 128), 2);
    }

    #[test]
    fn blocks_of_few_rows_are_as_wide_as_outputs_ask_for() {
        for (outputs, rows, warps) in [
            (4096, 1, 1),
            (4096, 32, 1),
            (8192, 8, 2),
            (11008, 1, 3),
            (11008, 16, 3),
            (12288, 8, 3),
            (14336, 8, 2),
            (14336, 32, 6), // more of x: fewer blocks to read it
            (22016, 16, 6),
            (192, 3, 1),
        ] {
            let few = Few::of(4, rows, outputs / TILE, 132, HOPPERS_ROOM);
            assert_eq!(few.warps, warps, "{rows} rows, {outputs} outputs");
            assert!(8 * few.row_tiles >= rows);
        }
    }
}
