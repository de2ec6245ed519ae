//! Devices: which one, and one that was opened.

#[cfg(feature = "cuda")]
use std::sync::Arc;

#[cfg(feature = "cuda")]
use gptq_kernels::cuda::Gpu;

use crate::ModelError;

/// Where the forward pass runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    /// Burn's Flex backend, with the products of `gptq-kernels`, in f32.
    Cpu,
    /// Burn's CUDA backend, likewise, in the model's own sixteen-bit type.
    #[cfg(feature = "cuda")]
    Cuda {
        /// `N` of `cuda:N`.
        ordinal: usize,
        /// Bytes of GPU memory that the whole run may take; activations beyond it wait in host
        /// memory.
        memory: usize,
    },
}

/// A device that was opened. Decoders, solvers and runners are given it; clones share what it holds: its
/// stream, libraries and compiled kernels. One on a GPU stays on its thread.
#[derive(Clone)]
pub enum DeviceContext {
    /// The processor.
    Cpu,
    /// A GPU.
    #[cfg(feature = "cuda")]
    Cuda(CudaContext),
}

/// A GPU that was opened, and how much of its memory may be taken.
#[cfg(feature = "cuda")]
#[derive(Clone)]
pub struct CudaContext {
    gpu: Arc<Gpu>,
    memory: usize,
}

impl DeviceContext {
    /// Opens a device: about a second for a GPU.
    pub fn open(device: Device) -> Result<Self, ModelError> {
        match device {
            Device::Cpu => Ok(DeviceContext::Cpu),
            #[cfg(feature = "cuda")]
            Device::Cuda { ordinal, memory } => Ok(DeviceContext::Cuda(CudaContext {
                gpu: Gpu::open(ordinal)?,
                memory,
            })),
        }
    }

    /// Which device it is.
    pub fn device(&self) -> Device {
        match self {
            DeviceContext::Cpu => Device::Cpu,
            #[cfg(feature = "cuda")]
            DeviceContext::Cuda(cuda) => Device::Cuda {
                ordinal: cuda.gpu.ordinal(),
                memory: cuda.memory,
            },
        }
    }

    /// The same without a limit on its memory.
    pub fn whole(&self) -> Self {
        match self {
            DeviceContext::Cpu => DeviceContext::Cpu,
            #[cfg(feature = "cuda")]
            DeviceContext::Cuda(cuda) => DeviceContext::Cuda(CudaContext {
                memory: usize::MAX,
                ..cuda.clone()
            }),
        }
    }

    /// `cpu`, or the name of the GPU.
    pub fn name(&self) -> &str {
        match self {
            DeviceContext::Cpu => "cpu",
            #[cfg(feature = "cuda")]
            DeviceContext::Cuda(cuda) => cuda.gpu.name(),
        }
    }

    /// Most bytes of GPU memory that were ever allocated at a time.
    pub fn memory_peak(&self) -> Option<u64> {
        match self {
            DeviceContext::Cpu => None,
            #[cfg(feature = "cuda")]
            DeviceContext::Cuda(cuda) => Some(cuda.gpu.memory().ok()?.peak as u64),
        }
    }
}

#[cfg(feature = "cuda")]
impl CudaContext {
    /// The GPU.
    pub fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }

    /// Bytes that a run may take of its memory.
    pub fn memory(&self) -> usize {
        self.memory
    }
}
