//! What is trained of a linear on the GPU: latents and scales, by straight-through rounding and Adam. The rules
//! are those of `crate::backward` ([`TrainedGrids`](crate::TrainedGrids), [`Adam`](crate::Adam),
//! [`nearest_latent`](crate::nearest_latent)); the kernels are described in `kernels/latents.cu`.

use std::sync::Arc;

use cudarc::cublas::sys::{
    cublasComputeType_t as Compute, cublasOperation_t as Op, cudaDataType_t as Type,
};
use gptq_types::{Bits, Dtype, SolvedLayer};
use half::f16;

use super::Gpu;
use super::decoder::expect_consistent;
use super::error::CudaError;
use super::launch::Arg;
use super::memory::Buffer;
use super::product::{Product, Side, half_type};
use super::program::Program;
use super::sweep::{SweepPlan, Swept};
use super::view::DeviceMatrix;
use crate::backward::{AdamStep, LearningRates, stored_scale};
use crate::descent_blocks::descent_blocks;
use crate::device_sizes::{GRADIENT_OUTPUTS as OUTPUTS, outputs_at_a_time};

/// The numbers of a step of Adam: `AdamStep` in `kernels/latents.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RawAdamStep {
    decays: [f32; 2],
    shares: [f32; 2],
    rate: f32,
    correction: f32,
    epsilon: f32,
}

impl RawAdamStep {
    /// Of step `step`, counted from 0.
    fn new(learning_rate: f64, step: usize) -> Self {
        let step = AdamStep::new(learning_rate, step as i32 + 1);
        RawAdamStep {
            decays: step.decays,
            shares: step.shares,
            rate: step.rate,
            correction: step.correction,
            epsilon: step.epsilon,
        }
    }
}

/// Adam's moments, as long as what they belong to.
struct Moments {
    latents: [Buffer; 2],
    scales: [Buffer; 2],
}

/// Latents and grids of a linear, on the GPU. Latents lie in stored order, input channel first, as codes do.
/// [`LatentShape`](crate::LatentShape) says how many bytes they take; moments and snapshot are there until
/// [`DeviceLatents::end_training`].
pub struct DeviceLatents {
    gpu: Arc<Gpu>,
    bits: Bits,
    features: usize,
    outputs: usize,
    groups: usize,
    latents: Buffer, // f32 [features, outputs]
    scales: Buffer,  // f32 [groups, outputs], as they are trained
    zeros: Buffer,   // f32 [groups, outputs]
    g_idx: Buffer,   // u32 [features]
    parts: Parts,
    /// The group of each channel, here.
    group_of: Vec<u32>,
    moments: Option<Moments>,
    /// Latents and scales as they were.
    snapshot: Option<[Buffer; 2]>,
}

/// Channels of a group, at most [`DESCENT_CHANNELS`](crate::DESCENT_CHANNELS), over which a thread sums the gradient of a scale.
struct Parts {
    count: usize,
    /// Stored channels, sorted by group.
    channels: Buffer,
    /// The first channel of each part in that order, and their number at the end.
    starts: Buffer,
    /// The group of each part.
    groups: Buffer,
    /// The first part of each group, and their number at the end.
    of_group: Buffer,
}

impl Parts {
    fn new(gpu: &Arc<Gpu>, g_idx: &[u32], groups: usize) -> Result<Self, CudaError> {
        let (channels, blocks) = descent_blocks(g_idx);
        let mut starts: Vec<u32> = blocks.iter().map(|part| part.range.start as u32).collect();
        starts.push(channels.len() as u32);
        let of_part: Vec<u32> = blocks.iter().map(|part| part.group as u32).collect();
        let before = |group: u32| of_part.partition_point(|&other| other < group) as u32;
        let of_group: Vec<u32> = (0..=groups as u32).map(before).collect();
        Ok(Parts {
            count: blocks.len(),
            channels: Buffer::from_host(gpu, &channels)?,
            starts: Buffer::from_host(gpu, &starts)?,
            groups: Buffer::from_host(gpu, &of_part)?,
            of_group: Buffer::from_host(gpu, &of_group)?,
        })
    }
}

fn program(dtype: Dtype) -> Program {
    Program::Latents {
        bf16: dtype == Dtype::BF16,
    }
}

