//! The decoder's operations on Burn's CUDA backend.
//!
//! Burn owns the tensors; the operations of `gptq-kernels` read and write them through their
//! addresses, on the one stream of [`Gpu`]. Burn itself queues no work on any of them, so its own
//! stream never has to be waited for: memory that a dropped tensor leaves is reused by operations
//! that stand behind it in the same stream.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use burn::backend::Cuda;
use burn::tensor::Tensor;
use burn::tensor::backend::Backend;
use gptq_kernels::cuda::{Buffer, CudaError, DeviceCache, DeviceHead as Head, Gpu, Shelf, Turn};
use gptq_kernels::{AttentionShape, Rotation, transpose};
use gptq_types::{Activations, DeviceMatrix, Dtype, LayerName, SourceError, Weight};

use crate::ModelError;
use crate::backend::{DecoderBackend, DeviceHead, ShelfNeed};
use crate::weights::{LinearValues, LinearWeights, WeightSource};

/// For models in f16 and f32.
pub(crate) type F16 = Cuda<half::f16, i32>;
/// For models in bf16.
pub(crate) type Bf16 = Cuda<half::bf16, i32>;

/// What operations of this thread run on.
struct Selected {
    gpu: Arc<Gpu>,
    memory: usize,
    trouble: Option<CudaError>,
}

thread_local! {
    static SELECTED: RefCell<Option<Selected>> = const { RefCell::new(None) };
}

/// Makes device `ordinal` the one of this thread, with a budget of `memory` bytes.
pub(crate) fn select(ordinal: usize, memory: usize) -> Result<(), ModelError> {
    SELECTED.with_borrow_mut(|selected| {
        if let Some(selected) = selected
            && selected.gpu.ordinal() == ordinal
        {
            selected.memory = memory;
            return Ok(());
        }
        *selected = Some(Selected {
            gpu: Gpu::open(ordinal)?,
            memory,
            trouble: None,
        });
        Ok(())
    })
}

/// The device of this thread.
pub(crate) fn selected() -> Option<Arc<Gpu>> {
    SELECTED.with_borrow(|selected| Some(selected.as_ref()?.gpu.clone()))
}

/// The type that a model's plain tensors have.
pub(crate) fn is_bf16(source: &dyn WeightSource) -> bool {
    source.dtype("model.embed_tokens.weight") == Some(Dtype::BF16)
}

fn gpu() -> Arc<Gpu> {
    selected().expect("a device was selected when the decoder was opened")
}

/// Keeps the first error for [`DecoderBackend::check`].
fn note<T>(result: Result<T, CudaError>) -> Option<T> {
    result
        .map_err(|error| {
            SELECTED.with_borrow_mut(|selected| {
                if let Some(selected) = selected {
                    selected.trouble.get_or_insert(error);
                }
            });
        })
        .ok()
}

/// A sixteen-bit element of tensors.
pub(crate) trait Half {
    const DTYPE: Dtype;
}

impl Half for half::f16 {
    const DTYPE: Dtype = Dtype::F16;
}

impl Half for half::bf16 {
    const DTYPE: Dtype = Dtype::BF16;
}

/// An activation at a place of a shelf.
pub(crate) struct Placed {
    shelf: Option<Rc<Shelf>>,
    place: usize,
    rows: usize,
    columns: usize,
}

/// Memory that the driver, cuBLAS and cuSOLVER take for themselves, measured with nothing
/// allocated: 0.6 GB on an H200, and some room.
const LIBRARIES: usize = 850 << 20;

