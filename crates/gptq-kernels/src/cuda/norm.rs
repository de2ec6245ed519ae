//! Norms of rows, and what blocks add to their hidden states; the kernels are described in
//! `kernels/rows.cuh` and `kernels/other_blocks.cu`. Matrices are sixteen-bit.

use std::sync::Arc;

use super::Gpu;
use super::error::CudaError;
use super::launch::Arg;
use super::memory::Buffer;
use super::text::{RowOrder, address, by_eights, others, program};
use super::view::DeviceMatrix;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Root mean square (Zhang and Sennrich 2019).
    Rms,
    /// Mean and variance (Ba et al. 2016).
    Layer,
}

/// A norm of rows of `width` on the GPU.
pub struct DeviceNorm {
    pub(super) weight: Buffer, // f32 [width]
    bias: Option<Buffer>,      // f32 [width]
    kind: Kind,
    pub(super) eps: f32,
    width: usize,
}

impl DeviceNorm {
    /// Root-mean-square norm: `x / sqrt(mean(x^2) + eps)`, rounded to sixteen bits, times `weight`.
    pub fn rms(gpu: &Arc<Gpu>, weight: &[f32], eps: f32) -> Result<Self, CudaError> {
        Self::new(gpu, Kind::Rms, weight, None, eps)
    }

    /// Layer norm: `(x - mean(x)) / sqrt(var(x) + eps) * weight + bias`, rounded once.
    pub fn layer(
        gpu: &Arc<Gpu>,
        weight: &[f32],
        bias: Option<&[f32]>,
        eps: f32,
    ) -> Result<Self, CudaError> {
        if let Some(bias) = bias {
            assert_eq!(bias.len(), weight.len(), "a bias for each weight");
        }
        Self::new(gpu, Kind::Layer, weight, bias, eps)
    }

    fn new(
        gpu: &Arc<Gpu>,
        kind: Kind,
        weight: &[f32],
        bias: Option<&[f32]>,
        eps: f32,
    ) -> Result<Self, CudaError> {
        Ok(DeviceNorm {
            weight: Buffer::from_host(gpu, weight)?,
            bias: bias.map(|bias| Buffer::from_host(gpu, bias)).transpose()?,
            kind,
            eps,
            width: weight.len(),
        })
    }

    /// Elements of a row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// The weights and `eps` of a root-mean-square norm of rows of `width`.
    pub(super) fn root_mean_square(&self, width: usize) -> (&Buffer, f32) {
        assert_eq!(self.kind, Kind::Rms, "norms of heads");
        assert_eq!(self.width, width, "elements of a head");
        (&self.weight, self.eps)
    }

