//! The GPTQ sweep of one linear on the GPU.

use std::sync::Arc;

use gptq_types::Dtype;

use super::Gpu;
use super::descent::DescentOrder;
use super::download::Download;
use super::error::CudaError;
use super::hessian::{DeviceFactor, DeviceHessian, DeviceOutputMismatch, expect_permutation};
use super::memory::Buffer;
use super::product::Precision;
use super::program::Program;
use super::view::DeviceMatrix;

/// Channels of one sweep, `B` in the paper; the kernel's shared memory is sized for it.
pub const SWEEP_CHANNELS: usize = 128;
const OUTPUTS: usize = 32;
const LANES: usize = 8;
/// Shared memory: a tile of weights and a tile of the factor, f32.
const SHARED: usize = (SWEEP_CHANNELS * OUTPUTS + SWEEP_CHANNELS * SWEEP_CHANNELS) * 4;

/// The rules by which kernels choose a grid: `GridRule` in `kernels/grid.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RawGridRule {
    /// Largest code.
    pub max_code: f32,
    /// Smallest zero point that the format can store.
    pub min_zero: f32,
    /// Smallest share of a group's range that the grid search tries.
    pub min_share: f32,
    /// Not 0: symmetric, the zero point is the middle code.
    pub sym: i32,
    /// Not 0: symmetric scales may be negative.
    pub full_range: i32,
    /// Shares of the range that are tried; 1: no search.
    pub shares: i32,
    /// Grids that are tried for each share: both signs of the scale, or zero points beside the computed one.
    pub variants: i32,
}

/// A step of the sweep, in rows of the reversed processing order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Fits the grid of one group from its rows `first..first + count` as they stand.
    Fit {
        /// The group.
        group: usize,
        /// Its first row.
        first: usize,
        /// Its rows.
        count: usize,
    },
    /// Rounds rows `last - 1` down to `first`, at most [`SWEEP_CHANNELS`], and passes their errors
    /// on to all rows before.
    Sweep {
        /// The row rounded last.
        first: usize,
        /// One past the row rounded first.
        last: usize,
        /// Whole groups lie inside, and are fitted as they begin.
        fit_inside: bool,
    },
}

/// Order and groups of a layer on the GPU, shared by the linears of a capture group.
pub struct SweepPlan {
    pub(super) features: usize,
    pub(super) groups: usize,
    /// Stored channel of each row.
    pub(super) channels: Buffer,
    /// Group of each row.
    group_of_row: Buffer,
    /// Group of each stored channel.
    pub(super) g_idx: Buffer,
    /// The same here.
    pub(super) group_of: Vec<u32>,
    /// The order of the coordinate descent after the sweep.
    pub(super) descent: DescentOrder,
    /// Rows sorted by group, and the start of each group: for grids that are fixed before the first row is
    /// rounded.
    fixed: Option<(Buffer, Buffer)>,
    steps: Vec<Step>,
}

impl SweepPlan {
    /// `channels[row]` and `group_of_row[row]` in reversed processing order; with `fixed_grids`
    /// all grids are fitted to the untouched weights.
    pub fn new(
        gpu: &Arc<Gpu>,
        channels: &[u32],
        group_of_row: &[u32],
        groups: usize,
        fixed_grids: bool,
        steps: Vec<Step>,
    ) -> Result<Self, CudaError> {
        let k = channels.len();
        expect_permutation(channels, k);
        assert_eq!(group_of_row.len(), k, "a group for each row");
        for step in &steps {
            let (rows, most) = match *step {
                Step::Fit { first, count, .. } => (first..first.saturating_add(count), k),
                Step::Sweep { first, last, .. } => (first..last, SWEEP_CHANNELS),
            };
            let inside = rows.start <= rows.end && rows.end <= k && rows.len() <= most;
            assert!(inside, "rows {rows:?} of {k} in a step");
        }
        let mut g_idx = vec![0u32; k];
        let mut members: Vec<Vec<u32>> = vec![Vec::new(); groups];
        for (row, (&channel, &group)) in channels.iter().zip(group_of_row).enumerate() {
            g_idx[channel as usize] = group;
            members[group as usize].push(row as u32);
        }
        let fixed = match fixed_grids {
            false => None,
            true => {
                let mut starts = vec![0u32];
                for rows in &members {
                    starts.push(starts.last().copied().unwrap_or(0) + rows.len() as u32);
                }
                let rows = members.concat();
                Some((
                    Buffer::from_host(gpu, &rows)?,
                    Buffer::from_host(gpu, &starts)?,
                ))
            }
        };
        Ok(SweepPlan {
            features: k,
            groups,
            channels: Buffer::from_host(gpu, channels)?,
            group_of_row: Buffer::from_host(gpu, group_of_row)?,
            g_idx: Buffer::from_host(gpu, &g_idx)?,
            descent: DescentOrder::new(gpu, &g_idx)?,
            group_of: g_idx,
            fixed,
            steps,
        })
    }
}

