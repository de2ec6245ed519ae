//! The heavy arithmetic of quantization and inference, on plain row-major slices.
//!
//! Knows: matrix products, also from packed or sixteen-bit weights, Gram matrices, the Cholesky factor of an
//! inverse, the fused operations of a decoder block and their gradients, each vectorized at run time for the processor it finds
//! and spread over the rayon pool it is called from. Results do not depend on the number of threads: work is
//! split over outputs, never over a sum.
//!
//! Does not know: tensors with names, models, what a Hessian is for.

#[cfg(test)]
extern crate self as gptq_kernels; // for `definition`, which another crate includes

mod attention;
mod backward;
mod cache;
#[cfg(feature = "cuda")]
pub mod cuda;
#[cfg(not(feature = "cuda"))]
pub mod cuda {
    //! Without the feature there is no GPU, and so nothing that lies on one.

    use std::marker::PhantomData;

    /// There are none.
    #[derive(Clone, Copy, Debug)]
    pub struct DeviceMatrix<'a>(std::convert::Infallible, PhantomData<&'a [u8]>);
}
#[cfg(test)]
mod definition;
mod descent_blocks;
mod device_sizes;
mod elementwise;
mod factor;
mod matrix;
mod operand;
mod product;
mod real;
mod rotation;
mod vector;

pub use attention::{AttentionShape, causal_attention};
pub use backward::{
    Adam, AttentionGradients, LearningRates, NormGradients, RowScale, TrainedGrids,
    activate_backward, bias_backward, causal_attention_backward, cosine_decay, gated_backward,
    layer_norm_backward, nearest_latent, output_error, output_error_backward,
    product_input_backward, product_weight_backward, rms_norm_backward, row_squares, stored_scale,
};
pub use cache::KeyValueCache;
pub use descent_blocks::{DESCENT_CHANNELS, DescentBlock, descent_blocks};
pub use device_sizes::{LatentShape, attention_backward_bytes};
pub use elementwise::{
    Activation, activate, add_scaled, gated, layer_norm, rms_norm, scale, soft_cap,
};
pub use factor::{FactorError, inverse_cholesky};
pub use matrix::{FloatMatrix, Matrix, PackedMatrix, multiply_each};
pub use operand::{ActivationSink, Activations, Weight, stretch_of};
pub use product::{
    Cross, Gram, measure_sgemm, multiply, multiply_add, multiply_f64, multiply_left_transposed,
    multiply_transposed, transpose,
};
pub use real::Real;
pub use rotation::{Pairing, Rotation};
pub use vector::{axpy, dot, exp, exp_sum, softmax, vectorized};