impl DeviceLatents {
    /// Latents `[in_features, out_features]` from the host, on the grids of a layer whose codes are not read.
    ///
    /// # Panics
    /// If lengths do not agree.
    pub fn new(gpu: &Arc<Gpu>, layer: &SolvedLayer, latents: &[f32]) -> Result<Self, CudaError> {
        expect_consistent(layer);
        let (features, outputs, groups) = (layer.in_features, layer.out_features, layer.groups());
        assert_eq!(
            latents.len(),
            features * outputs,
            "a latent for each weight"
        );
        let scales: Vec<f32> = layer.scales.iter().map(|scale| scale.to_f32()).collect();
        let zeros: Vec<f32> = layer.zeros.iter().map(|&zero| f32::from(zero)).collect();
        Ok(DeviceLatents {
            gpu: gpu.clone(),
            bits: layer.bits,
            features,
            outputs,
            groups,
            latents: Buffer::from_host(gpu, latents)?,
            scales: Buffer::from_host(gpu, &scales)?,
            zeros: Buffer::from_host(gpu, &zeros)?,
            g_idx: Buffer::from_host(gpu, &layer.g_idx)?,
            parts: Parts::new(gpu, &layer.g_idx, groups)?,
            group_of: layer.g_idx.clone(),
            moments: None,
            snapshot: None,
        })
    }

    /// Of a linear that was swept: its grids, and the latents f32 `[features, outputs]` that the sweep left in
    /// stored order. They are moved to the codes, which a descent may have changed.
    ///
    /// # Panics
    /// If the plan or the latents are another linear's.
    pub fn from_swept(
        swept: &Swept,
        plan: &SweepPlan,
        latents: Buffer,
        bits: Bits,
    ) -> Result<Self, CudaError> {
        let (gpu, features, outputs) = (swept.codes.gpu(), swept.features, swept.outputs);
        let groups = swept.groups;
        assert_eq!([plan.features, plan.groups], [features, groups], "the plan");
        let elements = features * outputs;
        assert_eq!(latents.bytes(), 4 * elements, "a latent for each weight");
        let copied = |from: &Buffer| {
            let copy = Buffer::new(gpu, from.bytes())?;
            gpu.copy_bytes(copy.address(), from.address(), from.bytes())?;
            Ok::<_, CudaError>(copy)
        };
        let all = DeviceLatents {
            gpu: gpu.clone(),
            bits,
            features,
            outputs,
            groups,
            latents,
            scales: copied(&swept.scales)?,
            zeros: copied(&swept.zeros)?,
            g_idx: copied(&plan.g_idx)?,
            parts: Parts::new(gpu, &plan.group_of, groups)?,
            group_of: plan.group_of.clone(),
            moments: None,
            snapshot: None,
        };
        all.move_to_codes(&swept.codes)?;
        Ok(all)
    }

    /// Input channels.
    pub fn features(&self) -> usize {
        self.features
    }

    /// Outputs.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Quantization groups.
    pub fn groups(&self) -> usize {
        self.groups
    }

    /// Width of a code.
    pub fn bits(&self) -> Bits {
        self.bits
    }

    /// `weight [outputs, features] = (code - zero) stored_scale(scale)` of the latents, computed in f32 and
    /// rounded once to sixteen bits: what a reader makes of the layer.
    ///
    /// # Panics
    /// If the weight has another shape, gaps or elements of 32 bits.
    pub fn round_into(&self, weight: DeviceMatrix) -> Result<(), CudaError> {
        let (k, n) = (self.features, self.outputs);
        (weight.contiguous().half()).expect([n, k], "rows are outputs");
        let args = [
            weight.address.into(),
            (&self.latents).into(),
            (&self.scales).into(),
            (&self.zeros).into(),
            (&self.g_idx).into(),
            (k as i32).into(),
            (n as i32).into(),
            self.max_code(),
        ];
        let (grid, block) = ([n.div_ceil(64), k.div_ceil(64), 1], [256, 1, 1]);
        let program = program(weight.dtype);
        // SAFETY: latents and the weight have [k, n] elements, the grids [groups, n], g_idx is below groups.
        unsafe { (self.gpu).launch(program, "round_latents", grid, block, 0, &args) }
    }

