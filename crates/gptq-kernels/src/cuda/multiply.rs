//! Products with packed weights on the GPU: which kernel, and how much of the GPU it is given.

use gptq_types::DeviceMatrix;

use super::error::CudaError;
use super::launch::Arg;
use super::layout::{GRANULE, LANES, STEP, TILE};
use super::memory::Buffer;
use super::packed::PackedLinear;

/// Up to so many rows a warp takes all of them; their x must fit into shared memory.
const FEW_ROWS: usize = 8;
/// Up to so many rows a second tile of outputs, which halves what is read of x, costs more than it
/// saves: it takes registers, and with them warps.
const ONE_TILE_ROWS: usize = 4;
/// Outputs that are widened at a time: what they take is held beside the packed weights.
const WIDENED_OUTPUTS: usize = 12288;
/// Steps of x, codes and scales in shared memory, as in the kernel.
const STAGES: usize = 4;
/// Warps of a block of few rows.
const MAX_WARPS: usize = 16;
/// Steps of a share of the positions that are worth a block of their own.
const SHARE_STEPS: usize = 8;
/// Shares at most: each leaves its sums in memory, and the last one reads them all.
const MAX_SHARES: usize = 8;

impl PackedLinear {
    /// The same with rows of x in the linear's own [order](PackedLinear::order), zero at padding.
    pub fn multiply_ordered(&self, out: u64, x: DeviceMatrix, add: bool) -> Result<(), CudaError> {
        assert_eq!(x.columns, self.steps * STEP, "places of the order");
        match x.rows {
            0 => Ok(()),
            rows if rows <= FEW_ROWS && self.fits(rows) => self.multiply_few(out, x, add),
            rows if rows <= self.more_rows() => self.multiply_more(out, x, add),
            _ => self.multiply_many(out, x, add),
        }
    }

