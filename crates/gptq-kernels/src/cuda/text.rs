//! What is computed element by element between the packed products of a pass, and the order of its rows;
//! the kernels are described in `kernels/rows.cuh`. Matrices are sixteen-bit; inputs may be columns of wider
//! ones.

use gptq_types::Dtype;

use super::Gpu;
use super::error::CudaError;
use super::launch::Arg;
use super::memory::Buffer;
use super::program::Program;
use super::view::DeviceMatrix;
use crate::Activation;

/// Up to so many rows a gate is read where its place in the order says; a block takes a row beyond.
const FEW_GATES: usize = 4;
/// Of a grid's second dimension.
const MOST_ROWS: usize = 65_535;
/// Shared memory that every GPU has for a block that asks for it.
const SHARED: usize = 96 << 10;

pub(super) fn program(dtype: Dtype) -> Program {
    Program::LlamaBlock {
        bf16: dtype == Dtype::BF16,
    }
}

/// What blocks beside Llama's have.
pub(super) fn others(dtype: Dtype) -> Program {
    Program::OtherBlocks {
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
    pub(super) width: usize, // of a row
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

    /// Elements of a row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Checks that it is one of rows of so many channels.
    pub(super) fn expect(&self, features: usize) {
        match (self.channels, self.places) {
            (Some(channels), Some(places)) => {
                assert_eq!(channels.bytes(), 4 * self.width, "channels of the order");
                assert_eq!(places.bytes(), 4 * features, "channels of the rows");
            }
            _ => assert_eq!(self.width, features, "channels of the rows"),
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

/// Kernels that take one element and eight at a time where a thread reads its input from far, and where a
/// block puts a whole row in order.
struct Names {
    direct: [&'static str; 2],
    gathered: [&'static str; 2],
}

macro_rules! names {
    ($name:literal) => {
        Names {
            direct: [concat!($name, "_1"), concat!($name, "_8")],
            gathered: [concat!($name, "_gathered_1"), concat!($name, "_gathered_8")],
        }
    };
}

impl Gpu {
    /// `activation(gate) * up`, written in `order`.
    pub fn gate_rows(
        &self,
        out: DeviceMatrix,
        order: RowOrder,
        [gate, up]: [DeviceMatrix; 2],
        activation: Activation,
    ) -> Result<(), CudaError> {
        let dtype = gate.dtype;
        let (program, names) = match activation {
            Activation::Silu => (program(dtype), names!("swiglu_rows")),
            Activation::GeluTanh => (others(dtype), names!("geglu_rows")),
        };
        self.write_rows(program, names, out, order, [gate, up])
    }

    /// `activation(x)`, written in `order`.
    pub fn activate_rows(
        &self,
        out: DeviceMatrix,
        order: RowOrder,
        x: DeviceMatrix,
        activation: Activation,
    ) -> Result<(), CudaError> {
        let names = match activation {
            Activation::Silu => names!("silu_rows"),
            Activation::GeluTanh => names!("gelu_rows"),
        };
        self.write_rows(others(x.dtype), names, out, order, [x, x])
    }

    /// Rows `x` as they are, written in `order`.
    pub fn gather_rows(
        &self,
        out: DeviceMatrix,
        order: RowOrder,
        x: DeviceMatrix,
    ) -> Result<(), CudaError> {
        self.write_rows(
            others(x.dtype),
            names!("gather_columns"),
            out,
            order,
            [x; 2],
        )
    }

    /// `gate = activation(gate) * up`.
    pub fn gate(
        &self,
        gate: DeviceMatrix,
        up: DeviceMatrix,
        activation: Activation,
    ) -> Result<(), CudaError> {
        let order = RowOrder::natural(gate.columns);
        self.gate_rows(gate, order, [gate, up], activation)
    }

    /// What a kernel makes of two inputs, or of the first one, element by element.
    fn write_rows(
        &self,
        program: Program,
        names: Names,
        out: DeviceMatrix,
        order: RowOrder,
        [x, y]: [DeviceMatrix; 2],
    ) -> Result<(), CudaError> {
        let (count, columns) = (x.rows, x.columns);
        y.like(x).expect([count, columns], "rows of both");
        out.contiguous()
            .like(x)
            .expect([count, order.width], "rows of the order");
        order.expect(columns);
        let out = out.address;
        let widths = [columns, x.pitch, y.pitch, order.width];
        let eights = by_eights(&widths, &[out, x.address, y.address]);
        let mut args: Vec<Arg> = vec![
            out.into(),
            x.address.into(),
            y.address.into(),
            address(order.channels),
            (x.pitch as i32).into(),
            (y.pitch as i32).into(),
        ];
        let shared = 2 * columns;
        if order.channels.is_some() && count > FEW_GATES && shared <= SHARED {
            args.push((columns as i32).into());
            args.push((order.width as i32).into());
            let name = names.gathered[usize::from(eights)];
            let (grid, block) = ([count, 1, 1], [512, 1, 1]);
            // SAFETY: as below; a channel for each place of the order.
            return unsafe { self.launch_pdl(program, name, grid, block, shared, &args) };
        }
        args.push((order.width as i32).into());
        let name = names.direct[usize::from(eights)];
        let values = if eights { 8 } else { 1 };
        let columns = order.width.div_ceil(128 * values);
        for first in (0..count).step_by(MOST_ROWS) {
            let from = |address: u64, pitch: usize| Arg::from(address + 2 * (first * pitch) as u64);
            args[0] = from(out, order.width);
            args[1] = from(x.address, x.pitch);
            args[2] = from(y.address, y.pitch);
            let grid = [columns, (count - first).min(MOST_ROWS), 1];
            // SAFETY: out has rows of the order's width; the order names channels of the inputs.
            unsafe { self.launch_pdl(program, name, grid, [128, 1, 1], 0, &args)? };
        }
        Ok(())
    }
}
