//! Latents and scales of a linear on the GPU.

use std::ops::Range;
use std::sync::Arc;

use gptq_kernels::cuda::{Buffer, CudaError, DeviceLatents, DeviceMatrix, Gpu};
use gptq_kernels::{Activations, LearningRates, Weight};
use gptq_types::SolvedLayer;

use super::there;
use crate::QuantizeError;
use crate::trained::{TrainedLinear, finite};

/// [`TrainedLinear`] on the GPU. A step is taken as soon as all outputs were shown: the gradients of all linears
/// share one working space, so that of the next one takes its place.
pub(super) struct DeviceTrained {
    gpu: Arc<Gpu>,
    latents: DeviceLatents,
    rates: Option<LearningRates>, // while a step is open
    /// Gradients at some of the outputs, in the columns of all.
    parts: Option<(Buffer, usize)>,
    steps: usize,
    trouble: Option<CudaError>,
}

impl DeviceTrained {
    pub fn new(gpu: &Arc<Gpu>, latents: DeviceLatents) -> Self {
        DeviceTrained {
            gpu: gpu.clone(),
            latents,
            rates: None,
            parts: None,
            steps: 0,
            trouble: None,
        }
    }

    fn show(
        &mut self,
        outputs: Range<usize>,
        x: DeviceMatrix,
        dy: DeviceMatrix,
    ) -> Result<(), CudaError> {
        let n = self.latents.outputs();
        if outputs.len() == n {
            return self.step(x, dy);
        }
        let (buffer, shown) = match self.parts.take() {
            Some(parts) => parts,
            None => (Buffer::new(&self.gpu, 2 * x.rows() * n)?, 0),
        };
        let all = buffer.matrix([x.rows(), n], dy.dtype());
        self.gpu
            .place_columns(all.column_range(outputs.clone()), dy)?;
        let shown = shown + outputs.len();
        match shown == n {
            true => self.step(x, all),
            false => {
                self.parts = Some((buffer, shown));
                Ok(())
            }
        }
    }

    fn step(&mut self, x: DeviceMatrix, dy: DeviceMatrix) -> Result<(), CudaError> {
        let rates = self.rates.take();
        let rates = rates.expect("each row is shown each output once within a step");
        self.latents.step(&[(x, dy)], rates, self.steps)?;
        self.steps += 1;
        Ok(())
    }
}

impl TrainedLinear for DeviceTrained {
    fn scales(&self) -> Result<Vec<f32>, QuantizeError> {
        Ok(self.latents.trained_scales()?)
    }

    fn rounded(&self, weight: &Weight<'_>) -> Result<Option<Vec<f32>>, QuantizeError> {
        self.latents.round_into(there(weight))?;
        Ok(None)
    }

    fn begin_step(&mut self, rates: LearningRates) {
        self.rates = Some(rates);
    }

    fn gradient(
        &mut self,
        outputs: Range<usize>,
        x: Activations<'_>,
        dy: Activations<'_>,
        _: usize,
    ) {
        let (Activations::Device(x), Activations::Device(dy)) = (x, dy) else {
            unreachable!("a decoder on the GPU shows rows that lie there");
        };
        if let Err(error) = self.show(outputs, x, dy) {
            self.trouble.get_or_insert(error);
        }
    }

    fn end_step(&mut self) -> Result<(), QuantizeError> {
        match self.trouble.take() {
            Some(error) => Err(error.into()),
            None => {
                assert!(self.rates.is_none(), "all outputs were shown");
                Ok(())
            }
        }
    }

    fn keep(&mut self) -> Result<(), QuantizeError> {
        Ok(self.latents.snapshot()?)
    }

    fn restore(&mut self) -> Result<(), QuantizeError> {
        Ok(self.latents.restore()?)
    }

    fn finish(mut self: Box<Self>) -> Result<SolvedLayer, QuantizeError> {
        self.latents.end_training();
        finite(self.latents.layer()?)
    }
}