    fn arguments(&self, out: u64, x: DeviceMatrix, add: bool) -> Vec<Arg> {
        vec![
            out.into(),
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
        match self.gpu.capability {
            (9, 0) if !self.gpu.portable => 256,
            _ => 64,
        }
    }

    /// Whether all of x fits beside the sums of as many warps as a block may have.
    fn fits(&self, rows: usize) -> bool {
        few_shared(rows, self.steps, 2, MAX_WARPS) <= self.gpu.shared_memory
    }

    /// One zero, and a scale for each whole step.
    fn is_plain(&self) -> bool {
        self.granule * GRANULE == STEP && self.zeros.is_none()
    }

    fn multiply_few(&self, out: u64, x: DeviceMatrix, add: bool) -> Result<(), CudaError> {
        let tiles = match (self.bits, x.rows) {
            (4, rows) if rows > ONE_TILE_ROWS => 2,
            _ => 1,
        };
        let name = match (self.bits, tiles, self.is_plain()) {
            (4, 1, true) => "few_rows_4_1_PLAIN",
            (4, 1, false) => "few_rows_4_1_ANY",
            (4, _, true) => "few_rows_4_2_PLAIN",
            (4, _, false) => "few_rows_4_2_ANY",
            (_, _, true) => "few_rows_8_1_PLAIN",
            (_, _, false) => "few_rows_8_1_ANY",
        };
        // As many warps as all blocks on a multiprocessor have registers for.
        let room = match (tiles, self.is_plain()) {
            (1, true) if self.bits == 4 => 36,
            (1, true) => 28,
            (1, false) | (_, true) => 20,
            (_, false) => 16,
        };
        let blocks = self.outputs.div_ceil(TILE * tiles);
        let abreast = blocks.div_ceil(self.gpu.multiprocessors());
        let warps = (room / abreast).clamp(2, MAX_WARPS).min(self.steps.max(1));
        let shared = few_shared(x.rows, self.steps, tiles, warps);
        let args = self.arguments(out, x, add);
        let (grid, block) = ([blocks, 1, 1], [LANES * warps, 1, 1]);
        // SAFETY: out has rows x N elements, the caller vouches; x as many columns as positions.
        unsafe { (self.gpu).launch_behind(self.program(), name, grid, block, shared, &args) }
    }

    fn multiply_more(&self, out: u64, x: DeviceMatrix, add: bool) -> Result<(), CudaError> {
        let (eights, wide) = more_shape(self.bits, x.rows, self.gpu.shared_memory);
        let name = match (self.bits, eights, self.is_plain()) {
            (4, 2, true) => "more_rows_4_2_PLAIN",
            (4, 2, false) => "more_rows_4_2_ANY",
            (4, 4, true) => "more_rows_4_4_PLAIN",
            (4, 4, false) => "more_rows_4_4_ANY",
            (4, _, true) => "more_rows_4_8_PLAIN",
            (4, _, false) => "more_rows_4_8_ANY",
            (_, 2, true) => "more_rows_8_2_PLAIN",
            (_, 2, false) => "more_rows_8_2_ANY",
            (_, 4, true) => "more_rows_8_4_PLAIN",
            (_, 4, false) => "more_rows_8_4_ANY",
            (_, _, true) => "more_rows_8_8_PLAIN",
            (_, _, false) => "more_rows_8_8_ANY",
        };
        let blocks = self.outputs.div_ceil(4 * wide * TILE);
        let over = x.rows.div_ceil(8 * eights);
        // Blocks of a multiprocessor: with more, products in a row took longer.
        let abreast = if eights == 8 { 2 } else { 3 };
        let room = self.gpu.multiprocessors() * abreast / (blocks * over);
        let shares = room.clamp(1, (self.steps / SHARE_STEPS).clamp(1, MAX_SHARES));
        let sums = 4 * eights * 128 * wide; // of a block
        let parts = (self.gpu).scratch("shares", shares * blocks * over * sums * 4)?;
        let arrived = self.gpu.counters(blocks * over)?;
        let mut args = self.arguments(out, x, add);
        args.extend([Arg::from(parts.address()), Arg::from(arrived.address())]);
        let shared = more_shared(self.bits, eights, wide);
        let (grid, block) = ([blocks, over, shares], [128 * wide, 1, 1]);
        // SAFETY: as above; parts and counters for every block.
        unsafe { (self.gpu).launch_behind(self.program(), name, grid, block, shared, &args) }
    }

    fn multiply_many(&self, out: u64, x: DeviceMatrix, add: bool) -> Result<(), CudaError> {
        let stride = self.steps * STEP;
        let most = WIDENED_OUTPUTS.min(self.outputs.next_multiple_of(TILE));
        let place = self.gpu.scratch("widened", most * stride * 2)?;
        for first in (0..self.outputs).step_by(WIDENED_OUTPUTS) {
            let rows = WIDENED_OUTPUTS.min(self.outputs - first);
            let args = [
                place.address().into(),
                self.raw_from(first, rows).into(),
                self.bits.into(),
            ];
            let grid = [(2 * self.steps).div_ceil(8), rows.div_ceil(TILE), 1];
            // SAFETY: the place holds rows x stride elements.
            unsafe {
                let program = self.program();
                self.gpu
                    .launch(program, "widen_packed", grid, [256, 1, 1], 0, &args)?
            };
            let weight = DeviceMatrix {
                address: place.address(),
                rows,
                columns: stride,
                dtype: self.dtype,
            };
            let out = out + 2 * first as u64;
            self.gpu.project_beside(out, self.outputs, x, weight, add)?;
        }
        match &self.bias {
            None => Ok(()),
            Some(bias) => {
                let out = DeviceMatrix {
                    address: out,
                    rows: x.rows,
                    columns: self.outputs,
                    dtype: self.dtype,
                };
                self.gpu.add_bias(out, bias)
            }
        }
    }
}

/// Bytes of shared memory of a block of few rows: all of x, and the sums of its warps.
fn few_shared(rows: usize, steps: usize, tiles: usize, warps: usize) -> usize {
    rows * steps * STEP * 2 + warps * tiles * TILE * 8 * 4
}

/// The same of a block of more rows: steps of x, and of each warp's codes, scales and zeros.
fn more_shared(bits: i32, eights: usize, wide: usize) -> usize {
    let of_warp = bits as usize * LANES * 8 + 2 * 8 * 16;
    STAGES * (8 * eights * STEP * 2 + 4 * wide * of_warp)
}

/// Eights of rows of a block, and its warpgroups: the fewest that take all rows, or the most for
/// which there is shared memory.
fn more_shape(bits: i32, rows: usize, room: usize) -> (usize, usize) {
    let shapes = [(2, 1), (4, 2), (8, 2)];
    let fits = |&(eights, wide): &(usize, usize)| more_shared(bits, eights, wide) <= room;
    let takes_all = |&(eights, _): &(usize, usize)| rows <= 8 * eights;
    let last = shapes.into_iter().rev().find(fits).unwrap_or(shapes[0]);
    (shapes.into_iter().filter(fits).find(takes_all)).unwrap_or(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_take_all_rows_or_what_shared_memory_allows() {
        const HOPPER: usize = 227 << 10;
        const ADA: usize = 99 << 10;
        for bits in [4, 8] {
            for (rows, eights) in [(9, 2), (16, 2), (17, 4), (33, 8), (64, 8), (200, 8)] {
                assert_eq!(
                    more_shape(bits, rows, HOPPER).0,
                    eights,
                    "{bits} bits, {rows} rows"
                );
            }
            let (eights, wide) = more_shape(bits, 64, ADA);
            assert!(more_shared(bits, eights, wide) <= ADA && eights < 8);
        }
    }
}
