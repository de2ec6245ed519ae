//! The speed of a GPU, measured in a few milliseconds: what forecasts are made with.

use std::sync::Arc;

use gptq_types::Dtype;

use super::Gpu;
use super::error::CudaError;
use super::memory::Buffer;

/// Rows, in_features and out_features of the product that is timed: a batch at a linear of a 7B model.
const PRODUCT: [usize; 3] = [8192, 4096, 4096];
/// The best of so many.
const TIMES: usize = 5;

/// Measured rates of a GPU.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DeviceSpeed {
    /// FLOP/s of products in f16 with f32 sums, on values other than zero: a clock that holds under load.
    pub products: f64,
    /// FLOP/s in f32.
    pub f32: f64,
    /// FLOP/s in f64.
    pub f64: f64,
    /// Bytes read and written in a second.
    pub bytes: f64,
}

impl Gpu {
    /// Times a product and a copy, and what [`Gpu::measure_rates`] does in f32 and f64. The peak of memory does not
    /// count it.
    pub fn measure_speed(self: &Arc<Self>) -> Result<DeviceSpeed, CudaError> {
        let (products, bytes) = self.measure_half()?;
        let [_, f32, f64] = self.measure_rates()?;
        self.synchronize()?;
        self.forget_peak()?;
        Ok(DeviceSpeed {
            products,
            f32,
            f64,
            bytes,
        })
    }

    /// The rate of products in f16, and of copies.
    fn measure_half(self: &Arc<Self>) -> Result<(f64, f64), CudaError> {
        let [rows, k, n] = PRODUCT;
        let matrix = |rows: usize, columns: usize| Buffer::new(self, 2 * rows * columns);
        let (x, weight, out) = (matrix(rows, k)?, matrix(n, k)?, matrix(rows, n)?);
        let values: Vec<f32> = (0..rows * k)
            .map(|at| (at * 7 % 1021) as f32 / 512.0 - 1.0)
            .collect();
        let x = x.matrix([rows, k], Dtype::F16);
        let weight = weight.matrix([n, k], Dtype::F16);
        let out = out.matrix([rows, n], Dtype::F16);
        self.upload(x, &values)?;
        self.upload(weight, &values[..n * k])?;
        let product = self.fastest(|| self.project(out, x, weight))?;
        let copy = self.fastest(|| self.copy(out, x))?;
        let flop = 2.0 * (rows * k * n) as f64;
        Ok((flop / product, (2 * x.bytes()) as f64 / copy))
    }

    /// Seconds of the fastest of some runs.
    fn fastest(&self, run: impl Fn() -> Result<(), CudaError>) -> Result<f64, CudaError> {
        let mut best = f64::INFINITY;
        for _ in 0..TIMES {
            let before = self.mark()?;
            run()?;
            best = best.min(before.seconds_to(&self.mark()?)?);
        }
        Ok(best)
    }
}
