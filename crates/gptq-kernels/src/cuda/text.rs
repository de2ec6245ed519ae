//! Norms and gates between the packed products of a pass, and the order of their rows; the kernels
//! are described in `kernels/text.cu`. Addresses are of sixteen-bit row-major matrices.

use gptq_types::{DeviceMatrix, Dtype};

use super::Gpu;
use super::error::CudaError;
use super::launch::Arg;
use super::memory::Buffer;
use super::program::Program;

/// Up to so many rows a gate is read where its place in the order says; a block takes a row beyond.
const FEW_GATES: usize = 4;
/// Of a grid's second dimension.
const MOST_ROWS: usize = 65_535;
/// Shared memory that every GPU has for a block that asks for it.
const SHARED: usize = 96 << 10;

pub(super) fn program(dtype: Dtype) -> Program {
    Program::Text {
        bf16: dtype == Dtype::BF16,
    }
}

/// The order in which a linear reads its input: rows of `width`, `channels[i]` at place `i`,
/// negative for zero; as it is where there are none.
#[derive(Clone, Copy)]
pub struct RowOrder<'a> {
    pub(super) channels: Option<&'a Buffer>,
    /// The inverse: where a channel stands.
    pub(super) places: Option<&'a Buffer>,
    /// Elements of a row.
    pub width: usize,
}

impl RowOrder<'_> {
    /// Rows of `width` in their natural order.
    pub fn natural(width: usize) -> Self {
        RowOrder {
            channels: None,
            places: None,
            width,
        }
    }
}

pub(super) fn address(buffer: Option<&Buffer>) -> Arg {
    buffer.map_or(0, Buffer::address).into()
}

/// Whether a thread takes eight elements at a time: rows begin at multiples of sixteen bytes.
pub(super) fn by_eights(widths: &[usize], addresses: &[u64]) -> bool {
    widths.iter().all(|width| width.is_multiple_of(8))
        && addresses.iter().all(|address| address.is_multiple_of(16))
}

/// Rows of one linear among those of others: `pitch` elements from row to row.
#[derive(Clone, Copy)]
pub struct Output {
    /// Of the first row.
    pub address: u64,
    /// Elements between rows.
    pub pitch: usize,
}

impl Gpu {
    /// Root-mean-square norm of rows `x`, written in `order`.
    pub fn norm_rows(
        &self,
        out: u64,
        order: RowOrder,
        x: DeviceMatrix,
        weight: &Buffer,
        eps: f32,
    ) -> Result<(), CudaError> {
        let args = [
            out.into(),
            x.address.into(),
            weight.into(),
            address(order.channels),
            (x.columns as i32).into(),
            (order.width as i32).into(),
            eps.into(),
        ];
        let (name, values) = match by_eights(&[x.columns, order.width], &[out, x.address]) {
            true => ("norm_rows_8", 8),
            false => ("norm_rows_1", 1),
        };
        let warps = x.columns.div_ceil(32 * values).min(32);
        let (grid, block, shared) = ([x.rows, 1, 1], [32 * warps, 1, 1], x.columns * 2);
        // SAFETY: out has rows of the order's width.
        unsafe { self.launch_behind(program(x.dtype), name, grid, block, shared, &args) }
    }

    /// `silu(gate) * up` of `count` rows of `columns`, written in `order`.
    pub fn gate_rows(
        &self,
        out: u64,
        order: RowOrder,
        [gate, up]: [Output; 2],
        [count, columns]: [usize; 2],
        dtype: Dtype,
    ) -> Result<(), CudaError> {
        assert_eq!(gate.pitch, up.pitch, "rows of both");
        let widths = [columns, gate.pitch, order.width];
        let eights = by_eights(&widths, &[out, gate.address, up.address]);
        let mut args: Vec<Arg> = vec![
            out.into(),
            gate.address.into(),
            up.address.into(),
            address(order.channels),
            (gate.pitch as i32).into(),
        ];
        let shared = 2 * columns;
        if order.channels.is_some() && count > FEW_GATES && shared <= SHARED {
            args.push((columns as i32).into());
            args.push((order.width as i32).into());
            let name = match eights {
                true => "gate_rows_in_order_8",
                false => "gate_rows_in_order_1",
            };
            let (grid, block) = ([count, 1, 1], [512, 1, 1]);
            // SAFETY: as below; a channel for each place of the order.
            return unsafe { self.launch_behind(program(dtype), name, grid, block, shared, &args) };
        }
        args.push((order.width as i32).into());
        let (name, values) = match eights {
            true => ("gate_rows_8", 8),
            false => ("gate_rows_1", 1),
        };
        let columns = order.width.div_ceil(128 * values);
        for first in (0..count).step_by(MOST_ROWS) {
            let from = |address: u64, pitch: usize| Arg::from(address + 2 * (first * pitch) as u64);
            args[0] = from(out, order.width);
            args[1] = from(gate.address, gate.pitch);
            args[2] = from(up.address, up.pitch);
            let grid = [columns, (count - first).min(MOST_ROWS), 1];
            // SAFETY: out has rows of the order's width; the caller vouches for both inputs.
            unsafe { self.launch_behind(program(dtype), name, grid, [128, 1, 1], 0, &args)? };
        }
        Ok(())
    }
}
