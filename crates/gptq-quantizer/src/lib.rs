//! GPTQ (Frantar et al. 2022, arXiv:2210.17323): from a layer's weights and inputs to integer
//! codes on the grid that will be stored.
//!
//! | paper | here |
//! |---|---|
//! | `X`, layer input | rows shown to [`Hessian`] through `ActivationSink` |
//! | `H = 2 X X^T` | [`Hessian`], divided by the number of tokens |
//! | `lambda`, dampening | `QuantSpec::damp_percent` of the mean diagonal, [`Factor`] |
//! | `H^-1 = U^T U`, `Cholesky(H^-1)^T` | `u` in [`Factor`] |
//! | `quant(w)` | [`Grid`], scale already rounded to f16, by default the best of several |
//! | algorithm 1, lazy batch updates | [`solve`] |
//! | inputs of the float model (not in the paper) | [`Mismatch`] |
//! | codes reconsidered (not in the paper) | [`descend`] |
//! | codes and scales trained (not in the paper) | [`TrainedLinear`] |
//!
//! Knows: Hessians, damping, column orders, grids, the solver, rounding to nearest, and a plain
//! f64 version of it all ([`reference`]) to be read and compared with.
//!
//! Does not know: models, files, bit packing. A singular Hessian is damped further and counted;
//! nothing is ever solved with an identity in its place.

mod descent;
#[cfg(feature = "cuda")]
mod device;
mod factor;
mod grid;
mod group;
mod hessian;
mod measure;
mod mismatch;
mod order;
pub mod reference;
mod round;
mod search;
mod solve;
mod trained;

pub use descent::descend;
#[cfg(feature = "cuda")]
pub use device::DeviceSum;
pub use factor::Factor;
pub use gptq_kernels::{ActivationSink, Activations, LearningRates, Weight, cosine_decay};
pub use grid::Grid;
pub use group::{
    After, FactorStats, GroupHessian, GroupSolver, GroupSum, HostGroup, PendingLayer, Rounded,
    RoundedLayer,
};
pub use hessian::{Hessian, HessianSum};
pub use measure::{Outputs, output_error, signal};
pub use mismatch::{Mismatch, OutputMismatch};
pub use order::Order;
pub use round::round_to_nearest;
pub use solve::{Solved, solve};
pub use trained::TrainedLinear;

/// A layer that cannot be solved.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum QuantizeError {
    #[error("the Hessian holds {value} for input channel {channel}: an activation overflowed")]
    NotFinite { channel: usize, value: f32 },
    #[error("no calibration token reached the layer")]
    NoTokens,
    #[error(
        "the Hessian of {features} channels stayed singular at pivot {pivot} up to damp percent {damp}"
    )]
    Singular {
        features: usize,
        pivot: usize,
        damp: f64,
    },
    #[cfg(feature = "cuda")]
    #[error(transparent)]
    Cuda(#[from] gptq_kernels::cuda::CudaError),
    #[error("group {group} needs a scale of {scale}, beyond the largest f16")]
    ScaleOverflow { group: usize, scale: f32 },
    #[error("the weight has {found} elements, expected {in_features} x {out_features}")]
    Shape {
        found: usize,
        in_features: usize,
        out_features: usize,
    },
}
