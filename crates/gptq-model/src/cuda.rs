//! The decoder's operations on Burn's CUDA backend.
//!
//! Burn owns the tensors; the operations of `gptq-kernels` read and write them through their
//! addresses, on the one stream of [`Gpu`]. Burn itself queues no work on any of them, so its own
//! stream never has to be waited for: memory that a dropped tensor leaves is reused by operations
//! that stand behind it in the same stream. Copies beside that stream touch no tensor, only what
//! belongs to a [`Shelf`].

use std::cell::RefCell;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

use burn::backend::Cuda;
use burn::backend::cuda::CudaDevice;
use burn::tensor::Tensor;
use burn::tensor::backend::Backend;
use burn_cubecl::FloatElement;
use gptq_kernels::cuda::{Buffer, CudaError, DeviceNorm, Gpu, Output, RowOrder, Shelf, Turn};
use gptq_kernels::{Activation, AttentionShape, Rotation, transpose};
use gptq_types::{Activations, DeviceMatrix, Dtype, LayerName, SourceError, Weight};

use crate::ModelError;
use crate::backend::{DecoderBackend, ShelfNeed, Shelves};
use crate::budget::{Fit, places_on_device};
use crate::device_rows::ScoringHead;
use crate::head::HostHead;
use crate::score::HeadInput;
use crate::spec::NormKind;
use crate::weights::{LinearValues, LinearWeights, WeightSource, to_f32};

/// For models in f16 and f32.
pub(crate) type F16 = Cuda<half::f16>;
/// For models in bf16.
pub(crate) type Bf16 = Cuda<half::bf16>;

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
pub(crate) trait Half: FloatElement {
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

impl<E: Half> DecoderBackend for Cuda<E> {
    type Vector = Option<Buffer>;
    type Norm = Option<DeviceNorm>;
    type Turn = Option<Turn>;
    type Table = Tensor<Self, 2>;
    type Shelf = Option<Rc<Shelf>>;
    type Kept = Placed;
    type Head = ScoringHead;

    /// Large products for the Hessian: each batch reads and writes all of the sum.
    const BATCH_TOKENS: usize = 8192;
    const PREFETCH: bool = true;
    const EVERY_INNER: bool = false;

    fn check() -> Result<(), ModelError> {
        let trouble = SELECTED.with_borrow_mut(|selected| selected.as_mut()?.trouble.take());
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
        shape: [usize; 2],
        bias: bool,
    ) -> Result<LinearWeights, SourceError> {
        source.linear_as_stored(layer, shape, bias)
    }

    fn weight(values: LinearValues, in_features: usize, out_features: usize) -> Tensor<Self, 2> {
        let out = blank(out_features, in_features);
        let to = view(&out);
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
            LinearValues::Packed(layer) => {
                note(gpu().dequantise(to, &layer));
            }
        }
        out
    }

    fn copied(weight: &Tensor<Self, 2>, place: Option<Tensor<Self, 2>>) -> Tensor<Self, 2> {
        let from = view(weight);
        let place = place.filter(|place| place.dims() == weight.dims());
        let out = place.unwrap_or_else(|| blank(from.rows, from.columns));
        let bytes = from.rows * from.columns * 2;
        note(gpu().copy(view(&out).address, from.address, bytes));
        out
    }

    fn show_weight(weight: &Tensor<Self, 2>) -> Weight {
        Weight::Device(view(weight))
    }

    fn vector(values: Vec<f32>) -> Self::Vector {
        note(Buffer::from_host(&gpu(), &values))
    }

