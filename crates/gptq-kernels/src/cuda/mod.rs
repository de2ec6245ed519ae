//! The arithmetic of this crate on NVIDIA GPUs: cuBLAS for products, cuSOLVER for factorizations, and for the
//! rest the sources in `kernels/`, compiled by NVRTC.
//!
//! Libraries are opened when a [`Gpu`] is, never before: a program with this code runs on machines
//! without any of them. All work of a [`Gpu`] is queued on one stream, but for copies that cross the
//! bus beside it. Operands are shared views ([`DeviceMatrix`], [`DeviceSlice`]) whose shapes are checked
//! in every call; tensors of other libraries need no copy, and who makes a view of one vouches for it.

// The one place in the workspace that calls foreign code.
#![allow(unsafe_code)]

mod activation_store;
mod attention;
mod attention_backward;
mod backward;
mod cholesky;
mod decoder;
mod descent;
mod device;
mod download;
mod error;
mod graph;
mod hessian;
mod inverse;
mod key_values;
mod latents;
mod launch;
mod layout;
mod memory;
mod multiply;
mod norm;
mod packed;
mod probe;
mod product;
mod program;
mod score;
mod speed;
mod sweep;
mod text;
mod view;

pub use activation_store::ActivationStore;
pub use decoder::RotaryTable;
pub use device::{Gpu, KeptOpen, Mark, MemoryUse, WorkingSpace};
pub use error::CudaError;
pub use graph::Recorded;
pub use hessian::{DeviceFactor, DeviceHessian, DeviceOutputMismatch};
pub use key_values::{DeviceKeyValues, HeadNorms, TextRows};
pub use latents::DeviceLatents;
pub use memory::{Buffer, Pinned};
pub use norm::DeviceNorm;
pub use packed::PackedLinear;
pub use probe::{Found, check, devices, libraries};
pub use score::{DeviceHead, RowScore, States};
pub use speed::DeviceSpeed;
pub use sweep::{
    Cost, RawGridRule, SWEEP_CHANNELS, Step, SweepPlan, Swept, SweptDownload, SweptHost,
};
pub use text::RowOrder;
pub use view::{DeviceMatrix, DeviceSlice};
