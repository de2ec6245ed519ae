//! Coordinate descent over the codes of one linear on the GPU.

use std::sync::Arc;

use super::Gpu;
use super::error::CudaError;
use super::hessian::{DeviceFactor, DeviceHessian, MEASURE};
use super::memory::Buffer;
use super::product::Precision;
use super::program::Program;
use super::sweep::{Rule, SWEEP_CHANNELS, SweepPlan, Swept};

/// Outputs and lanes of a block of threads.
const OUTPUTS: usize = 32;
const LANES: usize = 8;
/// A block of the Hessian and a tile of codes, f32; a column more, so that lanes find other banks.
const SHARED: usize = (SWEEP_CHANNELS * SWEEP_CHANNELS + SWEEP_CHANNELS * (OUTPUTS + 1)) * 4;

/// In which order channels are visited: group by group.
pub(super) struct Visits {
    /// Stored channels by group.
    channels: Buffer,
    blocks: Vec<Visit>,
}

/// A run of channels of one group.
#[derive(Debug, PartialEq)]
struct Visit {
    first: usize,
    count: usize,
    group: usize,
    is_whole: bool, // all of the group
}

impl Visits {
    /// For the group of each stored channel.
    pub fn new(gpu: &Arc<Gpu>, g_idx: &[u32]) -> Result<Self, CudaError> {
        let mut channels: Vec<u32> = (0..g_idx.len() as u32).collect();
        channels.sort_by_key(|&channel| g_idx[channel as usize]);
        let groups: Vec<u32> = (channels.iter())
            .map(|&channel| g_idx[channel as usize])
            .collect();
        Ok(Visits {
            channels: Buffer::from_host(gpu, &channels)?,
            blocks: visits(&groups),
        })
    }
}

/// Groups, given once for each channel and never falling, cut to what the kernel holds.
fn visits(groups: &[u32]) -> Vec<Visit> {
    let mut visits = Vec::new();
    let mut first = 0;
    for group in groups.chunk_by(|a, b| a == b) {
        for part in group.chunks(SWEEP_CHANNELS) {
            visits.push(Visit {
                first,
                count: part.len(),
                group: group[0] as usize,
                is_whole: part.len() == group.len(),
            });
            first += part.len();
        }
    }
    visits
}

impl DeviceHessian {
    /// Where the sweep of a linear of `outputs` outputs leaves the weight that it aims at, f32
    /// `[features, outputs]` in stored order: the space in which costs are measured, before the sweep
    /// and after the descent, so that it takes no memory of its own.
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
        rule: Rule,
        passes: u32,
    ) -> Result<(), CudaError> {
        let (gpu, k, n) = (self.gpu(), self.features(), swept.outputs);
        let rows = gpu.scratch("rows of the Hessian", SWEEP_CHANNELS * k * 4)?;
        let gradient = gpu.scratch("errors", SWEEP_CHANNELS * n * 4)?;
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
                "subtract_rounded",
                grid,
                [256, 1, 1],
                0,
                &args,
            )?;
        }
        for _ in 0..passes {
            for visit in &plan.visits.blocks {
                let channels = plan.visits.channels.address() + 4 * visit.first as u64;
                self.gather_damped(rows.address(), factor, channels, visit.count)?;
                let args = [
                    (&swept.codes).into(),
                    (&swept.scales).into(),
                    (&swept.zeros).into(),
                    target.into(),
                    gradient.address().into(),
                    rows.address().into(),
                    channels.into(),
                    (k as i32).into(),
                    (n as i32).into(),
                    (visit.count as i32).into(),
                    (visit.group as i32).into(),
                    i32::from(visit.is_whole).into(),
                    rule.max_code.into(),
                ];
                let (grid, block) = ([n.div_ceil(OUTPUTS), 1, 1], [LANES, OUTPUTS, 1]);
                // SAFETY: the rows of a visit are at most SWEEP_CHANNELS and lie inside the weight.
                unsafe {
                    gpu.product_f32(
                        gradient.address(),
                        0.0,
                        1.0,
                        rows.address(),
                        k,
                        false,
                        target.address(),
                        [visit.count, k, n],
                        Precision::Tf32,
                    )?;
                    gpu.launch(Program::Descent, "descend", grid, block, SHARED, &args)?;
                }
            }
        }
        Ok(())
    }

    /// Rows of the damped Hessian, f32 `[count, features]`.
    fn gather_damped(
        &self,
        out: u64,
        factor: &DeviceFactor,
        channels: u64,
        count: usize,
    ) -> Result<(), CudaError> {
        let k = self.features();
        let args = [
            out.into(),
            self.values().into(),
            (&factor.added).into(),
            channels.into(),
            (k as i32).into(),
        ];
        let grid = [k.div_ceil(256), count, 1];
        // SAFETY: out has [count, k] elements, channels are below k.
        unsafe {
            self.gpu().launch(
                Program::Descent,
                "gather_damped",
                grid,
                [256, 1, 1],
                0,
                &args,
            )
        }
    }
}

impl SweepPlan {
    /// Rows in reversed processing order, f32 `[features, n]`, put in stored order.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_groups_are_cut_and_their_scales_stay() {
        let visit = |first, count, group, is_whole| Visit {
            first,
            count,
            group,
            is_whole,
        };
        assert_eq!(
            visits(&[0, 0, 1, 2, 2]),
            [
                visit(0, 2, 0, true),
                visit(2, 1, 1, true),
                visit(3, 2, 2, true)
            ]
        );
        assert_eq!(
            visits(&[0; 300]),
            [
                visit(0, 128, 0, false),
                visit(128, 128, 0, false),
                visit(256, 44, 0, false)
            ]
        );
    }
}
