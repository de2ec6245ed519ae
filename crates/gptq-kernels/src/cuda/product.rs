//! Matrix products through cuBLAS, on row-major matrices.

use std::sync::Arc;

use cudarc::cublas::result::{dgemm, gemm_ex, gemm_strided_batched_ex};
use cudarc::cublas::sys::{
    cublasComputeType_t as Compute, cublasGemmAlgo_t::CUBLAS_GEMM_DFALT, cublasOperation_t as Op,
    cudaDataType_t as Type,
};
use gptq_types::Dtype;

use super::Gpu;
use super::error::{CudaError, Named};
use super::memory::Buffer;
use super::view::DeviceMatrix;

/// Precision of products of f32 matrices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Precision {
    /// Every product and sum in f32.
    True,
    /// Factors rounded to 10 bits of mantissa, sums in f32: for measures, and where the better of two codes
    /// is sought; never for what the sweep passes on.
    Tf32,
}

/// One matrix of a column-major product: cuBLAS's view.
#[derive(Clone, Copy)]
pub(super) struct Side {
    pub address: u64,
    pub op: Op,
    pub kind: Type,
    /// Elements between columns.
    pub ld: usize,
    /// Elements between matrices of a batch.
    pub stride: usize,
}

/// `c [m, n] = alpha a b + beta c`, column-major, `batch` times.
pub(super) struct Product {
    pub size: [usize; 3],
    pub alpha: f32,
    pub a: Side,
    pub b: Side,
    pub beta: f32,
    pub c: Side,
    pub batch: usize,
    pub compute: Compute,
}

pub(super) fn half_type(dtype: Dtype) -> Type {
    match dtype {
        Dtype::BF16 => Type::CUDA_R_16BF,
        _ => Type::CUDA_R_16F,
    }
}

impl Gpu {
    /// Queues a product.
    ///
    /// # Safety
    /// The addresses hold matrices of the given sizes.
    pub(super) unsafe fn product(&self, p: &Product) -> Result<(), CudaError> {
        let [m, n, k] = p.size.map(|size| size as i32);
        if m == 0 || n == 0 || k == 0 {
            return Ok(());
        }
        let (alpha, beta) = ((&raw const p.alpha).cast(), (&raw const p.beta).cast());
        let (a, b, c) = (
            p.a.address as *const _,
            p.b.address as *const _,
            p.c.address as *mut _,
        );
        // SAFETY: as the caller says; alpha and beta outlive the call.
        unsafe {
            if p.batch == 1 {
                gemm_ex(
                    self.blas,
                    p.a.op,
                    p.b.op,
                    m,
                    n,
                    k,
                    alpha,
                    a,
                    p.a.kind,
                    p.a.ld as i32,
                    b,
                    p.b.kind,
                    p.b.ld as i32,
                    beta,
                    c,
                    p.c.kind,
                    p.c.ld as i32,
                    p.compute,
                    CUBLAS_GEMM_DFALT,
                )
            } else {
                gemm_strided_batched_ex(
                    self.blas,
                    p.a.op,
                    p.b.op,
                    m,
                    n,
                    k,
                    alpha,
                    a,
                    p.a.kind,
                    p.a.ld as i32,
                    p.a.stride as i64,
                    b,
                    p.b.kind,
                    p.b.ld as i32,
                    p.b.stride as i64,
                    beta,
                    c,
                    p.c.kind,
                    p.c.ld as i32,
                    p.c.stride as i64,
                    p.batch as i32,
                    p.compute,
                    CUBLAS_GEMM_DFALT,
                )
            }
        }
        .named("matrix product")
    }

    /// `out [T, N] = x [T, K] weight^T` with `weight [N, K]`, sixteen-bit, summed in f32; `out` is
    /// sixteen-bit or f32, and may be columns of a wider matrix.
    pub fn project(
        &self,
        out: DeviceMatrix,
        x: DeviceMatrix,
        weight: DeviceMatrix,
    ) -> Result<(), CudaError> {
        self.project_onto(out, x, weight, false)
    }

    /// The same, with `add` onto what is in `out`.
    pub fn project_onto(
        &self,
        out: DeviceMatrix,
        x: DeviceMatrix,
        weight: DeviceMatrix,
        add: bool,
    ) -> Result<(), CudaError> {
        let (x, weight) = (x.contiguous().like(weight), weight.contiguous());
        let is_wide = out.dtype == Dtype::F32;
        assert!(is_wide || out.dtype == x.dtype, "type of the product");
        assert_eq!(x.columns, weight.columns, "in_features");
        out.expect([x.rows, weight.rows], "rows of the product");
        let beta = if add { 1.0 } else { 0.0 };
        let (t, n, k) = (x.rows, weight.rows, x.columns);
        let kind = half_type(x.dtype);
        let side = |address, op, kind, ld| Side {
            address,
            op,
            kind,
            ld,
            stride: 0,
        };
        let out_kind = match out.dtype {
            Dtype::F32 => Type::CUDA_R_32F,
            _ => kind,
        };
        // SAFETY: the matrices say their own sizes, which fit.
        unsafe {
            self.product(&Product {
                size: [n, t, k],
                alpha: 1.0,
                a: side(weight.address, Op::CUBLAS_OP_T, kind, k),
                b: side(x.address, Op::CUBLAS_OP_N, kind, k),
                beta,
                c: side(out.address, Op::CUBLAS_OP_N, out_kind, out.pitch),
                batch: 1,
                compute: Compute::CUBLAS_COMPUTE_32F,
            })
        }
    }