/// Codes and grids of a linear, on the GPU.
pub struct Swept {
    pub(super) codes: Buffer,
    pub(super) scales: Buffer,
    pub(super) zeros: Buffer,
    pub(super) features: usize,
    pub(super) groups: usize,
    pub(super) outputs: usize,
}

/// Codes and grids of a linear, on the host.
pub struct SweptHost {
    /// `[features, outputs]`, stored order.
    pub codes: Vec<u8>,
    /// `[groups, outputs]`, f16 values.
    pub scales: Vec<f32>,
    /// `[groups, outputs]`, whole numbers.
    pub zeros: Vec<f32>,
}

impl Swept {
    /// Starts to copy everything to the host, concurrently with the work that follows. Before the codes are
    /// dropped, [`SweptDownload::order_after`] must be called.
    pub fn start_download(&self) -> Result<SweptDownload, CudaError> {
        let grids = self.groups * self.outputs;
        let codes = self.features * self.outputs;
        let parts = [
            (&self.codes, codes),
            (&self.scales, grids * 4),
            (&self.zeros, grids * 4),
        ];
        Ok(match self.codes.gpu().start_download(&parts)? {
            Some(download) => SweptDownload::Pending(download),
            None => SweptDownload::Ready(SweptHost {
                codes: self.codes.to_host(codes)?,
                scales: self.scales.to_host(grids)?,
                zeros: self.zeros.to_host(grids)?,
            }),
        })
    }
}

/// Codes and grids that are on the host, or on their way there.
pub enum SweptDownload {
    /// The copies are done.
    Ready(SweptHost),
    /// The copies are queued.
    Pending(Download),
}

impl SweptDownload {
    /// Work queued from now on waits for the copies, so that what they read may be freed.
    pub fn order_after(&self, gpu: &Gpu) -> Result<(), CudaError> {
        match self {
            SweptDownload::Ready(_) => Ok(()),
            SweptDownload::Pending(download) => download.order_after(gpu),
        }
    }

    /// Waits for the copies; on any thread.
    pub fn receive(self) -> Result<SweptHost, CudaError> {
        match self {
            SweptDownload::Ready(swept) => Ok(swept),
            SweptDownload::Pending(download) => Ok(SweptHost {
                codes: download.values(0)?,
                scales: download.values(1)?,
                zeros: download.values(2)?,
            }),
        }
    }
}

fn program(weight: DeviceMatrix) -> Program {
    Program::Sweep {
        bf16: weight.dtype == Dtype::BF16,
    }
}

const BLOCK: [usize; 3] = [OUTPUTS, LANES, 1];

