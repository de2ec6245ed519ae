//! Errors of the GPU, its driver and its libraries.

use cudarc::cublas::result::CublasError;
use cudarc::cusolver::result::CusolverError;
use cudarc::driver::DriverError;

/// A GPU that is not there or a call that failed.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum CudaError {
    #[error("`{library}` is not on the loader path")]
    Library { library: &'static str },
    #[error("the CUDA driver finds no device {ordinal}: {found} there")]
    NoDevice { ordinal: usize, found: usize },
    #[error("{what}: {source}")]
    Driver {
        what: &'static str,
        source: DriverError,
    },
    #[error("{bytes} bytes of GPU memory could not be had, {free} are free")]
    Memory { bytes: usize, free: usize },
    #[error("cuBLAS, {what}: {source}")]
    Blas {
        what: &'static str,
        source: CublasError,
    },
    #[error("cuSOLVER, {what}: {source}")]
    Solver {
        what: &'static str,
        source: CusolverError,
    },
    #[error("NVRTC cannot compile `{file}` for {architecture}: {log}")]
    Compile {
        file: &'static str,
        architecture: String,
        log: String,
    },
    #[error("pivot {row} of the Cholesky factorization is not positive")]
    NotPositive { row: usize },
    #[error("{0}")]
    Invalid(String),
}

impl CudaError {
    /// Advice, apart from the cause.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            CudaError::Library { .. } => {
                Some("`gptq doctor` says what is missing; --device cpu works without")
            }
            CudaError::NoDevice { .. } => Some("--device cpu works without a GPU"),
            CudaError::Memory { .. } => {
                Some("a smaller --gpu-memory keeps more activations in host memory")
            }
            _ => None,
        }
    }
}

/// Names the call that failed.
pub(super) trait Named<T> {
    fn named(self, what: &'static str) -> Result<T, CudaError>;
}

impl<T> Named<T> for Result<T, DriverError> {
    fn named(self, what: &'static str) -> Result<T, CudaError> {
        self.map_err(|source| CudaError::Driver { what, source })
    }
}

impl<T> Named<T> for Result<T, CublasError> {
    fn named(self, what: &'static str) -> Result<T, CudaError> {
        self.map_err(|source| CudaError::Blas { what, source })
    }
}

impl<T> Named<T> for Result<T, CusolverError> {
    fn named(self, what: &'static str) -> Result<T, CudaError> {
        self.map_err(|source| CudaError::Solver { what, source })
    }
}
