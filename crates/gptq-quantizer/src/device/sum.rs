//! The Hessian of a capture group on the GPU while tokens arrive.

use std::cell::RefCell;
use std::sync::Arc;
use std::time::Duration;

use gptq_kernels::cuda::{CudaError, DeviceHessian, DeviceMatrix, Gpu, Mark};
use gptq_kernels::{ActivationSink, Activations};
use gptq_types::{Phase, PhaseTimes};

use super::DeviceReady;
use crate::QuantizeError;
use crate::group::{GroupHessian, GroupSum, is_held_out};
use crate::hessian::check_finite;
use crate::mismatch::is_squared;

/// `H` on the GPU while tokens arrive.
pub struct DeviceSum {
    gpu: Arc<Gpu>,
    hessian: DeviceHessian,
    held_out: Option<DeviceHessian>,
    batches: usize,
    tokens: usize,
    tokens_held_out: usize,
    marks: Vec<(Mark, Mark)>,
    trouble: Option<CudaError>,
}

impl DeviceSum {
    /// For linears of `features` input channels.
    /// With `beside_float` it takes pairs of rows; with `holding_out` it holds some batches out for
    /// [`GroupHessian::choose`].
    pub fn new(
        gpu: &Arc<Gpu>,
        features: usize,
        beside_float: bool,
        holding_out: bool,
    ) -> Result<Self, QuantizeError> {
        let empty = || match beside_float {
            true => DeviceHessian::beside_float(gpu, features),
            false => DeviceHessian::new(gpu, features),
        };
        Ok(DeviceSum {
            gpu: gpu.clone(),
            hessian: empty()?,
            held_out: holding_out.then(empty).transpose()?,
            batches: 0,
            tokens: 0,
            tokens_held_out: 0,
            marks: Vec::new(),
            trouble: None,
        })
    }

    fn add(&mut self, x: Activations<'_>, float: Option<Activations<'_>>, tokens: usize) {
        let (Activations::Device(x), float) = (x, float) else {
            unreachable!("a decoder on the GPU shows rows that lie there");
        };
        if let Err(error) = self.add_timed(x, float, tokens) {
            self.trouble.get_or_insert(error);
        }
    }

    fn add_timed(
        &mut self,
        x: DeviceMatrix<'_>,
        float: Option<Activations<'_>>,
        tokens: usize,
    ) -> Result<(), CudaError> {
        let before = self.gpu.mark()?;
        // Counted over the whole pass, so that the same tokens are squared when none are held out.
        let squared = is_squared(self.tokens + self.tokens_held_out);
        let (hessian, seen) = match &mut self.held_out {
            Some(held_out) if is_held_out(self.batches) => (held_out, &mut self.tokens_held_out),
            _ => (&mut self.hessian, &mut self.tokens),
        };
        match float {
            Some(Activations::Device(float)) => hessian.add_pair(x, float, squared),
            _ => hessian.add(x),
        }?;
        *seen += tokens;
        self.batches += 1;
        self.marks.push((before, self.gpu.mark()?));
        Ok(())
    }
}

impl ActivationSink for DeviceSum {
    fn observe(&mut self, x: Activations<'_>, tokens: usize, _in_features: usize) {
        self.add(x, None, tokens);
    }

    fn observe_pair(
        &mut self,
        x: Activations<'_>,
        float: Activations<'_>,
        tokens: usize,
        _in_features: usize,
    ) {
        self.add(x, Some(float), tokens);
    }
}

impl GroupSum for DeviceSum {
    fn elapsed(&mut self) -> Result<Duration, QuantizeError> {
        let mut seconds = 0.0;
        for (before, after) in &self.marks {
            seconds += before.seconds_to(after)?;
        }
        Ok(Duration::from_secs_f64(seconds))
    }

    fn finish(
        mut self: Box<Self>,
        times: &mut PhaseTimes,
    ) -> Result<Box<dyn GroupHessian>, QuantizeError> {
        if let Some(error) = self.trouble.take() {
            return Err(error.into());
        }
        if self.tokens == 0 {
            return Err(QuantizeError::NoTokens);
        }
        let (tokens, more) = (self.tokens, self.tokens_held_out);
        let scale = |tokens: usize| 2.0 / tokens as f32;
        let diagonal = times.time(Phase::Hessian, || self.hessian.finish(scale(tokens)))?;
        check_finite(&diagonal)?;
        let held_out = match self.held_out {
            Some(mut hessian) if more > 0 => {
                check_finite(&times.time(Phase::Hessian, || hessian.finish(scale(more)))?)?;
                Some((hessian, more))
            }
            _ => None,
        };
        Ok(Box::new(DeviceReady {
            gpu: self.gpu,
            hessian: self.hessian,
            held_out,
            diagonal,
            tokens,
            last: RefCell::default(),
        }))
    }
}
