//! `H = 2/n X^T X` on the GPU and its factor.

use std::sync::Arc;

use cudarc::cublas::sys::{
    cublasComputeType_t as Compute, cublasOperation_t as Op, cudaDataType_t as Type,
};

use super::Gpu;
use super::error::CudaError;
use super::memory::Buffer;
use super::product::{Precision, Product, Side, half_type};
use super::program::Program;
use super::view::DeviceMatrix;

/// Tiles a side of the sum: only those on and below the diagonal are computed, 5/8 of the work.
const TILES: usize = 4;
/// Rows that a block of threads sums, so that narrow matrices keep the GPU busy too.
const DOT_ROWS: usize = 512;
/// Working space of the measures of a weight, f32 `[features, outputs]`.
pub(super) const MEASURE: &str = "measure";

/// A running `X^T X`, then `H`, f32 `[features, features]`.
pub struct DeviceHessian {
    gpu: Arc<Gpu>,
    features: usize,
    values: Buffer,
    mismatch: Option<DeviceMismatch>,
}

/// The mismatch between quantized and float inputs: with `D = X - X~` the sums `D X~^T` and `D D^T`, f32
/// `[features, features]`.
struct DeviceMismatch {
    cross: Buffer,
    square: Buffer,
    /// Rows in each.
    crossed: usize,
    squared: usize,
}

/// The effect of the input mismatch on the outputs of one weight.
pub struct DeviceOutputMismatch {
    /// `G^T w`, f32 `[features, outputs]` in stored order.
    pub(super) cross: Buffer,
    /// `tr(w^T F w)`.
    square: f64,
}

/// `L^-1` with `J H J = L L^T`, f32 row-major `[features, features]`, lower triangular: the
/// solver's `U` with rows and columns in reversed processing order.
pub struct DeviceFactor {
    pub(super) gpu: Arc<Gpu>,
    pub(super) features: usize,
    pub(super) values: Buffer,
    /// Weight of each row's squared error in the grid search.
    pub(super) importance: Buffer,
    /// The damping added to the diagonal, f64 `[features]` in stored order.
    pub(super) added: Buffer,
}

impl DeviceFactor {
    /// A factor from elsewhere: `values` row-major `[features, features]`, as the fields say.
    pub fn from_host(
        gpu: &Arc<Gpu>,
        values: &[f32],
        importance: &[f32],
    ) -> Result<Self, CudaError> {
        let features = importance.len();
        assert_eq!(values.len(), features * features, "values of the factor");
        Ok(DeviceFactor {
            gpu: gpu.clone(),
            features,
            values: Buffer::from_host(gpu, values)?,
            importance: Buffer::from_host(gpu, importance)?,
            added: Buffer::zeros(gpu, features * 8)?,
        })
    }
}

impl DeviceHessian {
    /// All zero.
    pub fn new(gpu: &Arc<Gpu>, features: usize) -> Result<Self, CudaError> {
        Ok(DeviceHessian {
            gpu: gpu.clone(),
            features,
            values: Buffer::zeros(gpu, features * features * 4)?,
            mismatch: None,
        })
    }

    /// The same, to which pairs of rows can be added.
    pub fn beside_float(gpu: &Arc<Gpu>, features: usize) -> Result<Self, CudaError> {
        let sum = || Buffer::zeros(gpu, features * features * 4);
        Ok(DeviceHessian {
            mismatch: Some(DeviceMismatch {
                cross: sum()?,
                square: sum()?,
                crossed: 0,
                squared: 0,
            }),
            ..Self::new(gpu, features)?
        })
    }

    /// Adds `x^T x`; sixteen-bit factors, f32 sums.
    pub fn add(&mut self, x: DeviceMatrix) -> Result<(), CudaError> {
        let columns = x.contiguous().half().columns;
        assert_eq!(columns, self.features, "in_features of the observed rows");
        self.add_square(&self.values, x)
    }

