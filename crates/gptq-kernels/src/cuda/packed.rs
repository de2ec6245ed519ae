//! Products with packed weights on the GPU; the layout is described in `kernels/packed.cu`.

use std::sync::Arc;

use gptq_types::{Bits, DeviceMatrix, Dtype, SolvedLayer};

use super::Gpu;
use super::error::CudaError;
use super::launch::Arg;
use super::layout::{GRANULE, LANES, Laid, Positions, STEP, TILE};
use super::memory::Buffer;
use super::program::Program;
use super::text::RowOrder;

/// Up to so many rows every warp reads x for itself.
const FEW_ROWS: usize = 16;
/// Up to so many rows codes go to the tensor cores as they are; from there on it is faster to widen
/// the weight once and to leave the product to cuBLAS.
const MORE_ROWS: usize = 64;
/// Outputs that are widened at a time: what they take is held beside the packed weights.
const WIDENED_OUTPUTS: usize = 12288;
/// Outputs of a block of more rows, and elements between rows of its x in shared memory, as in the
/// kernel.
const BLOCK_OUTPUTS: usize = 256;
const PITCH: usize = 160;
/// Steps of a share of the positions that are worth a block of their own, and shares at most.
const SHARE_STEPS: usize = 4;
const MAX_SHARES: usize = 8;

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
    gpu: Arc<Gpu>,
    features: usize,
    outputs: usize,
    dtype: Dtype,
    bits: i32,
    codes: Buffer,
    scales: Buffer,
    zeros: Option<Buffer>,
    zero: f32,
    steps: usize,
    granule: usize,
    /// Channel at each position, -1 for padding; absent where x can be read as it is.
    channels: Option<Buffer>,
    /// Position of each channel.
    places: Option<Buffer>,
    bias: Option<Buffer>,
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
        let layer = layers[0];
        let k = layer.in_features;
        let n = layers.iter().map(|layer| layer.out_features).sum();
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
            steps: positions.channels.len() / STEP,
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

    /// Bytes on the GPU.
    pub fn bytes(&self) -> usize {
        let zeros = self.zeros.as_ref().map_or(0, Buffer::bytes);
        self.codes.bytes() + self.scales.bytes() + zeros
    }

    fn raw(&self) -> Packed {
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
    fn raw_from(&self, first: usize, rows: usize) -> Packed {
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

    fn program(&self) -> Program {
        Program::Packed {
            bf16: self.dtype == Dtype::BF16,
        }
    }

    /// The order in which [`PackedLinear::multiply_ordered`] reads rows.
    pub fn order(&self) -> RowOrder<'_> {
        RowOrder {
            channels: self.channels.as_ref(),
            places: self.places.as_ref(),
            width: self.steps * STEP,
        }
    }

    /// `out [rows, N] = x [rows, K] W^T + bias`, or `out +=` that; sixteen-bit, summed in f32.
    pub fn multiply(&self, out: u64, x: DeviceMatrix, add: bool) -> Result<(), CudaError> {
        assert_eq!(x.columns, self.features, "in_features");
        let x = self.arranged(x)?;
        self.multiply_ordered(out, x, add)
    }

    /// The same with rows of x in the linear's own [order](PackedLinear::order), zero at padding.
    pub fn multiply_ordered(&self, out: u64, x: DeviceMatrix, add: bool) -> Result<(), CudaError> {
        assert_eq!(x.columns, self.steps * STEP, "places of the order");
        match x.rows {
            0 => Ok(()),
            rows if rows <= FEW_ROWS => self.multiply_few(out, x, add),
            rows if rows <= MORE_ROWS => self.multiply_more(out, x, add),
            _ => self.multiply_many(out, x, add),
        }
    }

    /// x with its columns where the codes of their channels are.
    fn arranged(&self, x: DeviceMatrix) -> Result<DeviceMatrix, CudaError> {
        let Some(channels) = &self.channels else {
            return Ok(x);
        };
        let stride = self.steps * STEP;
        let place = self.gpu.scratch("arranged", x.rows * stride * 2)?;
        let args = [
            place.address().into(),
            x.address.into(),
            channels.into(),
            (self.features as i32).into(),
            (stride as i32).into(),
        ];
        let grid = [stride.div_ceil(1024), x.rows, 1];
        // SAFETY: the place holds rows x stride elements, a channel for each of stride.
        unsafe {
            let program = self.program();
            self.gpu
                .launch_behind(program, "arrange", grid, [128, 1, 1], 0, &args)?
        };
        Ok(DeviceMatrix {
            address: place.address(),
            columns: stride,
            ..x
        })
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

    fn multiply_few(&self, out: u64, x: DeviceMatrix, add: bool) -> Result<(), CudaError> {
        let eights = x.rows.div_ceil(8);
        let name = match (self.bits, eights, self.granule * GRANULE == STEP) {
            (4, 1, true) => "few_rows_4_1_1_1",
            (4, 1, false) => "few_rows_4_1_1_4",
            (4, _, true) => "few_rows_4_2_2_1",
            (4, _, false) => "few_rows_4_2_2_4",
            (_, 1, true) => "few_rows_8_1_1_1",
            (_, 1, false) => "few_rows_8_1_1_4",
            (_, _, true) => "few_rows_8_2_2_1",
            (_, _, false) => "few_rows_8_2_2_4",
        };
        // Two tiles a warp halve what is read of x.
        let (tiles, busy, most) = match (eights, self.bits, self.granule * GRANULE == STEP) {
            (1, ..) => (1, 20, 16),
            (_, 4, true) => (2, 12, 12),
            _ => (2, 12, 8), // more would need more registers than there are
        };
        let blocks = self.outputs.div_ceil(TILE * tiles);
        let wanted = (self.gpu.multiprocessors() * busy / blocks).clamp(2, most);
        let share = self.steps.div_ceil(wanted).max(1);
        let warps = self.steps.div_ceil(share).max(1);
        let shared = warps * tiles * eights * 128 * 4;
        let mut args = self.arguments(out, x, add);
        args.push((share as i32).into());
        let (grid, block) = ([blocks, 1, 1], [LANES * warps, 1, 1]);
        // SAFETY: out has rows x N elements, the caller vouches; x as many columns as positions.
        unsafe { (self.gpu).launch_behind(self.program(), name, grid, block, shared, &args) }
    }

    fn multiply_more(&self, out: u64, x: DeviceMatrix, add: bool) -> Result<(), CudaError> {
        let eights = if x.rows <= 32 { 4 } else { 8 };
        let name = match (self.bits, eights) {
            (4, 4) => "more_rows_4_4",
            (4, _) => "more_rows_4_8",
            (_, 4) => "more_rows_8_4",
            (_, _) => "more_rows_8_8",
        };
        let stages = if self.bits == 4 { 4 } else { 3 };
        let blocks = self.outputs.div_ceil(BLOCK_OUTPUTS);
        let over = x.rows.div_ceil(8 * eights);
        let room = self.gpu.multiprocessors() / (blocks * over);
        let shares = room.clamp(1, (self.steps / SHARE_STEPS).clamp(1, MAX_SHARES));
        let parts = (self.gpu).scratch("shares", shares * blocks * over * eights * 4 * 512 * 4)?;
        let arrived = self.gpu.counters(blocks * over)?;
        let mut args = self.arguments(out, x, add);
        args.extend([Arg::from(parts.address()), Arg::from(arrived.address())]);
        let words = if self.bits == 4 { 1 } else { 2 };
        let stage = 8 * eights * PITCH * 2 + 16 * (16 * 2 * words * LANES + 2 * 16 * 2 * 8);
        let shared = (stages * stage).max(eights * 4 * 512 * 4);
        let (grid, block) = ([blocks, over, shares], [512, 1, 1]);
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