    /// `out [m, n] = beta out + alpha a b` in f32 with `a [m, k]`, or its transpose stored with
    /// rows of `lda`, and `b [k, n]`.
    ///
    /// # Safety
    /// The addresses hold matrices of these sizes.
    #[allow(clippy::too_many_arguments)]
    pub(super) unsafe fn product_f32(
        &self,
        out: u64,
        beta: f32,
        alpha: f32,
        a: u64,
        lda: usize,
        transposed: bool,
        b: u64,
        [m, k, n]: [usize; 3],
        precision: Precision,
    ) -> Result<(), CudaError> {
        let side = |address, op, ld| Side {
            address,
            op,
            kind: Type::CUDA_R_32F,
            ld,
            stride: 0,
        };
        let op = if transposed {
            Op::CUBLAS_OP_T
        } else {
            Op::CUBLAS_OP_N
        };
        // SAFETY: as the caller says.
        unsafe {
            self.product(&Product {
                size: [n, m, k],
                alpha,
                a: side(b, Op::CUBLAS_OP_N, n),
                b: side(a, op, lda),
                beta,
                c: side(out, Op::CUBLAS_OP_N, n),
                batch: 1,
                compute: match precision {
                    Precision::True => Compute::CUBLAS_COMPUTE_32F,
                    Precision::Tf32 => Compute::CUBLAS_COMPUTE_32F_FAST_TF32,
                },
            })
        }
    }

    /// Rates of cuBLAS in FLOP/s: f16 with f32 sums, f32, f64. The best of three products each,
    /// on zeros: the clock stays higher than on data, so it is a ceiling.
    pub fn measure_rates(self: &Arc<Self>) -> Result<[f64; 3], CudaError> {
        let rate = |kind, compute, n: usize, bytes: usize| {
            let matrices = Buffer::zeros(self, 3 * n * n * bytes)?;
            let side = |index: usize| Side {
                address: matrices.address() + (index * n * n * bytes) as u64,
                op: Op::CUBLAS_OP_N,
                kind,
                ld: n,
                stride: 0,
            };
            let product = Product {
                size: [n, n, n],
                alpha: 1.0,
                a: side(0),
                b: side(1),
                beta: 0.0,
                c: side(2),
                batch: 1,
                compute,
            };
            let mut best = f64::INFINITY;
            for _ in 0..4 {
                let before = self.mark()?;
                // SAFETY: three n x n matrices lie in the buffer.
                unsafe { self.product(&product)? };
                best = best.min(before.seconds_to(&self.mark()?)?);
            }
            Ok::<_, CudaError>(2.0 * (n as f64).powi(3) / best)
        };
        Ok([
            rate(Type::CUDA_R_16F, Compute::CUBLAS_COMPUTE_32F, 8192, 2)?,
            rate(Type::CUDA_R_32F, Compute::CUBLAS_COMPUTE_32F, 4096, 4)?,
            self.measure_f64()?,
        ])
    }

    /// cuBLAS wants f64 factors for f64 sums, so this one product is called by its old name.
    fn measure_f64(self: &Arc<Self>) -> Result<f64, CudaError> {
        let n = 4096;
        let matrices = Buffer::zeros(self, 3 * n * n * 8)?;
        let at = |index: usize| (matrices.address() + (index * n * n * 8) as u64) as *mut f64;
        let (one, zero) = (1.0f64, 0.0f64);
        let mut best = f64::INFINITY;
        for _ in 0..4 {
            let before = self.mark()?;
            // SAFETY: three n x n matrices lie in the buffer; the scalars outlive the call.
            unsafe {
                dgemm(
                    self.blas,
                    Op::CUBLAS_OP_N,
                    Op::CUBLAS_OP_N,
                    n as i32,
                    n as i32,
                    n as i32,
                    &one,
                    at(0),
                    n as i32,
                    at(1),
                    n as i32,
                    &zero,
                    at(2),
                    n as i32,
                )
            }
            .named("matrix product")?;
            best = best.min(before.seconds_to(&self.mark()?)?);
        }
        Ok(2.0 * (n as f64).powi(3) / best)
    }
}
