//! Coordinate descent over the codes of one linear on the GPU.

use std::sync::Arc;

use cudarc::cublas::sys::{
    cublasComputeType_t as Compute, cublasOperation_t as Op, cudaDataType_t as Type,
};

use super::Gpu;
use super::error::CudaError;
use super::hessian::{DeviceFactor, DeviceHessian, MEASURE};
use super::memory::Buffer;
use super::product::{Product, Side};
use super::program::Program;
use super::sweep::{RawGridRule, SweepPlan, Swept};
use crate::descent_blocks::{DESCENT_CHANNELS, DescentBlock, descent_blocks};

/// Outputs of a thread block, and lanes for each output.
const OUTPUTS: usize = 32;
const LANES: usize = 8;
/// Split-K of the product that computes the gradient.
const PARTS: usize = 4;
/// Shared memory: a block of the Hessian and a tile of codes, f32. A column of padding avoids bank conflicts.
const SHARED: usize = (DESCENT_CHANNELS * DESCENT_CHANNELS + DESCENT_CHANNELS * (OUTPUTS + 1)) * 4;

/// The order of the descent on the GPU: group by group.
pub(super) struct DescentOrder {
    /// Stored channels, sorted by group.
    channels: Buffer,
    blocks: Vec<DescentBlock>,
}

impl DescentOrder {
    /// `g_idx` is the group of each stored channel.
    pub fn new(gpu: &Arc<Gpu>, g_idx: &[u32]) -> Result<Self, CudaError> {
        let (channels, blocks) = descent_blocks(g_idx);
        Ok(DescentOrder {
            channels: Buffer::from_host(gpu, &channels)?,
            blocks,
        })
    }
}

impl DeviceHessian {
    /// The buffer where the sweep of a linear leaves the weight that it aims at, f32 `[features, outputs]` in
    /// stored order. It shares the memory in which costs are measured before the sweep and after the descent.
    pub fn target(&self, outputs: usize) -> Result<Arc<Buffer>, CudaError> {
        self.gpu().scratch(MEASURE, self.features() * outputs * 4)
    }

    /// Lowers `tr(E H E^T)`, with the damped Hessian and `E` the target minus the rounded weight, by
    /// `passes` over codes and scales. The target becomes `E`.
    ///
    /// The gradient `H E` of a block is made to about three digits. That is enough to find the better of
    /// two codes but where they are nearly equally good.
    pub fn descend(
        &self,
        factor: &DeviceFactor,
        swept: &Swept,
        plan: &SweepPlan,
        target: &Buffer,
        rule: RawGridRule,
        passes: u32,
    ) -> Result<(), CudaError> {
        let (gpu, k, n) = (self.gpu(), self.features(), swept.outputs);
        assert_eq!(
            [factor.features, swept.features, plan.features],
            [k; 3],
            "in_features"
        );
        assert!(target.bytes() >= k * n * 4, "rows of the target");
        let gradient = gpu.scratch("gradient", PARTS * DESCENT_CHANNELS * n * 4)?;
        let args = [
            target.into(),
            (&swept.codes).into(),
            (&swept.scales).into(),
            (&swept.zeros).into(),
            (&plan.g_idx).into(),
            (n as i32).into(),
        ];
        let grid = [n.div_ceil(256), k, 1];
        // SAFETY: target and codes are [k, n], the grids [groups, n], g_idx below groups.
        unsafe {
            gpu.launch(
                Program::Descent,
                "subtract_dequantized",
                grid,
                [256, 1, 1],
                0,
                &args,
            )?;
        }
        for _ in 0..passes {
            for block in &plan.descent.blocks {
                let channels = plan.descent.channels.address() + 4 * block.range.start as u64;
                let rows = self.rows(block, channels)?;
                let parts =
                    self.gradient(gradient.address(), rows, target, block.range.len(), n)?;
                let args = [
                    (&swept.codes).into(),
                    (&swept.scales).into(),
                    (&swept.zeros).into(),
                    target.into(),
                    gradient.address().into(),
                    (parts as i32).into(),
                    rows.into(),
                    (&factor.added).into(),
                    channels.into(),
                    (k as i32).into(),
                    (n as i32).into(),
                    (block.range.len() as i32).into(),
                    (block.group as i32).into(),
                    i32::from(block.is_whole).into(),
                    rule.max_code.into(),
                ];
                let (grid, threads) = ([n.div_ceil(OUTPUTS), 1, 1], [LANES, OUTPUTS, 1]);
                // SAFETY: the rows of a block are at most DESCENT_CHANNELS and lie inside the weight.
                unsafe {
                    gpu.launch(
                        Program::Descent,
                        "coordinate_descent",
                        grid,
                        threads,
                        SHARED,
                        &args,
                    )?
                };
            }
        }
        Ok(())
    }

    /// The address of the rows of H of a block, f32 `[count, features]`; gathered if they are scattered.
    fn rows(&self, block: &DescentBlock, channels: u64) -> Result<u64, CudaError> {
        let k = self.features();
        if let Some(channel) = block.channel {
            return Ok(self.values().address() + 4 * (channel * k) as u64);
        }
        let rows = self
            .gpu()
            .scratch("rows of the Hessian", DESCENT_CHANNELS * k * 4)?;
        let args = [
            rows.address().into(),
            self.values().into(),
            channels.into(),
            (k as i32).into(),
        ];
        let grid = [k.div_ceil(256), block.range.len(), 1];
        // SAFETY: there is room for DESCENT_CHANNELS rows, channels are below k.
        unsafe {
            (self.gpu()).launch(Program::Descent, "gather_rows", grid, [256, 1, 1], 0, &args)?;
        }
        Ok(rows.address())
    }

    /// `H E` of `count` rows of H, in parts `[parts, count, n]` over the columns of H: one product of so few
    /// rows would keep a quarter of the GPU busy (split-K).
    fn gradient(
        &self,
        out: u64,
        rows: u64,
        error: &Buffer,
        count: usize,
        n: usize,
    ) -> Result<usize, CudaError> {
        let k = self.features();
        let parts = if k.is_multiple_of(4 * PARTS) {
            PARTS
        } else {
            1
        };
        let side = |address, ld, stride| Side {
            address,
            op: Op::CUBLAS_OP_N,
            kind: Type::CUDA_R_32F,
            ld,
            stride,
        };
        let part = k / parts;
        // SAFETY: rows are [count, k], the error [k, n], and there is room for PARTS products. cuBLAS counts
        // by columns, so that the factors change places.
        unsafe {
            self.gpu().product(&Product {
                size: [n, count, part],
                alpha: 1.0,
                a: side(error.address(), n, part * n),
                b: side(rows, k, part),
                beta: 0.0,
                c: side(out, n, count * n),
                batch: parts,
                compute: Compute::CUBLAS_COMPUTE_32F_FAST_TF32,
            })?;
        }
        Ok(parts)
    }
}

impl SweepPlan {
    /// Scatters rows in reversed processing order, f32 `[features, n]`, to stored order.
    pub(super) fn store_rows(
        &self,
        gpu: &Gpu,
        out: &Buffer,
        rows: &Buffer,
        n: usize,
    ) -> Result<(), CudaError> {
        let args = [
            out.into(),
            rows.into(),
            (&self.channels).into(),
            (n as i32).into(),
        ];
        let grid = [n.div_ceil(256), self.features, 1];
        // SAFETY: both are [features, n]; channels hold every channel once.
        unsafe {
            gpu.launch(
                Program::Descent,
                "scatter_rows",
                grid,
                [256, 1, 1],
                0,
                &args,
            )
        }
    }
}
