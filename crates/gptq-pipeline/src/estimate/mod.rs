//! Forecasts of the time and memory of a run: a model of its work, and the measured speed of the machine.
//!
//! Time is the sum of what the phases of a record do, each at a constant part of the rate of products, copies or
//! launches; the constants and the runs that they are from stand in `time`. Memory is counted.

mod memory;
mod time;

use gptq_model::{GpuMemory, GpuRun, ModelSpec, Streams, TooLittleMemory, WindowRun};
use gptq_types::{ColumnOrder, Forecast, LossMeasure, Method, Permutation, QuantSpec};

/// Share of the tokens whose differences from the float stream are squared.
pub(crate) const SQUARED: f64 = 1.0 / 8.0;

/// Windows of a run, and tokens of a window, that GPU memory is counted for.
const MOST_COUNTED: usize = 1 << 20;

/// One step of training in so many is held out.
const HELD_OUT: usize = 8;

/// Measured rates of a GPU.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GpuSpeed {
    /// FLOP/s of products in f16.
    pub products: f64,
    /// FLOP/s in f32.
    pub f32: f64,
    /// FLOP/s in f64.
    pub f64: f64,
    /// Bytes that a copy reads and writes in a second.
    pub bytes: f64,
}

/// The machine that a forecast is for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Machine {
    /// The processor alone.
    Processor {
        /// FLOP/s of products in f32.
        products: f64,
    },
    /// A GPU.
    Gpu {
        /// Its speed.
        speed: GpuSpeed,
        /// Bytes of its memory that a run may take.
        memory: usize,
    },
}

/// A run as forecasts see it.
#[derive(Clone, Copy)]
pub(crate) struct Work<'a> {
    model: &'a ModelSpec,
    spec: &'a QuantSpec,
    windows: &'a [WindowRun],
}

/// What a run will take on a machine. Rounding to nearest runs on the processor.
///
/// # Errors
/// If it does not fit into the GPU memory that it may take.
pub fn forecast(
    model: &ModelSpec,
    spec: &QuantSpec,
    windows: &[WindowRun],
    machine: &Machine,
) -> Result<Forecast, TooLittleMemory> {
    let work = Work {
        model,
        spec,
        windows,
    };
    match *machine {
        Machine::Gpu { speed, memory } if spec.method == Method::Gptq => {
            let there = work.gpu_memory(memory)?;
            Ok(Forecast {
                seconds: time::on_gpu(&work, &speed, there.fetched_share),
                gpu_memory: Some(there.peak as u64),
                host_memory: memory::beside_gpu(&work, &there),
            })
        }
        Machine::Gpu { .. } => Ok(Forecast {
            seconds: time::rounding(&work),
            gpu_memory: None,
            host_memory: memory::on_processor(&work),
        }),
        Machine::Processor { products } => Ok(Forecast {
            seconds: time::on_processor(&work, products),
            gpu_memory: None,
            host_memory: memory::on_processor(&work),
        }),
    }
}

/// Refuses a run that does not fit into `memory` bytes of a GPU, whatever waits in host memory.
pub fn check_gpu_memory(
    model: &ModelSpec,
    spec: &QuantSpec,
    windows: &[WindowRun],
    memory: usize,
) -> Result<(), TooLittleMemory> {
    let work = Work {
        model,
        spec,
        windows,
    };
    match spec.method {
        Method::Gptq => work.gpu_memory(memory).map(drop),
        Method::Rtn => Ok(()),
    }
}

/// The windows that a permutation asks for.
pub fn windows_of(permutation: &Permutation) -> WindowRun {
    WindowRun {
        windows: permutation.calibration.samples,
        tokens: permutation.calibration.seq_len,
    }
}

/// Floating-point operations of a permutation.
pub(crate) fn flop(model: &ModelSpec, permutation: &Permutation) -> f64 {
    let windows = [windows_of(permutation)];
    let spec = &permutation.spec;
    time::flop(&Work {
        model,
        spec,
        windows: &windows,
    })
}

/// Bytes of host memory that a permutation takes without a GPU.
pub(crate) fn host_memory(model: &ModelSpec, permutation: &Permutation) -> u64 {
    let windows = [windows_of(permutation)];
    let spec = &permutation.spec;
    memory::on_processor(&Work {
        model,
        spec,
        windows: &windows,
    })
}

impl Work<'_> {
    fn gpu_memory(&self, memory: usize) -> Result<GpuMemory, TooLittleMemory> {
        // Beyond all memory, but countable.
        let windows: Vec<WindowRun> = (self.windows.iter())
            .map(|run| WindowRun {
                windows: run.windows.min(MOST_COUNTED),
                tokens: run.tokens.min(MOST_COUNTED),
            })
            .collect();
        let run = GpuRun {
            windows: &windows,
            streams: streams(self.spec),
            training: self.spec.trains().then_some(self.spec.group_size),
            more_hessians: hessians_held_out(self.spec),
        };
        GpuMemory::of(self.model, &run, memory)
    }

    fn aims(&self) -> bool {
        self.spec.measure() == LossMeasure::FloatOutputs
    }

    fn tokens(&self) -> f64 {
        self.windows
            .iter()
            .map(|run| run.windows as f64 * run.tokens as f64)
            .sum()
    }
}

/// The passes that a run needs.
pub(crate) fn streams(spec: &QuantSpec) -> Streams {
    match spec.measure() {
        LossMeasure::QuantizedInputs => Streams::One,
        LossMeasure::FloatOutputs => Streams::BesideFloat,
    }
}

/// Matrices as large as a Hessian that choosing column orders keeps.
pub(crate) fn hessians_held_out(spec: &QuantSpec) -> usize {
    match (spec.order == ColumnOrder::Auto, streams(spec)) {
        (false, _) => 0,
        (true, Streams::One) => 1,
        (true, Streams::BesideFloat) => 3,
    }
}

/// Share of the tokens that a float stream follows.
pub(crate) fn followed(spec: &QuantSpec) -> f64 {
    match spec.trains() {
        true => 1.0,
        false => 6.0 / 8.0,
    }
}

/// Forward passes of a block while its linears are solved, of both streams.
pub(crate) fn streamed_passes(spec: &QuantSpec) -> f64 {
    match streams(spec) {
        Streams::One => 1.0,
        Streams::BesideFloat => 1.0 + followed(spec),
    }
}

/// Of `steps` of training those that are held out of it: none where there is one.
pub(crate) fn held_out(steps: usize) -> usize {
    match steps {
        0 | 1 => 0,
        steps => steps.div_ceil(HELD_OUT),
    }
}

/// Passes over the tokens that training makes: with gradients, and without.
pub(crate) fn trained_passes(epochs: u32, steps: usize) -> [f64; 2] {
    if epochs == 0 {
        return [0.0; 2];
    }
    let share = |count: usize| count as f64 / steps.max(1) as f64;
    let (epochs, held_out) = (f64::from(epochs), held_out(steps));
    let measured = match held_out {
        0 => 1.0, // errors are those of the steps themselves
        held_out => share(held_out),
    };
    [epochs * share(steps - held_out), (epochs + 1.0) * measured]
}

#[cfg(test)]
mod tests;