/// How many places of each shelf fit on the GPU beside everything else that a run needs there.
fn places_on_device(need: &ShelfNeed, memory: usize) -> Result<[usize; 2], CudaError> {
    let row = |columns: usize| need.rows * columns * 2;
    let widest = need.inner.max(need.hidden);
    // Weights of a block; a batch's temporaries, of which three are as wide as the feed-forward;
    // scores; and either those or what solving the widest linear takes: the factor in f64 beside
    // H, a weight three times in f32, its codes.
    let temporaries = 3 * row(widest) + 4 * row(need.hidden) + (400 << 20);
    let solving = widest * widest * 8 + widest * need.hidden * 14;
    let fixed =
        LIBRARIES + need.block_elements * 2 + widest * widest * 4 + temporaries.max(solving);
    let Some(mut left) = memory.checked_sub(fixed) else {
        return Err(CudaError::Invalid(format!(
            "--gpu-memory of {:.1} GB is too little: a block, its solver and the libraries take \
             {:.1} GB beside the activations",
            memory as f64 / 1e9,
            fixed as f64 / 1e9
        )));
    };
    let mut fit = |bytes: usize| {
        let places = (left / bytes.max(1)).min(need.batches);
        left -= places * bytes;
        places
    };
    // The hidden states first: they are read and written three times a block, the others once.
    Ok([fit(row(need.hidden)), fit(row(need.inner))])
}

/// Refuses to sample where all blocks together do not fit.
pub(crate) fn check_resident(blocks: usize, block_elements: usize) -> Result<(), ModelError> {
    let memory = SELECTED.with_borrow(|selected| selected.as_ref().map_or(0, |s| s.memory));
    let needed = LIBRARIES + blocks * block_elements * 2;
    match needed <= memory {
        true => Ok(()),
        false => Err(ModelError::Cuda(CudaError::Invalid(format!(
            "sampling keeps all {blocks} blocks on the GPU, {:.1} GB, and --gpu-memory is {:.1} GB",
            needed as f64 / 1e9,
            memory as f64 / 1e9
        )))),
    }
}