    /// One step of Adam, number `step` counted from 0, against the gradients of latents and scales that those
    /// of the weight give (`TrainedGrids::backward`): `dW = sum of x^T dy` over `pairs` of the linear's inputs
    /// `x [rows, features]` and the gradients `dy [rows, outputs]` of its outputs, sixteen-bit factors, f32
    /// sums. Both may be columns of wider matrices. All sums have one order.
    ///
    /// # Panics
    /// If there are no pairs, or shapes or types do not agree.
    pub fn step(
        &mut self,
        pairs: &[(DeviceMatrix, DeviceMatrix)],
        rates: LearningRates,
        step: usize,
    ) -> Result<(), CudaError> {
        let (k, n, grids) = (self.features, self.outputs, self.groups * self.outputs);
        assert!(!pairs.is_empty(), "rows to learn from");
        for (x, dy) in pairs {
            x.half().expect([x.rows, k], "inputs of the linear");
            dy.like(*x).expect([x.rows, n], "gradients of its outputs");
        }
        if self.moments.is_none() {
            let zeros = |count: usize| Buffer::zeros(&self.gpu, 4 * count);
            self.moments = Some(Moments {
                latents: [zeros(k * n)?, zeros(k * n)?],
                scales: [zeros(grids)?, zeros(grids)?],
            });
        }
        let moments = self.moments.as_ref().expect("made above");
        let at_a_time = outputs_at_a_time(k, n);
        let gradient = self
            .gpu
            .scratch("gradient of a weight", 4 * k * at_a_time)?;
        let sums = (self.gpu).scratch("gradients of scales", 4 * self.parts.count * n)?;
        let program = program(pairs[0].0.dtype);
        let block = [OUTPUTS, 1, 1];
        for first in (0..n).step_by(at_a_time) {
            let columns = at_a_time.min(n - first);
            for (at, &(x, dy)) in pairs.iter().enumerate() {
                let dy = dy.column_range(first..first + columns);
                self.multiply(&gradient, x, dy, at > 0)?;
            }
            let args = [
                (&self.latents).into(),
                (&moments.latents[0]).into(),
                (&moments.latents[1]).into(),
                sums.address().into(),
                gradient.address().into(),
                (&self.scales).into(),
                (&self.zeros).into(),
                (&self.parts.channels).into(),
                (&self.parts.starts).into(),
                (&self.parts.groups).into(),
                (first as i32).into(),
                (columns as i32).into(),
                (n as i32).into(),
                self.max_code(),
                RawAdamStep::new(rates.latents, step).into(),
            ];
            let grid = [columns.div_ceil(OUTPUTS), self.parts.count, 1];
            // SAFETY: latents and moments are [k, n], the gradient [k, columns], the sums [parts, n]; parts hold
            // every channel once.
            unsafe { (self.gpu).launch(program, "train_latents", grid, block, 0, &args)? };
        }
        let args = [
            (&self.scales).into(),
            (&moments.scales[0]).into(),
            (&moments.scales[1]).into(),
            sums.address().into(),
            (&self.parts.of_group).into(),
            (n as i32).into(),
            RawAdamStep::new(rates.scales, step).into(),
        ];
        let grid = [n.div_ceil(OUTPUTS), self.groups, 1];
        // SAFETY: scales and moments are [groups, n], the sums [parts, n].
        unsafe { (self.gpu).launch(program, "train_scales", grid, block, 0, &args) }
    }

    /// `out [features, columns] = x^T dy`, or onto what is there.
    fn multiply(
        &self,
        out: &Buffer,
        x: DeviceMatrix,
        dy: DeviceMatrix,
        add: bool,
    ) -> Result<(), CudaError> {
        let side = |x: DeviceMatrix, op| Side {
            address: x.address,
            op,
            kind: half_type(x.dtype),
            ld: x.pitch,
            stride: 0,
        };
        let c = Side {
            address: out.address(),
            op: Op::CUBLAS_OP_N,
            kind: Type::CUDA_R_32F,
            ld: dy.columns,
            stride: 0,
        };
        // SAFETY: the matrices say their own sizes, and have as many rows; out has room for the product.
        unsafe {
            self.gpu.product(&Product {
                size: [dy.columns, x.columns, x.rows],
                alpha: 1.0,
                a: side(dy, Op::CUBLAS_OP_N),
                b: side(x, Op::CUBLAS_OP_T),
                beta: if add { 1.0 } else { 0.0 },
                c,
                batch: 1,
                compute: Compute::CUBLAS_COMPUTE_32F,
            })
        }
    }

    /// Moves each latent to the nearest number that rounds to its code, `codes` `[features, outputs]` in stored
    /// order, one byte each: [`nearest_latent`](crate::nearest_latent). So latents follow codes that were
    /// changed elsewhere. On a grid whose scale is infinite they stay.
    ///
    /// # Panics
    /// If there are other codes.
    pub fn move_to_codes(&self, codes: &Buffer) -> Result<(), CudaError> {
        let elements = self.features * self.outputs;
        assert_eq!(codes.bytes(), elements, "a code for each latent");
        let first = [(&self.latents).into(), codes.into()];
        self.each_latent("move_to_codes", first)
    }