    fn norm_weights(
        kind: NormKind,
        weight: Vec<f32>,
        bias: Option<Vec<f32>>,
        eps: f64,
    ) -> Self::Norm {
        note(device_norm(kind, &weight, bias.as_deref(), eps))
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

    fn embed(table: &Self::Table, ids: &[u32], factor: f32) -> Tensor<Self, 2> {
        let table = view(table);
        let out = blank(ids.len(), table.columns);
        note(gpu().embed(view(&out).address, table, ids, factor));
        out
    }

    fn upload(values: Vec<f32>, columns: usize) -> Tensor<Self, 2> {
        let out = blank(values.len() / columns, columns);
        note(gpu().upload(view(&out), &values));
        out
    }

    fn download(x: Tensor<Self, 2>) -> Vec<f32> {
        note(gpu().download(view(&x))).unwrap_or_default()
    }

    fn show(x: &Tensor<Self, 2>, look: &mut dyn FnMut(Activations<'_>)) {
        look(Activations::Device(view(x)));
    }

    fn shelves(need: &ShelfNeed) -> Shelves<Self::Shelf> {
        let memory = SELECTED.with_borrow(|selected| selected.as_ref().map_or(0, |s| s.memory));
        let none = Shelves {
            hidden: None,
            float: None,
            lent: None,
            by_token: None,
            inner: None,
            lenders: need.lent.0,
        };
        let Some(fit) = note(places_on_device(need, memory)) else {
            return none;
        };
        let shelf = |places: usize, columns: [usize; 2], fit: Fit| {
            let bytes = columns.map(|columns| need.rows * columns * 2);
            let shelf = Shelf::new(&gpu(), places, bytes, fit.places, fit.slots);
            note(shelf).map(Rc::new)
        };
        let hidden = [need.hidden; 2];
        // A gated product that does not fit is computed again sooner than it would cross the bus twice.
        let inner = [need.inner, need.attention];
        let followed = need.float.unwrap_or(0);
        let some = |places: usize, columns: usize, fit: Fit| match places {
            0 => None,
            _ => shelf(places, [columns; 2], fit),
        };
        let (lenders, lent) = need.lent;
        let (blocks, by_token) = need.by_token;
        Shelves {
            hidden: shelf(need.batches, hidden, fit.hidden),
            float: some(followed, need.hidden, fit.float),
            lent: some(2 * lenders * (need.batches + followed), lent, fit.lent),
            by_token: some(blocks * need.batches, by_token, fit.by_token),
            inner: shelf(need.batches, inner, fit.inner),
            lenders,
        }
    }

    fn clear(shelf: &Self::Shelf, rows: usize, columns: usize) {
        if let Some(shelf) = shelf {
            shelf.clear(rows * columns * 2);
        }
    }

    fn has_room(shelf: &Self::Shelf, place: usize) -> bool {
        shelf.as_ref().is_some_and(|shelf| shelf.has_room(place))
    }

    fn keep(shelf: &Self::Shelf, place: usize, x: &Tensor<Self, 2>) -> Placed {
        let from = view(x);
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
        let out = blank(kept.rows, kept.columns);
        let to = view(&out);
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
        let (x, weight) = (view(x), view(weight));
        let out = blank(x.rows, weight.rows);
        let to = view(&out);
        note(gpu().project(to.address, false, x, weight));
        if let Some(Some(bias)) = bias {
            note(gpu().add_bias(to, bias));
        }
        out
    }

    fn columns(x: &Tensor<Self, 2>, columns: Range<usize>) -> Tensor<Self, 2> {
        let x = view(x);
        let out = blank(x.rows, columns.len());
        let to = view(&out).address;
        note(gpu().copy_columns(to, x, columns.start, columns.len()));
        out
    }

    fn add(x: Tensor<Self, 2>, y: Tensor<Self, 2>, factor: f32) -> Tensor<Self, 2> {
        match factor == 1.0 {
            true => note(gpu().add(view(&x), view(&y))),
            false => note(gpu().add_scaled(view(&x), view(&y), factor)),
        };
        x
    }

    fn scale(x: Tensor<Self, 2>, factor: f32) -> Tensor<Self, 2> {
        note(gpu().scale(view(&x), factor));
        x
    }

    fn norm(x: &Tensor<Self, 2>, norm: &Self::Norm) -> Tensor<Self, 2> {
        let x = view(x);
        let out = blank(x.rows, x.columns);
        if let Some(norm) = norm {
            note(gpu().norm(view(&out).address, x, norm));
        }
        out
    }

    fn rotate(x: Tensor<Self, 2>, turn: &Self::Turn, tokens: usize) -> Tensor<Self, 2> {
        if let Some(turn) = turn {
            note(gpu().rotate(view(&x), turn, tokens));
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
        let [q, k, v] = [q, k, v].map(view);
        let out = blank(q.rows, q.columns);
        let to = view(&out).address;
        note(gpu().attend(to, q, k, v, tokens, shape));
        out
    }

    fn gate(
        gate: Tensor<Self, 2>,
        up: &Tensor<Self, 2>,
        activation: Activation,
    ) -> Tensor<Self, 2> {
        note(gpu().gate(view(&gate), view(up), activation));
        gate
    }

    fn activate(x: Tensor<Self, 2>, activation: Activation) -> Tensor<Self, 2> {
        let at = view(&x);
        let (order, size) = (RowOrder::natural(at.columns), [at.rows, at.columns]);
        let from = Output {
            address: at.address,
            pitch: at.columns,
        };
        note(gpu().activate_rows(at.address, order, from, size, at.dtype, activation));
        x
    }

    fn is_finite(x: &Tensor<Self, 2>) -> bool {
        note(gpu().first_not_finite(view(x))).is_none_or(|found| found.is_none())
    }

    fn head(head: HostHead) -> Result<ScoringHead, ModelError> {
        let (dtype, bytes) = head.source.plain_as_stored(&head.name)?;
        let weight = match dtype == E::DTYPE {
            true => Buffer::from_host(&gpu(), &bytes)?,
            false => {
                let values = to_f32(dtype, &bytes).expect("stored weights are floats");
                rounded(&values, head.width(), E::DTYPE)?
            }
        };
        ScoringHead::new(&gpu(), weight, E::DTYPE, head)
    }

    fn head_input(head: &ScoringHead, hidden: Tensor<Self, 2>) -> Result<HeadInput, ModelError> {
        Ok(HeadInput::of_device(head.rows(view(&hidden))?))
    }
}

/// A norm on the GPU.
pub(crate) fn device_norm(
    kind: NormKind,
    weight: &[f32],
    bias: Option<&[f32]>,
    eps: f64,
) -> Result<DeviceNorm, CudaError> {
    match kind {
        NormKind::Rms => DeviceNorm::rms(&gpu(), weight, eps as f32),
        NormKind::Layer => DeviceNorm::layer(&gpu(), weight, bias, eps as f32),
    }
}

/// Values `[rows, width]` on the GPU, rounded to `dtype`. In parts: the f32 copy on its way need not
/// exist as a whole.
fn rounded(values: &[f32], width: usize, dtype: Dtype) -> Result<Buffer, CudaError> {
    let there = Buffer::new(&gpu(), values.len() * 2)?;
    let part = (1 << 26) / width * width;
    for (index, values) in values.chunks(part).enumerate() {
        let to = DeviceMatrix {
            address: there.address() + 2 * (index * part) as u64,
            rows: values.len() / width,
            columns: width,
            dtype,
        };
        gpu().upload(to, values)?;
    }
    Ok(there)
}

fn device() -> CudaDevice {
    CudaDevice::new(gpu().ordinal())
}

/// A matrix of undefined content. One-dimensional until its shape is known to Burn, which pads
/// rows of matrices otherwise; of exactly its size, where Burn's pools take pages of gigabytes.
fn blank<E: Half>(rows: usize, columns: usize) -> Tensor<Cuda<E>, 2> {
    let device = device();
    let flat = Cuda::<E>::memory_persistent_allocations(&device, (), |()| {
        Tensor::<Cuda<E>, 1>::empty([rows * columns], &device)
    });
    flat.reshape([rows, columns])
}

/// Where a tensor lies. The tensor outlives the operations queued on it, or its memory is reused
/// by later ones of the same stream alone.
fn view<E: Half>(x: &Tensor<Cuda<E>, 2>) -> DeviceMatrix {
    let [rows, columns] = x.dims();
    let tensor = x.clone().into_primitive().tensor();
    let address = match tensor.client.get_resource(tensor.handle.clone()) {
        Ok(resource) => resource.resource().ptr,
        Err(error) => {
            let text = format!("a tensor has no memory: {error:?}");
            note::<()>(Err(CudaError::Invalid(text)));
            0
        }
    };
    DeviceMatrix {
        address,
        rows,
        columns,
        dtype: E::DTYPE,
    }
}
