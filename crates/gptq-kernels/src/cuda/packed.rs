//! Packed weights on the GPU; their layout is described in `kernels/packed.cuh`, `multiply` has the
//! products.

use std::sync::Arc;

use gptq_types::{Bits, Dtype, SolvedLayer};

use super::Gpu;
use super::decoder::expect_consistent;
use super::error::CudaError;
use super::layout::{K_STEP, LANES, Laid, Positions, TILE};
use super::memory::Buffer;
use super::program::Program;
use super::text::RowOrder;
use super::view::DeviceMatrix;

/// Bytes of shared memory for rows that a block puts in order: two such blocks fit beside each other.
const ROWS_ROOM: usize = 48 << 10;

/// The kernels' own struct.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Packed {
    codes: u64,
    scales: u64,
    zeros: u64,
    zero: f32,
    outputs: i32,
    steps: i32,
    /// Two to this power times [`GRANULE`] positions share a scale.
    shift: i32,
}

/// A linear `[outputs, features]` of 4- or 8-bit codes on the GPU. Codes of 2 and 3 bits take the
/// place of 4-bit ones.
pub struct PackedLinear {
    pub(super) gpu: Arc<Gpu>,
    pub(super) features: usize,
    pub(super) outputs: usize,
    pub(super) dtype: Dtype,
    pub(super) bits: i32,
    pub(super) codes: Buffer,
    pub(super) scales: Buffer,
    pub(super) zeros: Option<Buffer>,
    pub(super) zero: f32,
    pub(super) steps: usize,
    pub(super) granule: usize,
    /// Channel at each position, -1 for padding; absent where x can be read as it is.
    pub(super) channels: Option<Buffer>,
    /// Position of each channel.
    pub(super) places: Option<Buffer>,
    pub(super) bias: Option<Buffer>,
}

impl PackedLinear {
    /// Lays codes out anew and uploads them, for activations of `dtype` (f16 or bf16).
    pub fn new(
        gpu: &Arc<Gpu>,
        layer: &SolvedLayer,
        bias: Option<&[f32]>,
        dtype: Dtype,
    ) -> Result<Self, CudaError> {
        Self::beside(gpu, &[layer], bias, dtype)
    }

    /// Whether these can be one linear whose outputs stand side by side: the same width of codes
    /// and the same `g_idx`, and no tile of outputs is shared.
    pub fn fit_beside(layers: &[&SolvedLayer]) -> bool {
        let Some((last, before)) = layers.split_last() else {
            return false;
        };
        before.iter().all(|layer| {
            layer.bits == last.bits
                && layer.g_idx == last.g_idx
                && layer.groups() == last.groups()
                && layer.out_features.is_multiple_of(TILE)
        })
    }

    /// The same for several that [fit](Self::fit_beside); `bias` has all their outputs.
    pub fn beside(
        gpu: &Arc<Gpu>,
        layers: &[&SolvedLayer],
        bias: Option<&[f32]>,
        dtype: Dtype,
    ) -> Result<Self, CudaError> {
        assert!(
            Self::fit_beside(layers),
            "linears that share their input's order"
        );
        layers.iter().for_each(|layer| expect_consistent(layer));
        let layer = layers[0];
        let k = layer.in_features;
        let n: usize = layers.iter().map(|layer| layer.out_features).sum();
        if let Some(bias) = bias {
            assert_eq!(bias.len(), n, "a bias for each output");
        }
        let positions = Positions::new(&layer.g_idx, layer.groups());
        let common = layer.zeros.first().copied().unwrap_or(0);
        let one_zero = (layers.iter()).all(|layer| layer.zeros.iter().all(|&zero| zero == common));
        let laid: Vec<Laid> = (layers.iter())
            .map(|layer| Laid::new(layer, &positions, one_zero, dtype))
            .collect();
        let join = |of: fn(&Laid) -> &[u32]| -> Result<Buffer, CudaError> {
            let buffer = Buffer::new(gpu, laid.iter().map(|laid| of(laid).len() * 4).sum())?;
            let mut at = buffer.address();
            for laid in &laid {
                gpu.to_device(at, of(laid))?;
                at += (of(laid).len() * 4) as u64;
            }
            Ok(buffer)
        };
        let (channels, places) = match positions.are_channels(k) {
            true => (None, None),
            false => (
                Some(Buffer::from_host(gpu, &positions.channels)?),
                Some(Buffer::from_host(gpu, &positions.places(k))?),
            ),
        };
        Ok(PackedLinear {
            gpu: gpu.clone(),
            features: k,
            outputs: n,
            dtype,
            bits: if layer.bits == Bits::Eight { 8 } else { 4 },
            codes: join(|laid| &laid.codes)?,
            scales: join(|laid| &laid.scales)?,
            zeros: match one_zero {
                true => None,
                false => Some(join(|laid| &laid.zeros)?),
            },
            zero: f32::from(common),
            steps: positions.channels.len() / K_STEP,
            granule: positions.granule,
            channels,
            places,
            bias: bias.map(|bias| Buffer::from_host(gpu, bias)).transpose()?,
        })
    }