    /// Adds rows and how they differ from their float partners, to the square of the difference only where
    /// `squared` says so.
    pub fn add_pair(
        &mut self,
        x: DeviceMatrix,
        float: DeviceMatrix,
        squared: bool,
    ) -> Result<(), CudaError> {
        self.add(x)?;
        let Some(mismatch) = &mut self.mismatch else {
            return Ok(());
        };
        mismatch.crossed += x.rows;
        mismatch.squared += if squared { x.rows } else { 0 };
        let mismatch = self.mismatch.as_ref().expect("it is there");
        float
            .like(x)
            .expect([x.rows, x.columns], "rows of both streams");
        let place = self.gpu.scratch("difference", x.bytes())?;
        let difference = place.matrix([x.rows, x.columns], x.dtype);
        self.gpu.subtract(difference, float, x)?;
        if squared {
            self.add_square(&mismatch.square, difference)?;
        }
        let k = self.features;
        // SAFETY: both have [rows, k] elements, the sum [k, k].
        unsafe { self.add_tile(&mismatch.cross, difference, x, [0, 0], [k, k]) }
    }

    /// Adds the tiles of `x^T x` on and below the diagonal to `sum`.
    fn add_square(&self, sum: &Buffer, x: DeviceMatrix) -> Result<(), CudaError> {
        let k = self.features;
        // A quarter on a boundary of 64 columns, so that tiles stay aligned.
        let side = k.div_ceil(TILES).next_multiple_of(64);
        for row in (0..k).step_by(side) {
            for col in (0..=row).step_by(side) {
                let size = [side.min(k - row), side.min(k - col)];
                // SAFETY: tiles lie inside x and the sum.
                unsafe { self.add_tile(sum, x, x, [row, col], size)? };
            }
        }
        Ok(())
    }

    /// Adds the tile at `[row, col]` of `[height, width]` of `a^T b` to `sum [k, k]`.
    ///
    /// # Safety
    /// The tile lies inside the sum, and its rows and columns inside `a` and `b`.
    unsafe fn add_tile(
        &self,
        sum: &Buffer,
        a: DeviceMatrix,
        b: DeviceMatrix,
        [row, col]: [usize; 2],
        [height, width]: [usize; 2],
    ) -> Result<(), CudaError> {
        let k = self.features;
        let half = |x: DeviceMatrix, first: usize, op| Side {
            address: x.address + 2 * first as u64,
            op,
            kind: half_type(x.dtype),
            ld: k,
            stride: 0,
        };
        let c = Side {
            address: sum.address() + 4 * (row * k + col) as u64,
            op: Op::CUBLAS_OP_N,
            kind: Type::CUDA_R_32F,
            ld: k,
            stride: 0,
        };
        // SAFETY: as the caller says.
        unsafe {
            self.gpu.product(&Product {
                size: [width, height, a.rows],
                alpha: 1.0,
                a: half(b, col, Op::CUBLAS_OP_N),
                b: half(a, row, Op::CUBLAS_OP_T),
                beta: 1.0,
                c,
                batch: 1,
                compute: Compute::CUBLAS_COMPUTE_32F,
            })
        }
    }

    /// Mirrors the computed triangles and multiplies with `scale`, what pairs added with 2 over their rows;
    /// returns the diagonal of H.
    pub fn finish(&mut self, scale: f32) -> Result<Vec<f32>, CudaError> {
        let k = self.features;
        self.mirror(&self.values, scale)?;
        if let Some(mismatch) = &self.mismatch {
            let mean = |rows: usize| 2.0 / rows.max(1) as f32;
            self.mirror(&mismatch.square, mean(mismatch.squared))?;
            let args = [
                (&mismatch.cross).into(),
                ((k * k) as i64).into(),
                mean(mismatch.crossed).into(),
            ];
            let grid = [(k * k).div_ceil(256), 1, 1];
            // SAFETY: the matrix is [k, k].
            unsafe {
                let program = Program::Hessian;
                self.gpu
                    .launch(program, "scale_in_place", grid, [256, 1, 1], 0, &args)?
            };
        }
        self.diagonal()
    }