impl DeviceFactor {
    /// Rounds `weight [outputs, features]`, which is left as it is; with an aim what lies that share of
    /// the way to the weight of least error at the float model's outputs. What it rounds is left in
    /// `target`, f32 `[features, outputs]` in stored order, where a descent is to follow; in `latents`, of the
    /// same shape, where the codes are to be trained, what each weight had become when its turn came, which
    /// rounds to its code.
    pub fn sweep(
        &self,
        weight: DeviceMatrix,
        plan: &SweepPlan,
        rule: RawGridRule,
        aim: Option<(&DeviceOutputMismatch, f32)>,
        target: Option<&Buffer>,
        latents: Option<&Buffer>,
    ) -> Result<Swept, CudaError> {
        let (gpu, k, n) = (&self.gpu, self.features, weight.rows);
        assert_eq!(
            [weight.contiguous().columns, plan.features],
            [k; 2],
            "in_features"
        );
        for buffer in (target.into_iter())
            .chain(latents)
            .chain(aim.map(|(mismatch, _)| &mismatch.cross))
        {
            assert!(buffer.bytes() >= k * n * 4, "rows of the weight");
        }
        let w = gpu.scratch("weight", k * n * 4)?;
        gpu.gather_weight(w.address(), weight, &plan.channels)?;
        if let Some((output_mismatch, share)) = aim {
            self.aim(w.address(), weight, output_mismatch, share, plan)?;
        }
        if let Some(target) = target {
            plan.store_rows(gpu, target, &w, n)?;
        }
        let errors = gpu.scratch("errors", SWEEP_CHANNELS * n * 4)?;
        let swept = Swept {
            codes: Buffer::new(gpu, k * n)?,
            scales: Buffer::zeros(gpu, plan.groups * n * 4)?,
            zeros: Buffer::zeros(gpu, plan.groups * n * 4)?,
            features: k,
            groups: plan.groups,
            outputs: n,
        };
        let program = program(weight);
        let columns = n.div_ceil(OUTPUTS);
        let fit = |first: usize, count: usize, group: usize, groups: usize| {
            let (rows, starts) = match &plan.fixed {
                Some((rows, starts)) => (rows.address(), starts.address()),
                None => (0, 0),
            };
            let args = [
                (&swept.scales).into(),
                (&swept.zeros).into(),
                w.address().into(),
                (&self.importance).into(),
                rows.into(),
                starts.into(),
                (first as i32).into(),
                (count as i32).into(),
                (group as i32).into(),
                (n as i32).into(),
                rule.into(),
            ];
            // SAFETY: rows lie inside the weight, groups inside the grids.
            unsafe { gpu.launch(program, "fit_groups", [columns, groups, 1], BLOCK, 0, &args) }
        };
        if plan.fixed.is_some() {
            fit(0, 0, 0, plan.groups)?;
        }
        for &step in &plan.steps {
            match step {
                Step::Fit {
                    group,
                    first,
                    count,
                } => fit(first, count, group, 1)?,
                Step::Sweep {
                    first,
                    last,
                    fit_inside,
                } => {
                    let args = [
                        (&swept.codes).into(),
                        (&swept.scales).into(),
                        (&swept.zeros).into(),
                        errors.address().into(),
                        latents.map_or(0, Buffer::address).into(),
                        w.address().into(),
                        (&self.values).into(),
                        (&self.importance).into(),
                        (&plan.group_of_row).into(),
                        (&plan.channels).into(),
                        (k as i32).into(),
                        (n as i32).into(),
                        (first as i32).into(),
                        (last as i32).into(),
                        i32::from(fit_inside).into(),
                        rule.into(),
                    ];
                    // SAFETY: at most SWEEP_CHANNELS rows inside the weight; the plan's promise.
                    unsafe {
                        gpu.launch(program, "sweep", [columns, 1, 1], BLOCK, SHARED, &args)?;
                        let rows = self.values.address() + 4 * (first * k) as u64;
                        gpu.product_f32(
                            w.address(),
                            1.0,
                            -1.0,
                            rows,
                            k,
                            true,
                            errors.address(),
                            [first, last - first, n],
                            Precision::True,
                        )?;
                    }
                }
            }
        }
        Ok(swept)
    }

    /// `w += share (H + lambda I)^-1 G^T w` on rows in reversed processing order, where
    /// `(H + lambda I)^-1 = L^-T L^-1`. To about three digits of the correction, of which a share is
    /// arbitrary anyway: what they cost at the output is their square.
    fn aim(
        &self,
        w: u64,
        weight: DeviceMatrix,
        output_mismatch: &DeviceOutputMismatch,
        share: f32,
        plan: &SweepPlan,
    ) -> Result<(), CudaError> {
        let (gpu, k, n) = (&self.gpu, self.features, weight.rows);
        let ordered = gpu.scratch("carried, ordered", k * n * 4)?;
        let half = gpu.scratch("half of a correction", k * n * 4)?;
        let (ordered, half, l) = (ordered.address(), half.address(), self.values.address());
        let args = [
            ordered.into(),
            (&output_mismatch.cross).into(),
            (&plan.channels).into(),
            (n as i32).into(),
        ];
        let (grid, size) = ([n.div_ceil(256), k, 1], [k, k, n]);
        // SAFETY: all are [k, n], the factor [k, k]; channels hold every channel once.
        unsafe {
            gpu.launch(program(weight), "gather_rows", grid, [256, 1, 1], 0, &args)?;
            gpu.product_f32(half, 0.0, 1.0, l, k, false, ordered, size, Precision::Tf32)?;
            gpu.product_f32(w, 1.0, share, l, k, true, half, size, Precision::Tf32)
        }
    }
}

impl Gpu {
    /// `out = a - b`, sixteen-bit matrices of one shape.
    pub(super) fn subtract(
        &self,
        out: DeviceMatrix,
        a: DeviceMatrix,
        b: DeviceMatrix,
    ) -> Result<(), CudaError> {
        let shape = [out.rows, out.columns];
        a.contiguous().expect(shape, "rows of the first");
        b.contiguous().expect(shape, "rows of the second");
        let count = out.contiguous().elements();
        let args = [
            out.address.into(),
            a.address.into(),
            b.address.into(),
            (count as i64).into(),
        ];
        let grid = [count.div_ceil(256), 1, 1];
        // SAFETY: all three have as many elements.
        unsafe { self.launch(program(out), "subtract", grid, [256, 1, 1], 0, &args) }
    }