    /// `K`.
    pub fn features(&self) -> usize {
        self.features
    }

    /// `N`.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Bytes of codes, scales and zeros on the GPU.
    pub fn bytes(&self) -> usize {
        let zeros = self.zeros.as_ref().map_or(0, Buffer::bytes);
        self.codes.bytes() + self.scales.bytes() + zeros
    }

    pub(super) fn raw(&self) -> Packed {
        Packed {
            codes: self.codes.address(),
            scales: self.scales.address(),
            zeros: self.zeros.as_ref().map_or(0, Buffer::address),
            zero: self.zero,
            outputs: self.outputs as i32,
            steps: self.steps as i32,
            shift: self.granule.ilog2() as i32,
        }
    }

    /// Outputs `first..first + rows` alone; `first` is a multiple of [`TILE`].
    pub(super) fn raw_from(&self, first: usize, rows: usize) -> Packed {
        let tiles = (first / TILE) as u64;
        let codes = (2 * self.steps * self.bits as usize * LANES * 4) as u64; // bytes of a tile
        let granules = (self.steps * 4 / self.granule * 8 * 4) as u64;
        let raw = self.raw();
        Packed {
            codes: raw.codes + tiles * codes,
            scales: raw.scales + tiles * granules,
            zeros: match raw.zeros {
                0 => 0,
                zeros => zeros + tiles * granules,
            },
            outputs: rows as i32,
            ..raw
        }
    }

    pub(super) fn program(&self) -> Program {
        Program::Packed {
            bf16: self.dtype == Dtype::BF16,
            bits: self.bits as u8,
        }
    }

    /// The order in which [`PackedLinear::multiply_ordered`] reads rows.
    pub fn order(&self) -> RowOrder<'_> {
        RowOrder {
            channels: self.channels.as_ref(),
            places: self.places.as_ref(),
            width: self.steps * K_STEP,
        }
    }

    /// `out [rows, N] = x [rows, K] W^T + bias`, or `out +=` that; sixteen-bit, summed in f32.
    pub fn multiply(&self, out: DeviceMatrix, x: DeviceMatrix, add: bool) -> Result<(), CudaError> {
        assert_eq!(x.contiguous().columns, self.features, "in_features");
        match (x.rows, &self.channels) {
            (0, _) => Ok(()),
            (_, None) => self.multiply_ordered(out, x, add),
            (rows, Some(channels)) => {
                let columns = self.steps * K_STEP;
                let place = self.gpu.scratch("gathered", rows * columns * 2)?;
                let there = place.matrix([rows, columns], x.dtype);
                self.arrange(there, x, channels)?;
                self.multiply_ordered(out, there, add)
            }
        }
    }

    /// Writes x with its columns where the codes of their channels are.
    fn arrange(
        &self,
        there: DeviceMatrix,
        x: DeviceMatrix,
        channels: &Buffer,
    ) -> Result<(), CudaError> {
        let stride = there.columns;
        // Every block of a row reads it whole; where there are many rows, a block takes several.
        let multiprocessors = self.gpu.multiprocessors();
        let pieces = stride / 8;
        let (blocks, threads) = match (multiprocessors / x.rows).min(pieces.div_ceil(256)) {
            0 | 1 => (
                1,
                pieces.div_ceil(pieces.div_ceil(1024)).next_multiple_of(32),
            ),
            blocks => (blocks, 256),
        };
        let row = 2 * self.features.next_multiple_of(8);
        let of_block = (x.rows / (2 * multiprocessors)).clamp(1, (ROWS_ROOM / row).clamp(1, 4));
        let args = [
            there.address.into(),
            x.address.into(),
            channels.into(),
            (self.features as i32).into(),
            (stride as i32).into(),
            (x.rows as i32).into(),
            (of_block as i32).into(),
        ];
        let grid = [x.rows.div_ceil(of_block), blocks, 1];
        let (program, shared) = (self.program(), of_block * row);
        // SAFETY: the place holds rows x stride elements, a channel for each of stride.
        unsafe {
            (self.gpu).launch_pdl(
                program,
                "gather_columns",
                grid,
                [threads, 1, 1],
                shared,
                &args,
            )
        }
    }
}