    fn diagonal(&self) -> Result<Vec<f32>, CudaError> {
        let k = self.features;
        let diagonal = Buffer::new(&self.gpu, k * 4)?;
        let args = [(&diagonal).into(), (&self.values).into(), (k as i32).into()];
        // SAFETY: k elements on the diagonal.
        unsafe {
            self.gpu.launch(
                Program::Hessian,
                "diagonal",
                [k.div_ceil(256), 1, 1],
                [256, 1, 1],
                0,
                &args,
            )?
        };
        diagonal.to_host(k)
    }

    /// Finished means over `tokens` rows become those over `more` others too; returns the diagonal of H.
    pub fn merge(
        &mut self,
        tokens: usize,
        other: &DeviceHessian,
        more: usize,
    ) -> Result<Vec<f32>, CudaError> {
        self.merge_mean(&self.values, tokens, &other.values, more)?;
        if let (Some(mine), Some(others)) = (&self.mismatch, &other.mismatch) {
            let (crossed, squared) = (others.crossed, others.squared);
            self.merge_mean(&mine.cross, mine.crossed, &others.cross, crossed)?;
            self.merge_mean(&mine.square, mine.squared, &others.square, squared)?;
        }
        if let (Some(mine), Some(others)) = (&mut self.mismatch, &other.mismatch) {
            mine.crossed += others.crossed;
            mine.squared += others.squared;
        }
        self.diagonal()
    }

    fn merge_mean(
        &self,
        mean: &Buffer,
        count: usize,
        other: &Buffer,
        more: usize,
    ) -> Result<(), CudaError> {
        let elements = self.features * self.features;
        let args = [
            mean.into(),
            other.into(),
            (elements as i64).into(),
            (more as f32 / (count + more).max(1) as f32).into(),
        ];
        let grid = [elements.div_ceil(256), 1, 1];
        // SAFETY: both are [features, features].
        unsafe {
            self.gpu
                .launch(Program::Hessian, "update_mean", grid, [256, 1, 1], 0, &args)
        }
    }

    fn mirror(&self, sum: &Buffer, scale: f32) -> Result<(), CudaError> {
        let k = self.features;
        let tiles = k.div_ceil(32);
        let args = [sum.into(), (k as i32).into(), scale.into()];
        // SAFETY: the matrix is [k, k].
        unsafe {
            self.gpu.launch(
                Program::Hessian,
                "symmetrize_and_scale",
                [tiles, tiles, 1],
                [32, 8, 1],
                0,
                &args,
            )
        }
    }

    /// The effect of the input mismatch on the outputs of `w`, f32 `[features, n]` in stored order; `None` if
    /// no float stream was seen. The products have about three digits.
    pub(super) fn output_mismatch(
        &self,
        w: &Buffer,
        n: usize,
    ) -> Result<Option<DeviceOutputMismatch>, CudaError> {
        let Some(mismatch) = &self.mismatch else {
            return Ok(None);
        };
        let (gpu, k) = (&self.gpu, self.features);
        let square = self.quadratic(&mismatch.square, w, n)?;
        let cross = Buffer::new(gpu, k * n * 4)?;
        let (out, g) = (cross.address(), mismatch.cross.address());
        // SAFETY: sizes as said.
        unsafe {
            let size = [k, k, n];
            gpu.product_f32(
                out,
                0.0,
                1.0,
                g,
                k,
                true,
                w.address(),
                size,
                Precision::Tf32,
            )?;
        }
        Ok(Some(DeviceOutputMismatch { cross, square }))
    }

    /// Input channels.
    pub(super) fn features(&self) -> usize {
        self.features
    }

    /// `H`, undamped.
    pub(super) fn values(&self) -> &Buffer {
        &self.values
    }

