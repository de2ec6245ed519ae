//! Tensors of Burn's CUDA backend as views of `gptq-kernels`.

// The one place outside `gptq-kernels` that vouches for an address.
#![allow(unsafe_code)]

use burn::backend::Cuda;
use burn::tensor::Tensor;
use gptq_kernels::cuda::DeviceMatrix;

use crate::cuda::Half;

/// Where a tensor lies, for as long as it is borrowed. Afterwards its memory is freed by Burn, and used
/// again by operations that stand behind those of the view in the same stream.
///
/// # Panics
/// If Burn has lost the memory of a tensor that is still there.
pub(crate) fn view<E: Half>(x: &Tensor<Cuda<E>, 2>) -> DeviceMatrix<'_> {
    let tensor = x.clone().into_primitive().tensor();
    let resource = tensor.client.get_resource(tensor.handle.clone());
    let resource = resource.expect("a tensor has memory");
    // SAFETY: tensors of a decoder are `OnCuda::blank`: without gaps and of that type. The handle that `x`
    // holds keeps the memory.
    unsafe { DeviceMatrix::from_address(resource.resource().ptr, x.dims(), E::DTYPE) }
}
