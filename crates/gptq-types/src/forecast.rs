//! What a run will take, before it begins.

use serde::{Deserialize, Serialize};

/// Time and memory of a quantization on a certain machine, about.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Forecast {
    /// Wall seconds of all blocks; reading texts and scoring the result are apart.
    pub seconds: f64,
    /// Most bytes of GPU memory at a time, as [`RunRecord::gpu_memory_peak`](crate::RunRecord::gpu_memory_peak);
    /// absent without a GPU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu_memory: Option<u64>,
    /// Most bytes of host memory at a time.
    pub host_memory: u64,
}
