//! The Cholesky factor of a Hessian, through cuSOLVER in f64.

use std::sync::Arc;

use cudarc::cusolver::sys as solver;

use super::Gpu;
use super::error::{CudaError, Named};
use super::memory::Buffer;
use super::program::Program;

/// Rows of the factor that are narrowed at a time.
const NARROW_ROWS: usize = 512;

/// Workspace of a cuSOLVER routine, to be kept until its result was read.
struct Workspace {
    device: Buffer,
    host: Vec<u8>,
    info: Buffer,
}

impl Workspace {
    fn new(gpu: &Arc<Gpu>, on_device: usize, on_host: usize) -> Result<Self, CudaError> {
        Ok(Workspace {
            device: Buffer::new(gpu, on_device)?,
            host: vec![0; on_host],
            info: Buffer::zeros(gpu, 4)?,
        })
    }

    /// LAPACK's `info`; waits for the routine.
    fn info(&self) -> Result<i32, CudaError> {
        Ok(self.info.to_host::<i32>(1)?[0])
    }
}

/// cuSOLVER counts by columns: its upper triangle is the lower one of a row-major matrix.
const UPPER: solver::cublasFillMode_t = solver::cublasFillMode_t::CUBLAS_FILL_MODE_UPPER;
const F64: solver::cudaDataType_t = solver::cudaDataType_t::CUDA_R_64F;

impl Gpu {
    /// `a = R^T R` in place, R in cuSOLVER's upper triangle.
    pub(super) fn cholesky(self: &Arc<Self>, a: &Buffer, k: usize) -> Result<(), CudaError> {
        let (mut on_device, mut on_host) = (0, 0);
        let pointer = a.address() as *mut std::ffi::c_void;
        let n = k as i64;
        // SAFETY: out parameters and a [k, k] matrix of f64.
        unsafe {
            solver::cusolverDnXpotrf_bufferSize(
                self.solver,
                self.solver_params,
                UPPER,
                n,
                F64,
                pointer,
                n,
                F64,
                &mut on_device,
                &mut on_host,
            )
        }
        .result()
        .named("sizing the Cholesky factorization")?;
        let mut space = Workspace::new(self, on_device, on_host)?;
        // SAFETY: as above, with workspaces of the sizes asked for, which live until the wait.
        unsafe {
            solver::cusolverDnXpotrf(
                self.solver,
                self.solver_params,
                UPPER,
                n,
                F64,
                pointer,
                n,
                F64,
                space.device.address() as *mut _,
                on_device,
                space.host.as_mut_ptr().cast(),
                on_host,
                space.info.address() as *mut _,
            )
        }
        .result()
        .named("Cholesky factorization")?;
        match space.info()? {
            0 => Ok(()),
            minor @ 1.. => Err(CudaError::NotPositive {
                row: k - minor as usize,
            }),
            _ => Err(CudaError::Invalid(
                "cuSOLVER refused an argument of potrf".into(),
            )),
        }
    }

    /// f32 of a `[k, k]` matrix of f64 in the first half of its own memory: the widest factor is
    /// the largest thing beside the activations, and a second one would set the peak. Rows go
    /// through a buffer of their own, since the front of the result overwrites rows already read.
    pub(super) fn narrowed(self: &Arc<Self>, a: Buffer, k: usize) -> Result<Buffer, CudaError> {
        let staging = Buffer::new(self, NARROW_ROWS.min(k) * k * 4)?;
        for first in (0..k).step_by(NARROW_ROWS) {
            let count = NARROW_ROWS.min(k - first) * k;
            let from = a.address() + (first * k * 8) as u64;
            let args = [(&staging).into(), from.into(), (count as i64).into()];
            // SAFETY: rows of a, and as many in the staging buffer.
            unsafe {
                self.launch(
                    Program::Hessian,
                    "f64_to_f32",
                    [count.div_ceil(256), 1, 1],
                    [256, 1, 1],
                    0,
                    &args,
                )?;
            }
            self.copy_bytes(
                a.address() + (first * k * 4) as u64,
                staging.address(),
                count * 4,
            )?;
        }
        Ok(a)
    }
}