    /// A copy of a matrix at the start of a buffer, which the next call writes over.
    pub fn copied(self: &Arc<Self>, weight: DeviceMatrix) -> Result<Arc<Buffer>, CudaError> {
        let place = self.scratch("copied weight", weight.bytes())?;
        self.copy(
            place.matrix([weight.rows, weight.columns], weight.dtype),
            weight,
        )?;
        Ok(place)
    }

    fn gather_weight(
        &self,
        out: u64,
        weight: DeviceMatrix,
        channels: &Buffer,
    ) -> Result<(), CudaError> {
        let (n, k) = (weight.rows, weight.columns);
        let args = [
            out.into(),
            weight.address.into(),
            channels.into(),
            (k as i32).into(),
            (n as i32).into(),
        ];
        let grid = [k.div_ceil(32), n.div_ceil(32), 1];
        // SAFETY: out has [k, n] elements, channels every channel once.
        unsafe { self.launch(program(weight), "gather_weight", grid, [32, 8, 1], 0, &args) }
    }
}

/// The cost of rounding to nearest, in the measure of [`DeviceHessian::weighted_square`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cost {
    /// Error of rounding the weight to nearest, on min-max grids of its groups.
    pub rtn_error: f64,
    /// Norm of the weight itself.
    pub signal: f64,
}

impl DeviceHessian {
    /// Cost of rounding `weight [outputs, features]` to nearest, groups of `size` channels; and the
    /// output mismatch, if a float stream was seen.
    pub fn rounding_cost(
        &self,
        weight: DeviceMatrix,
        size: usize,
        rule: RawGridRule,
    ) -> Result<(Cost, Option<DeviceOutputMismatch>), CudaError> {
        let (n, k) = (weight.rows, weight.contiguous().columns);
        assert_eq!(k, self.features(), "in_features");
        let gpu = self.gpu();
        let stored: Vec<u32> = (0..k as u32).collect();
        let stored = Buffer::from_host(gpu, &stored)?;
        let w = gpu.scratch("weight", k * n * 4)?;
        gpu.gather_weight(w.address(), weight, &stored)?;
        let output_mismatch = self.output_mismatch(&w, n)?;
        let e = Buffer::new(gpu, k * n * 4)?;
        let args = [
            (&e).into(),
            w.address().into(),
            (k as i32).into(),
            (n as i32).into(),
            (size as i32).into(),
            rule.into(),
        ];
        let grid = [n.div_ceil(OUTPUTS), k.div_ceil(size), 1];
        // SAFETY: e and w are [k, n].
        unsafe { gpu.launch(program(weight), "rounding_error", grid, BLOCK, 0, &args)? };
        let rtn_error = self.weighted_square(&e, n, output_mismatch.as_ref())?;
        gpu.copy_bytes(e.address(), w.address(), k * n * 4)?;
        let signal = self.weighted_square(&e, n, output_mismatch.as_ref())?;
        Ok((Cost { rtn_error, signal }, output_mismatch))
    }

    /// Writes the rounded weight over `weight [outputs, features]` and returns what that changed, in the
    /// measure of [`DeviceHessian::weighted_square`].
    pub fn write_back(
        &self,
        weight: DeviceMatrix,
        swept: &Swept,
        plan: &SweepPlan,
        output_mismatch: Option<&DeviceOutputMismatch>,
    ) -> Result<f64, CudaError> {
        let (n, k) = (weight.rows, weight.contiguous().columns);
        assert_eq!(
            [n, k],
            [swept.outputs, swept.features],
            "the weight that was swept"
        );
        assert_eq!([k; 2], [self.features(), plan.features], "in_features");
        let gpu = self.gpu();
        let e = gpu.scratch("weight", k * n * 4)?;
        let args = [
            weight.address.into(),
            e.address().into(),
            (&swept.codes).into(),
            (&swept.scales).into(),
            (&swept.zeros).into(),
            (&plan.g_idx).into(),
            (k as i32).into(),
            (n as i32).into(),
        ];
        let grid = [k.div_ceil(32), n.div_ceil(32), 1];
        // SAFETY: codes and e are [k, n], the grids [groups, n], g_idx below groups.
        unsafe { gpu.launch(program(weight), "write_back", grid, [32, 8, 1], 0, &args)? };
        self.weighted_square(&e, n, output_mismatch)
    }
}