    /// The GPU that it lies on.
    pub fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }

    /// Factors `H[order, order]` with `added[channel]` on its diagonal, in f64. `order` is the
    /// processing order reversed; `importance` weighs the squared error of its rows in the scale
    /// search. A pivot that is not positive is an error, in processing order.
    pub fn factor(
        &self,
        order: &[u32],
        added: &[f64],
        importance: &[f32],
    ) -> Result<DeviceFactor, CudaError> {
        let (gpu, k) = (&self.gpu, self.features);
        expect_permutation(order, k);
        assert_eq!([added.len(), importance.len()], [k; 2], "input channels");
        let a = Buffer::new(gpu, k * k * 8)?;
        let order = Buffer::from_host(gpu, order)?;
        let added = Buffer::from_host(gpu, added)?;
        let args = [
            (&a).into(),
            (&self.values).into(),
            (&order).into(),
            (&added).into(),
            (k as i32).into(),
        ];
        // SAFETY: order holds every channel once.
        unsafe {
            gpu.launch(
                Program::Hessian,
                "permute_and_damp",
                [k.div_ceil(256), k, 1],
                [256, 1, 1],
                0,
                &args,
            )?
        };
        gpu.cholesky(&a, k)?;
        gpu.invert_lower(&a, k)?;
        let values = gpu.narrowed(a, k)?;
        Ok(DeviceFactor {
            gpu: gpu.clone(),
            features: k,
            values,
            importance: Buffer::from_host(gpu, importance)?,
            added,
        })
    }

    /// `tr(E H E^T)` for `e` f32 `[features, n]`, to about three digits of each product; with what is
    /// carried the whole error at the outputs of the float model.
    pub(super) fn weighted_square(
        &self,
        e: &Buffer,
        n: usize,
        output_mismatch: Option<&DeviceOutputMismatch>,
    ) -> Result<f64, CudaError> {
        let own = self.quadratic(&self.values, e, n)?.max(0.0);
        let beside = match output_mismatch {
            Some(output_mismatch) => {
                2.0 * self.inner_product(output_mismatch.cross.address(), e, n)?
                    + output_mismatch.square
            }
            None => 0.0,
        };
        Ok((own + beside).max(0.0))
    }

    /// `tr(e^T matrix e)` for a symmetric matrix.
    fn quadratic(&self, matrix: &Buffer, e: &Buffer, n: usize) -> Result<f64, CudaError> {
        let (gpu, k) = (&self.gpu, self.features);
        let product = gpu.scratch(MEASURE, k * n * 4)?;
        let (out, matrix) = (product.address(), matrix.address());
        // SAFETY: sizes as said.
        unsafe {
            let size = [k, k, n];
            gpu.product_f32(
                out,
                0.0,
                1.0,
                matrix,
                k,
                false,
                e.address(),
                size,
                Precision::Tf32,
            )?;
        }
        self.inner_product(out, e, n)
    }

    /// Inner product of two matrices f32 `[features, n]`.
    fn inner_product(&self, a: u64, b: &Buffer, n: usize) -> Result<f64, CudaError> {
        let (gpu, k) = (&self.gpu, self.features);
        let parts = k.div_ceil(DOT_ROWS);
        let sums = Buffer::new(gpu, parts * n * 8)?;
        let args = [
            (&sums).into(),
            a.into(),
            b.into(),
            (k as i32).into(),
            (n as i32).into(),
            (DOT_ROWS as i32).into(),
        ];
        // SAFETY: sizes as said.
        unsafe {
            gpu.launch(
                Program::Hessian,
                "column_dot",
                [n.div_ceil(128), parts, 1],
                [128, 1, 1],
                0,
                &args,
            )?;
        }
        let sums: Vec<f64> = sums.to_host(parts * n)?;
        Ok(sums.iter().sum::<f64>())
    }
}

/// Checks that `channels` holds each of `0..k` once.
///
/// # Panics
/// If it does not.
pub(super) fn expect_permutation(channels: &[u32], k: usize) {
    let mut seen = vec![false; k];
    let mut first = |&channel: &u32| {
        (seen.get_mut(channel as usize)).is_some_and(|seen| !std::mem::replace(seen, true))
    };
    assert!(
        channels.len() == k && channels.iter().all(&mut first),
        "each of {k} channels once"
    );
}
