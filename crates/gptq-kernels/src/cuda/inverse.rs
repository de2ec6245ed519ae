//! The inverse of a lower triangle by doubling.
//!
//! With `L = [A 0; B C]` the inverse is `[A^-1 0; -C^-1 B A^-1, C^-1]`: tiles on the diagonal are
//! inverted first, then pairs of neighbours are joined into tiles of twice the size until one is
//! left. Nearly all of it is large products, where cuSOLVER's `trtri` spends most of its time in
//! small triangular ones: five times as long at 11008 rows.

use std::sync::Arc;

use cudarc::cublas::sys::{cublasDgemmStridedBatched, cublasOperation_t::CUBLAS_OP_N};

use super::Gpu;
use super::error::{CudaError, Named};
use super::memory::Buffer;
use super::program::Program;

/// Rows of a tile that one block of threads inverts; the kernel's own constant.
const TILE: usize = 32;

/// A row-major matrix of f64 inside a larger one, or a batch of them.
#[derive(Clone, Copy)]
struct Part {
    address: u64,
    /// Elements between rows.
    ld: usize,
    /// Elements between matrices of the batch.
    stride: usize,
}

impl Gpu {
    /// `a = a^-1` in place for a lower triangle `[k, k]`, f64 row-major, without zeros on its
    /// diagonal. What lies above it becomes zero.
    pub(super) fn invert_lower(self: &Arc<Self>, a: &Buffer, k: usize) -> Result<(), CudaError> {
        let args = [a.into(), (k as i32).into()];
        let over = |name, grid, block| {
            // SAFETY: a is [k, k].
            unsafe { self.launch(Program::Hessian, name, grid, [block, 1, 1], 0, &args) }
        };
        over("zero_above_diagonal", [k.div_ceil(256), k, 1], 256)?;
        over("invert_diagonal_tiles", [k.div_ceil(TILE), 1, 1], TILE)?;
        let mut side = TILE;
        while side < k {
            let whole = k / (2 * side);
            self.join(a, k, 0, side, side, whole)?;
            let first = whole * 2 * side;
            if k > first + side {
                self.join(a, k, first, side, k - first - side, 1)?;
            }
            side *= 2;
        }
        Ok(())
    }

    /// Joins `pairs` of inverted tiles of `upper` and `lower` rows that follow each other from row
    /// `first` on.
    fn join(
        self: &Arc<Self>,
        a: &Buffer,
        k: usize,
        first: usize,
        upper: usize,
        lower: usize,
        pairs: usize,
    ) -> Result<(), CudaError> {
        if pairs == 0 {
            return Ok(());
        }
        let part = |row: usize, column: usize| Part {
            address: a.address() + 8 * (row * k + column) as u64,
            ld: k,
            stride: (upper + lower) * (k + 1),
        };
        let second = first + upper;
        let between = Buffer::new(self, pairs * lower * upper * 8)?;
        let product = Part {
            address: between.address(),
            ld: upper,
            stride: lower * upper,
        };
        let corner = part(second, first);
        // SAFETY: the parts lie inside a, the product inside its buffer.
        unsafe {
            let size = [lower, upper, upper];
            self.product_f64(product, 1.0, corner, part(first, first), size, pairs)?;
            let size = [lower, lower, upper];
            self.product_f64(corner, -1.0, part(second, second), product, size, pairs)
        }
    }

    /// `c [m, n] = alpha a [m, k] b [k, n]`, row-major, `batch` times.
    ///
    /// # Safety
    /// The addresses hold matrices of these sizes.
    unsafe fn product_f64(
        &self,
        c: Part,
        alpha: f64,
        a: Part,
        b: Part,
        [m, k, n]: [usize; 3],
        batch: usize,
    ) -> Result<(), CudaError> {
        let beta = 0.0;
        // SAFETY: as the caller says; row-major factors in reverse order are column-major ones.
        unsafe {
            cublasDgemmStridedBatched(
                self.blas,
                CUBLAS_OP_N,
                CUBLAS_OP_N,
                n as i32,
                m as i32,
                k as i32,
                &alpha,
                b.address as *const f64,
                b.ld as i32,
                b.stride as i64,
                a.address as *const f64,
                a.ld as i32,
                a.stride as i64,
                &beta,
                c.address as *mut f64,
                c.ld as i32,
                c.stride as i64,
                batch as i32,
            )
        }
        .result()
        .named("matrix product")
    }
}