    /// A kernel over latents and codes, in the order in which it takes them.
    fn each_latent(&self, name: &'static str, first: [Arg; 2]) -> Result<(), CudaError> {
        let rest = [
            (&self.scales).into(),
            (&self.zeros).into(),
            (&self.g_idx).into(),
            (self.outputs as i32).into(),
            self.max_code(),
        ];
        let args: Vec<Arg> = first.into_iter().chain(rest).collect();
        let (grid, block) = ([self.outputs.div_ceil(256), self.features, 1], [256, 1, 1]);
        // Knows no sixteen-bit floats: the program that is loaded.
        let bf16 = self.gpu.has(program(Dtype::BF16));
        let program = Program::Latents { bf16 };
        // SAFETY: latents and codes are [k, n], the grids [groups, n], g_idx is below groups.
        unsafe { self.gpu.launch(program, name, grid, block, 0, &args) }
    }

    fn max_code(&self) -> Arg {
        (self.bits.max_code() as f32).into()
    }

    /// The parameters that [`DeviceLatents::snapshot`] keeps.
    fn trained(&self) -> [&Buffer; 2] {
        [&self.latents, &self.scales]
    }

    /// Keeps latents and scales as they are now, in the place of those that were kept before.
    pub fn snapshot(&mut self) -> Result<(), CudaError> {
        let kept = match self.snapshot.take() {
            Some(kept) => kept,
            None => {
                let [latents, scales] = self.trained().map(Buffer::bytes);
                [
                    Buffer::new(&self.gpu, latents)?,
                    Buffer::new(&self.gpu, scales)?,
                ]
            }
        };
        for (to, from) in kept.iter().zip(self.trained()) {
            (self.gpu).copy_bytes(to.address(), from.address(), from.bytes())?;
        }
        self.snapshot = Some(kept);
        Ok(())
    }

    /// Puts back what was kept; the moments of Adam stay as they are.
    ///
    /// # Panics
    /// If nothing was kept.
    pub fn restore(&self) -> Result<(), CudaError> {
        let kept = self.snapshot.as_ref().expect("a snapshot to restore");
        for (to, from) in self.trained().into_iter().zip(kept) {
            (self.gpu).copy_bytes(to.address(), from.address(), from.bytes())?;
        }
        Ok(())
    }

    /// Frees the moments and the snapshot. A later step begins anew, as step 0.
    pub fn end_training(&mut self) {
        self.moments = None;
        self.snapshot = None;
    }

    /// The latents, `[features, outputs]`; waits for all work queued so far, as all that follow.
    pub fn latents(&self) -> Result<Vec<f32>, CudaError> {
        self.latents.to_host(self.features * self.outputs)
    }

    /// The scales as they are trained, `[groups, outputs]`.
    pub fn trained_scales(&self) -> Result<Vec<f32>, CudaError> {
        self.scales.to_host(self.groups * self.outputs)
    }

    /// The scales as a checkpoint stores them, `[groups, outputs]`: [`stored_scale`](crate::stored_scale). One
    /// that f16 cannot hold is infinite, or no number.
    pub fn scales(&self) -> Result<Vec<f16>, CudaError> {
        let stored = |scale: f32| f16::from_f32(stored_scale(scale));
        Ok(self.trained_scales()?.into_iter().map(stored).collect())
    }

    /// The codes of the latents, `[features, outputs]`.
    pub fn codes(&self) -> Result<Vec<u8>, CudaError> {
        let elements = self.features * self.outputs;
        let codes = Buffer::new(&self.gpu, elements)?;
        self.each_latent("latent_codes", [(&codes).into(), (&self.latents).into()])?;
        codes.to_host(elements)
    }

    /// Codes and grids. Scales that are not finite are the caller's to report.
    pub fn layer(&self) -> Result<SolvedLayer, CudaError> {
        let zeros: Vec<f32> = self.zeros.to_host(self.groups * self.outputs)?;
        Ok(SolvedLayer {
            bits: self.bits,
            in_features: self.features,
            out_features: self.outputs,
            codes: self.codes()?,
            scales: self.scales()?,
            zeros: zeros.iter().map(|&zero| zero as u16).collect(),
            g_idx: self.group_of.clone(),
        })
    }
}