    /// The kernel's name among those for one and for eight elements at a time of either kind.
    pub(super) fn pick(&self, names: [[&'static str; 2]; 2], eights: bool) -> &'static str {
        names[usize::from(self.kind == Kind::Layer)][usize::from(eights)]
    }

    /// Threads of a block that takes a row.
    pub(super) fn block(&self, eights: bool) -> [usize; 3] {
        let values = if eights { 8 } else { 1 };
        [32 * self.width.div_ceil(32 * values).min(32), 1, 1]
    }

    /// Of a row that is kept in shared memory.
    fn bytes(&self) -> usize {
        2 * self.width
    }

    /// What every kernel takes first of a norm: weights, and a bias where there may be one.
    fn args(&self) -> impl Iterator<Item = Arg> {
        let bias = (self.kind == Kind::Layer).then(|| address(self.bias.as_ref()));
        std::iter::once((&self.weight).into()).chain(bias)
    }
}

impl Gpu {
    /// Rows `x [rows, norm.width()]` normed, written in `order`.
    pub fn norm_rows(
        &self,
        out: DeviceMatrix,
        order: RowOrder,
        x: DeviceMatrix,
        norm: &DeviceNorm,
    ) -> Result<(), CudaError> {
        assert_eq!(
            x.contiguous().half().columns,
            norm.width,
            "elements of a row"
        );
        order.expect(x.columns);
        out.contiguous()
            .like(x)
            .expect([x.rows, order.width], "rows of the order");
        let eights = by_eights(&[x.columns, order.width], &[out.address, x.address]);
        let mut args: Vec<Arg> = vec![out.address.into(), x.address.into()];
        args.extend(norm.args());
        args.push(address(order.channels));
        args.push((x.columns as i32).into());
        args.push((order.width as i32).into());
        args.push(norm.eps.into());
        let names = [
            ["rms_norm_rows_1", "rms_norm_rows_8"],
            ["layer_norm_rows_1", "layer_norm_rows_8"],
        ];
        let (name, grid) = (norm.pick(names, eights), [x.rows, 1, 1]);
        let (block, shared) = (norm.block(eights), norm.bytes());
        let program = match norm.kind {
            Kind::Rms => program(x.dtype),
            Kind::Layer => others(x.dtype),
        };
        // SAFETY: out has rows of the order's width.
        unsafe { self.launch_pdl(program, name, grid, block, shared, &args) }
    }

    /// The norm of runs of `norm.width()` columns of `x`, in their natural order.
    pub fn norm(
        &self,
        out: DeviceMatrix,
        x: DeviceMatrix,
        norm: &DeviceNorm,
    ) -> Result<(), CudaError> {
        let runs = [x.elements() / norm.width, norm.width];
        let order = RowOrder::natural(norm.width);
        self.norm_rows(out.reshaped(runs), order, x.reshaped(runs), norm)
    }

    /// Norms in place the runs of `norm.width()` columns of each row.
    pub fn norm_outputs(&self, x: DeviceMatrix, norm: &DeviceNorm) -> Result<(), CudaError> {
        let (rows, runs) = (x.half().rows, x.columns / norm.width);
        assert_eq!(runs * norm.width, x.columns, "whole runs");
        let eights = by_eights(&[norm.width, x.pitch], &[x.address]);
        let mut args: Vec<Arg> = vec![x.address.into()];
        args.extend(norm.args());
        args.push((x.pitch as i32).into());
        args.push((runs as i32).into());
        args.push((norm.width as i32).into());
        args.push(norm.eps.into());
        let names = [
            ["rms_norm_outputs_1", "rms_norm_outputs_8"],
            ["layer_norm_outputs_1", "layer_norm_outputs_8"],
        ];
        let (name, grid) = (norm.pick(names, eights), [rows * runs, 1, 1]);
        let (block, shared) = (norm.block(eights), norm.bytes());
        // SAFETY: the runs lie inside the rows.
        unsafe { self.launch_pdl(others(x.dtype), name, grid, block, shared, &args) }
    }

    /// `hidden += factor * norm(y)`; the norm, the product and the sum are each rounded.
    pub fn add_normed(
        &self,
        hidden: DeviceMatrix,
        y: DeviceMatrix,
        norm: &DeviceNorm,
        factor: f32,
    ) -> Result<(), CudaError> {
        let size = [y.rows, norm.width];
        hidden.contiguous().like(y).expect(size, "rows of both");
        y.contiguous().expect(size, "rows of both");
        let eights = by_eights(&[norm.width], &[hidden.address, y.address]);
        let mut args: Vec<Arg> = vec![hidden.address.into(), y.address.into()];
        args.extend(norm.args());
        args.push((norm.width as i32).into());
        args.push(norm.eps.into());
        args.push(factor.into());
        let names = [
            ["add_rms_normed_1", "add_rms_normed_8"],
            ["add_layer_normed_1", "add_layer_normed_8"],
        ];
        let (name, grid) = (norm.pick(names, eights), [hidden.rows, 1, 1]);
        let (block, shared) = (norm.block(eights), norm.bytes());
        // SAFETY: both have rows of the norm's width.
        unsafe { self.launch_pdl(others(hidden.dtype), name, grid, block, shared, &args) }
    }
}
