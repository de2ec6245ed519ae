//! What tests of kernels share: a GPU if there is one, and numbers that are the same every time.

#[path = "../../../../tests/support/data.rs"]
mod data;

use std::sync::Arc;

use gptq_kernels::cuda::Gpu;

/// The first GPU; says that the test is skipped where there is none.
pub fn gpu() -> Option<Arc<Gpu>> {
    match Gpu::open(0) {
        Ok(gpu) => Some(gpu),
        Err(error) => {
            data::skipped(data::Cause::Machine, &format!("a GPU ({error})"));
            None
        }
    }
}

/// A linear congruential generator (Knuth's multiplier for 64 bits).
pub struct Random(pub u64);

impl Random {
    /// 31 bits.
    pub fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005);
        self.0 = self.0.wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as u32
    }

    /// From -1 to 1.
    pub fn uniform(&mut self) -> f32 {
        self.next() as f32 / (1u64 << 31) as f32 * 2.0 - 1.0
    }
}