macro_rules! decoder_on_cuda {
    ($element:ty) => {
        impl DecoderBackend for Cuda<$element, i32> {
            type Cache = Option<DeviceCache>;
            type Vector = Option<Buffer>;
            type Turn = Option<Turn>;
            type Table = Tensor<Self, 2>;
            type Shelf = Option<Rc<Shelf>>;
            type Kept = Placed;

            /// Large products for the Hessian: each batch reads and writes all of the sum.
            const BATCH_TOKENS: usize = 8192;
            const PREFETCH: bool = true;

            fn check() -> Result<(), ModelError> {
                let trouble =
                    SELECTED.with_borrow_mut(|selected| selected.as_mut()?.trouble.take());
                trouble.map_or(Ok(()), |error| Err(error.into()))
            }

            fn tidy() {
                note(gpu().synchronize());
                gpu().drop_scratch();
                Self::memory_cleanup(&device());
            }

            fn read(
                source: &dyn WeightSource,
                layer: &LayerName,
                bias: bool,
            ) -> Result<LinearWeights, SourceError> {
                source.linear_as_stored(layer, bias)
            }

            fn weight(
                values: LinearValues,
                in_features: usize,
                out_features: usize,
            ) -> Tensor<Self, 2> {
                let out = blank::<Self>(out_features, in_features);
                let to = view::<Self, $element>(&out);
                match values {
                    LinearValues::Stored { dtype, bytes } if dtype == to.dtype => {
                        note(gpu().to_device(to.address, &bytes));
                    }
                    LinearValues::Stored { .. } => {
                        let values = values.input_major(in_features, out_features);
                        note(gpu().upload(to, &transpose(&values, in_features, out_features)));
                    }
                    LinearValues::InputMajor(values) => {
                        note(gpu().upload(to, &transpose(&values, in_features, out_features)));
                    }
                }
                out
            }

            fn show_weight(weight: &Tensor<Self, 2>) -> Weight {
                Weight::Device(view::<Self, $element>(weight))
            }

            fn vector(values: Vec<f32>) -> Self::Vector {
                note(Buffer::from_host(&gpu(), &values))
            }

            fn turn(rotation: Rotation) -> Self::Turn {
                note(Turn::new(&gpu(), &rotation))
            }

            fn table(
                source: &dyn WeightSource,
                name: &str,
                width: usize,
            ) -> Result<Self::Table, SourceError> {
                let (dtype, bytes) = source.plain_as_stored(name)?;
                let rows = bytes.len() / dtype.size() / width;
                Ok(Self::weight(
                    LinearValues::Stored { dtype, bytes },
                    width,
                    rows,
                ))
            }

            fn embed(table: &Self::Table, ids: &[u32]) -> Tensor<Self, 2> {
                let table = view::<Self, $element>(table);
                let out = blank::<Self>(ids.len(), table.columns);
                note(gpu().embed(view::<Self, $element>(&out).address, table, ids));
                out
            }

            fn download(x: Tensor<Self, 2>) -> Vec<f32> {
                note(gpu().download(view::<Self, $element>(&x))).unwrap_or_default()
            }

            fn show(x: &Tensor<Self, 2>, look: &mut dyn FnMut(Activations<'_>)) {
                look(Activations::Device(view::<Self, $element>(x)));
            }

            fn shelves(need: &ShelfNeed) -> [Self::Shelf; 2] {
                let memory =
                    SELECTED.with_borrow(|selected| selected.as_ref().map_or(0, |s| s.memory));
                let Some(fit) = note(places_on_device(need, memory)) else {
                    return [None, None];
                };
                let shelf = |columns: usize, fit: usize| {
                    let bytes = need.rows * columns * 2;
                    note(Shelf::new(&gpu(), need.batches, bytes, fit)).map(Rc::new)
                };
                [shelf(need.hidden, fit[0]), shelf(need.inner, fit[1])]
            }

            fn keep(shelf: &Self::Shelf, place: usize, x: Tensor<Self, 2>) -> Placed {
                let from = view::<Self, $element>(&x);
                if let Some(shelf) = shelf {
                    note(shelf.put(place, from.address, from.rows * from.columns * 2));
                }
                Placed {
                    shelf: shelf.clone(),
                    place,
                    rows: from.rows,
                    columns: from.columns,
                }
            }

            fn recall(kept: Placed) -> Tensor<Self, 2> {
                Self::peek(&kept)
            }

            fn peek(kept: &Placed) -> Tensor<Self, 2> {
                let out = blank::<Self>(kept.rows, kept.columns);
                let to = view::<Self, $element>(&out);
                if let Some(shelf) = &kept.shelf {
                    note(shelf.get(kept.place, to.address, to.rows * to.columns * 2));
                }
                out
            }

            fn project(
                x: &Tensor<Self, 2>,
                weight: &Tensor<Self, 2>,
                bias: Option<&Self::Vector>,
            ) -> Tensor<Self, 2> {
                let (x, weight) = (view::<Self, $element>(x), view::<Self, $element>(weight));
                let out = blank::<Self>(x.rows, weight.rows);
                let to = view::<Self, $element>(&out);
                note(gpu().project(to.address, false, x, weight));
                if let Some(Some(bias)) = bias {
                    note(gpu().add_bias(to, bias));
                }
                out
            }

            fn add(x: Tensor<Self, 2>, y: Tensor<Self, 2>) -> Tensor<Self, 2> {
                note(gpu().add(view::<Self, $element>(&x), view::<Self, $element>(&y)));
                x
            }

            fn norm(x: &Tensor<Self, 2>, weight: &Self::Vector, eps: f64) -> Tensor<Self, 2> {
                let x = view::<Self, $element>(x);
                let out = blank::<Self>(x.rows, x.columns);
                if let Some(weight) = weight {
                    let to = view::<Self, $element>(&out).address;
                    note(gpu().rms_norm(to, x, weight, eps as f32));
                }
                out
            }

            fn rotate(x: Tensor<Self, 2>, turn: &Self::Turn, tokens: usize) -> Tensor<Self, 2> {
                if let Some(turn) = turn {
                    note(gpu().rotate(view::<Self, $element>(&x), turn, tokens));
                }
                x
            }

            fn attend(
                q: &Tensor<Self, 2>,
                k: &Tensor<Self, 2>,
                v: &Tensor<Self, 2>,
                tokens: usize,
                shape: AttentionShape,
            ) -> Tensor<Self, 2> {
                let [q, k, v] = [q, k, v].map(view::<Self, $element>);
                let out = blank::<Self>(q.rows, q.columns);
                let to = view::<Self, $element>(&out).address;
                note(gpu().attend(to, q, k, v, tokens, shape));
                out
            }

            fn gate(gate: Tensor<Self, 2>, up: &Tensor<Self, 2>) -> Tensor<Self, 2> {
                note(gpu().swiglu(view::<Self, $element>(&gate), view::<Self, $element>(up)));
                gate
            }

            fn cache(sequences: usize, capacity: usize, shape: AttentionShape) -> Self::Cache {
                note(DeviceCache::new(&gpu(), sequences, capacity, shape))
            }

            fn attend_cached(
                cache: &mut Self::Cache,
                q: &Tensor<Self, 2>,
                k: &Tensor<Self, 2>,
                v: &Tensor<Self, 2>,
                shape: AttentionShape,
            ) -> Tensor<Self, 2> {
                let [q, k, v] = [q, k, v].map(view::<Self, $element>);
                let out = blank::<Self>(q.rows, q.columns);
                let to = view::<Self, $element>(&out).address;
                if let Some(cache) = cache {
                    note(cache.attend(to, q, k, v, shape));
                }
                out
            }

            fn head(weight: &[f32], width: usize) -> DeviceHead {
                #[allow(clippy::arc_with_non_send_sync)]
                note(Head::new(&gpu(), weight, width, <$element as Half>::DTYPE)).map(Arc::new)
            }
        }
    };
}
decoder_on_cuda!(half::f16);
decoder_on_cuda!(half::bf16);

fn device() -> burn::backend::cuda::CudaDevice {
    burn::backend::cuda::CudaDevice::new(gpu().ordinal())
}

/// A matrix of undefined content. One-dimensional until its shape is known to Burn, which pads
/// rows of matrices otherwise; of exactly its size, where Burn's pools take pages of gigabytes.
fn blank<B>(rows: usize, columns: usize) -> Tensor<B, 2>
where
    B: Backend<Device = burn::backend::cuda::CudaDevice>,
{
    let device = device();
    let flat = B::memory_persistent_allocations(&device, (), |()| {
        Tensor::<B, 1>::empty([rows * columns], &device)
    });
    flat.reshape([rows, columns])
}

/// Where a tensor lies. The tensor outlives the operations queued on it, or its memory is reused
/// by later ones of the same stream alone.
fn view<B, E>(x: &Tensor<B, 2>) -> DeviceMatrix
where
    B: OnDevice,
    E: Half,
{
    let [rows, columns] = x.dims();
    DeviceMatrix {
        address: B::address(x),
        rows,
        columns,
        dtype: E::DTYPE,
    }
}

/// The address of a tensor, for each element type.
pub(crate) trait OnDevice: Backend {
    fn address(x: &Tensor<Self, 2>) -> u64;
}

macro_rules! on_device {
    ($element:ty) => {
        impl OnDevice for Cuda<$element, i32> {
            fn address(x: &Tensor<Self, 2>) -> u64 {
                let tensor = x.clone().into_primitive().tensor();
                let resource = tensor.client.get_resource(tensor.handle.clone());
                match resource {
                    Ok(resource) => resource.resource().ptr,
                    Err(error) => {
                        note::<()>(Err(CudaError::Invalid(format!(
                            "a tensor has no memory: {error:?}"
                        ))));
                        0
                    }
                }
            }
        }
    };
}
on_device!(half::f16);
on_device!(half::bf16);

#[cfg(test)]
mod tests {
    use super::*;

    /// Llama 2 7B with 128 windows of 2048 tokens.
    const NEED: ShelfNeed = ShelfNeed {
        batches: 32,
        rows: 8192,
        hidden: 4096,
        inner: 11008,
        block_elements: 202_375_168,
    };

    #[test]
    fn a_larger_budget_keeps_more_activations_on_the_gpu() {
        let places = |gb: usize| places_on_device(&NEED, gb * 1_000_000_000).unwrap();
        let [six, ten, thirty] = [places(6), places(10), places(30)];
        assert_eq!(thirty, [32, 32]);
        assert_eq!((six[0], ten[0]), (32, 32), "hidden states come first");
        assert!(six[1] < ten[1] && ten[1] < 32, "{six:?} {ten:?}");
    }

    #[test]
    fn a_budget_below_what_a_block_needs_is_refused() {
        let error = places_on_device(&NEED, 2_000_000_000).unwrap_err();
        assert!(
            error.to_string().contains("--gpu-memory of 2.0 GB"),
            "{error}"
        );
    }
}
