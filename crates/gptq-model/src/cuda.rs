//! The decoder's operations on Burn's CUDA backend.
//!
//! Burn owns the tensors; the operations of `gptq-kernels` read and write them through
//! [views](crate::burn_memory), on the one stream of [`Gpu`]. Burn itself queues no work on any of them, so its own
//! stream never has to be waited for: memory that a dropped tensor leaves is reused by operations
//! that stand behind it in the same stream. Copies beside that stream touch no tensor, only what
//! belongs to a [`ActivationStore`].

use std::cell::RefCell;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

use burn::backend::Cuda;
use burn::backend::cuda::CudaDevice;
use burn::tensor::Tensor;
use burn::tensor::backend::Backend;
use burn_cubecl::FloatElement;
use gptq_kernels::cuda::{
    ActivationStore, Buffer, CudaError, DeviceNorm, Gpu, RotaryTable, RowOrder,
};
use gptq_kernels::{
    Activation, Activations, AttentionShape, Rotation, RowScale, Weight, transpose,
};
use gptq_types::{Dtype, LayerName, SourceError};

use crate::ModelError;
use crate::backend::{ActivationSizes, ActivationStores, DecoderBackend, GradientBackend};
use crate::budget::{BATCH_TOKENS, StoreBudget, places_on_device};
use crate::burn_memory::view;
use crate::device::CudaContext;
use crate::device_rows::ScoringHead;
use crate::head::HostHead;
use crate::score::HeadInput;
use crate::spec::NormKind;
use crate::weights::{LinearValues, LinearWeights, WeightSource, to_f32};

/// For models in f16 and f32.
pub(crate) type F16 = Cuda<half::f16>;
/// For models in bf16.
pub(crate) type Bf16 = Cuda<half::bf16>;

/// The device of a decoder.
#[derive(Clone)]
pub(crate) struct OnCuda {
    context: CudaContext,
    /// The first thing that went wrong, until it is asked for.
    trouble: Rc<RefCell<Option<CudaError>>>,
}

impl OnCuda {
    pub fn new(context: CudaContext) -> Self {
        OnCuda {
            context,
            trouble: Rc::default(),
        }
    }

    fn gpu(&self) -> &Arc<Gpu> {
        self.context.gpu()
    }

    /// Keeps the first error for [`DecoderBackend::check`].
    fn note<T>(&self, result: Result<T, CudaError>) -> Option<T> {
        let keep = |error| {
            self.trouble.borrow_mut().get_or_insert(error);
        };
        result.map_err(keep).ok()
    }

    fn burn_device(&self) -> CudaDevice {
        CudaDevice::new(self.gpu().ordinal())
    }

    /// A matrix of undefined content. One-dimensional until its shape is known to Burn, which pads
    /// rows of matrices otherwise; of exactly its size, where Burn's pools take pages of gigabytes.
    fn blank<E: Half>(&self, rows: usize, columns: usize) -> Tensor<Cuda<E>, 2> {
        let device = self.burn_device();
        let flat = Cuda::<E>::memory_persistent_allocations(&device, (), |()| {
            Tensor::<Cuda<E>, 1>::empty([rows * columns], &device)
        });
        flat.reshape([rows, columns])
    }
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

/// An activation at a place of a store.
pub(crate) struct Placed {
    store: Option<Rc<ActivationStore>>,
    place: usize,
    rows: usize,
    columns: usize,
}

impl<E: Half> DecoderBackend for Cuda<E> {
    type Tensors = Self;
    type Context = OnCuda;
    type Vector = Option<Buffer>;
    type Norm = Option<DeviceNorm>;
    type RotaryTable = Option<RotaryTable>;
    type Table = Tensor<Self, 2>;
    type ActivationStore = Option<Rc<ActivationStore>>;
    type Offloaded = Placed;
    type Head = ScoringHead;

    const BATCH_TOKENS: usize = BATCH_TOKENS;
    const PREFETCH: bool = true;
    const EVERY_INNER: bool = false;

    fn check(on: &Self::Context) -> Result<(), ModelError> {
        on.trouble.take().map_or(Ok(()), |error| Err(error.into()))
    }

    fn tidy(on: &Self::Context) {
        on.note(on.gpu().synchronize());
        on.gpu().drop_scratch();
        Self::memory_cleanup(&on.burn_device());
    }

    fn read(
        source: &dyn WeightSource,
        layer: &LayerName,
        shape: [usize; 2],
        bias: bool,
    ) -> Result<LinearWeights, SourceError> {
        source.linear_as_stored(layer, shape, bias)
    }

    fn weight(
        on: &Self::Context,
        values: LinearValues,
        in_features: usize,
        out_features: usize,
    ) -> Tensor<Self, 2> {
        let out = on.blank(out_features, in_features);
        let to = view(&out);
        match values {
            LinearValues::Stored { dtype, bytes } if dtype == to.dtype() => {
                on.note(on.gpu().write_stored(to, &bytes));
            }
            LinearValues::Stored { .. } => {
                let values = values.input_major(in_features, out_features);
                on.note(
                    on.gpu()
                        .upload(to, &transpose(&values, in_features, out_features)),
                );
            }
            LinearValues::InputMajor(values) => {
                on.note(
                    on.gpu()
                        .upload(to, &transpose(&values, in_features, out_features)),
                );
            }
            LinearValues::Packed(layer) => {
                on.note(on.gpu().dequantize(to, &layer));
            }
        }
        out
    }

    fn copied(
        on: &Self::Context,
        weight: &Tensor<Self, 2>,
        place: Option<Tensor<Self, 2>>,
    ) -> Tensor<Self, 2> {
        let from = view(weight);
        let place = place.filter(|place| place.dims() == weight.dims());
        let out = place.unwrap_or_else(|| on.blank(from.rows(), from.columns()));
        on.note(on.gpu().copy(view(&out), from));
        out
    }

    fn show_weight(weight: &Tensor<Self, 2>) -> Weight<'_> {
        Weight::Device(view(weight))
    }

    fn vector(on: &Self::Context, values: Vec<f32>) -> Self::Vector {
        on.note(Buffer::from_host(on.gpu(), &values))
    }

    fn norm_weights(
        on: &Self::Context,
        kind: NormKind,
        weight: Vec<f32>,
        bias: Option<Vec<f32>>,
        eps: f64,
    ) -> Self::Norm {
        on.note(device_norm(on.gpu(), kind, &weight, bias.as_deref(), eps))
    }

    fn rotary_table(on: &Self::Context, rotation: Rotation) -> Self::RotaryTable {
        on.note(RotaryTable::new(on.gpu(), &rotation))
    }

    fn table(
        on: &Self::Context,
        source: &dyn WeightSource,
        name: &str,
        width: usize,
    ) -> Result<Self::Table, SourceError> {
        let (dtype, bytes) = source.plain_as_stored(name)?;
        let rows = bytes.len() / dtype.size() / width;
        Ok(Self::weight(
            on,
            LinearValues::Stored { dtype, bytes },
            width,
            rows,
        ))
    }

    fn embed(on: &Self::Context, table: &Self::Table, ids: &[u32], factor: f32) -> Tensor<Self, 2> {
        let table = view(table);
        let out = on.blank(ids.len(), table.columns());
        on.note(on.gpu().embed(view(&out), table, ids, factor));
        out
    }

    fn upload(on: &Self::Context, values: Vec<f32>, columns: usize) -> Tensor<Self, 2> {
        let out = on.blank(values.len() / columns, columns);
        on.note(on.gpu().upload(view(&out), &values));
        out
    }

    fn download(on: &Self::Context, x: Tensor<Self, 2>) -> Vec<f32> {
        on.note(on.gpu().download(view(&x))).unwrap_or_default()
    }

    fn show(x: &Tensor<Self, 2>, look: &mut dyn FnMut(Activations<'_>)) {
        look(Activations::Device(view(x)));
    }

    fn stores(
        on: &Self::Context,
        need: &ActivationSizes,
    ) -> ActivationStores<Self::ActivationStore> {
        let none = ActivationStores {
            hidden: None,
            float: None,
            inputs: None,
            shared_kv: None,
            by_token: None,
            inner: None,
            donors: need.shared_kv.0,
        };
        let fit = places_on_device(need, on.context.memory());
        let fit = fit.map_err(|error| CudaError::Invalid(error.to_string()));
        let Some(fit) = on.note(fit) else {
            return none;
        };
        let store = |places: usize, columns: [usize; 2], fit: StoreBudget| {
            let bytes = columns.map(|columns| need.rows * columns * 2);
            let store = ActivationStore::new(on.gpu(), places, bytes, fit.places, fit.slots);
            on.note(store).map(Rc::new)
        };
        let hidden = [need.hidden; 2];
        // A gated product that does not fit is computed again sooner than it would cross the bus twice.
        let inner = [need.inner, need.attention];
        let followed = need.float.unwrap_or(0);
        let some = |places: usize, columns: usize, fit: StoreBudget| match places {
            0 => None,
            _ => store(places, [columns; 2], fit),
        };
        let (donors, shared_kv) = need.shared_kv;
        let (blocks, by_token) = need.by_token;
        ActivationStores {
            hidden: store(need.batches, hidden, fit.hidden),
            float: some(followed, need.hidden, fit.float),
            inputs: some(need.kept_inputs(), need.hidden, fit.inputs),
            shared_kv: some(
                2 * donors * (need.batches + followed),
                shared_kv,
                fit.shared_kv,
            ),
            by_token: some(blocks * need.batches, by_token, fit.by_token),
            inner: store(need.batches, inner, fit.inner),
            donors,
        }
    }

    fn clear(store: &Self::ActivationStore, rows: usize, columns: usize) {
        if let Some(store) = store {
            store.clear(rows * columns * 2);
        }
    }

    fn has_room(store: &Self::ActivationStore, place: usize) -> bool {
        store.as_ref().is_some_and(|store| store.has_room(place))
    }

    fn offload(
        on: &Self::Context,
        store: &Self::ActivationStore,
        place: usize,
        x: &Tensor<Self, 2>,
    ) -> Placed {
        let from = view(x);
        if let Some(store) = store {
            on.note(store.put(place, from));
        }
        Placed {
            store: store.clone(),
            place,
            rows: from.rows(),
            columns: from.columns(),
        }
    }

    fn take(on: &Self::Context, kept: Placed) -> Tensor<Self, 2> {
        Self::fetch(on, &kept)
    }

    fn fetch(on: &Self::Context, kept: &Placed) -> Tensor<Self, 2> {
        let out = on.blank(kept.rows, kept.columns);
        if let Some(store) = &kept.store {
            on.note(store.get(kept.place, view(&out)));
        }
        out
    }

    fn project(
        on: &Self::Context,
        x: &Tensor<Self, 2>,
        weight: &Tensor<Self, 2>,
        bias: Option<&Self::Vector>,
    ) -> Tensor<Self, 2> {
        let (x, weight) = (view(x), view(weight));
        let out = on.blank(x.rows(), weight.rows());
        on.note(on.gpu().project(view(&out), x, weight));
        if let Some(Some(bias)) = bias {
            on.note(on.gpu().add_bias(view(&out), bias));
        }
        out
    }

    fn columns(on: &Self::Context, x: &Tensor<Self, 2>, columns: Range<usize>) -> Tensor<Self, 2> {
        let x = view(x).column_range(columns);
        let out = on.blank(x.rows(), x.columns());
        on.note(on.gpu().copy_columns(view(&out), x));
        out
    }

    fn add(
        on: &Self::Context,
        x: Tensor<Self, 2>,
        y: Tensor<Self, 2>,
        factor: f32,
    ) -> Tensor<Self, 2> {
        match factor == 1.0 {
            true => on.note(on.gpu().add(view(&x), view(&y))),
            false => on.note(on.gpu().add_scaled(view(&x), view(&y), factor)),
        };
        x
    }

    fn scale(on: &Self::Context, x: Tensor<Self, 2>, factor: f32) -> Tensor<Self, 2> {
        on.note(on.gpu().scale(view(&x), factor));
        x
    }

    fn norm(on: &Self::Context, x: &Tensor<Self, 2>, norm: &Self::Norm) -> Tensor<Self, 2> {
        let x = view(x);
        let out = on.blank(x.rows(), x.columns());
        if let Some(norm) = norm {
            on.note(on.gpu().norm(view(&out), x, norm));
        }
        out
    }

    fn rotate(
        on: &Self::Context,
        x: Tensor<Self, 2>,
        rotary: &Self::RotaryTable,
        tokens: usize,
    ) -> Tensor<Self, 2> {
        if let Some(rotary) = rotary {
            on.note(on.gpu().rotate(view(&x), rotary, tokens));
        }
        x
    }

    fn attend(
        on: &Self::Context,
        q: &Tensor<Self, 2>,
        k: &Tensor<Self, 2>,
        v: &Tensor<Self, 2>,
        tokens: usize,
        shape: AttentionShape,
    ) -> Tensor<Self, 2> {
        let [q, k, v] = [q, k, v].map(view);
        let out = on.blank(q.rows(), q.columns());
        on.note(on.gpu().attend(view(&out), q, k, v, tokens, shape));
        out
    }

    fn gate(
        on: &Self::Context,
        gate: Tensor<Self, 2>,
        up: &Tensor<Self, 2>,
        activation: Activation,
    ) -> Tensor<Self, 2> {
        on.note(on.gpu().gate(view(&gate), view(up), activation));
        gate
    }

    fn activate(on: &Self::Context, x: Tensor<Self, 2>, activation: Activation) -> Tensor<Self, 2> {
        let at = view(&x);
        let order = RowOrder::natural(at.columns());
        on.note(on.gpu().activate_rows(at, order, at, activation));
        x
    }

    fn is_finite(on: &Self::Context, x: &Tensor<Self, 2>) -> bool {
        on.note(on.gpu().first_not_finite(view(x)))
            .is_none_or(|found| found.is_none())
    }

    fn head(on: &Self::Context, head: HostHead) -> Result<ScoringHead, ModelError> {
        let (dtype, bytes) = head.source.plain_as_stored(&head.name)?;
        let weight = match dtype == E::DTYPE {
            true => Buffer::from_host(on.gpu(), &bytes)?,
            false => {
                let values = to_f32(dtype, &bytes).expect("stored weights are floats");
                rounded(on.gpu(), &values, head.width(), E::DTYPE)?
            }
        };
        ScoringHead::new(on.gpu(), weight, E::DTYPE, head)
    }

    fn head_input(head: &ScoringHead, hidden: Tensor<Self, 2>) -> Result<HeadInput, ModelError> {
        Ok(HeadInput::of_device(head.rows(view(&hidden))?))
    }
}

impl<E: Half> GradientBackend for Cuda<E> {
    fn duplicate(on: &OnCuda, x: &Tensor<Self, 2>) -> Tensor<Self, 2> {
        let [rows, columns] = x.dims();
        let out = on.blank(rows, columns);
        on.note(on.gpu().copy(view(&out), view(x)));
        out
    }

    fn project_backward(
        on: &OnCuda,
        dy: &Tensor<Self, 2>,
        weight: &Tensor<Self, 2>,
        outputs: Range<usize>,
    ) -> Tensor<Self, 2> {
        let weight = view(weight).row_range(outputs);
        let out = on.blank(dy.dims()[0], weight.columns());
        on.note(
            on.gpu()
                .project_backward(view(&out), view(dy), weight, false),
        );
        out
    }

    fn norm_backward(
        on: &OnCuda,
        dy: &Tensor<Self, 2>,
        x: &Tensor<Self, 2>,
        norm: &Self::Norm,
    ) -> Tensor<Self, 2> {
        let [rows, columns] = x.dims();
        let out = on.blank(rows, columns);
        if let Some(norm) = norm {
            on.note(on.gpu().norm_backward(view(&out), view(dy), view(x), norm));
        }
        out
    }

    fn attend_backward(
        on: &OnCuda,
        dy: &Tensor<Self, 2>,
        qkv: [&Tensor<Self, 2>; 3],
        tokens: usize,
        shape: AttentionShape,
    ) -> [Tensor<Self, 2>; 3] {
        let gradients = qkv.map(|x| {
            let [rows, columns] = x.dims();
            on.blank(rows, columns)
        });
        let qkv = qkv.map(view);
        let out = gradients.each_ref().map(view);
        on.note(on.gpu().attend_backward(out, view(dy), qkv, tokens, shape));
        gradients
    }

    fn gate_backward(
        on: &OnCuda,
        dy: &Tensor<Self, 2>,
        [gate, up]: [Tensor<Self, 2>; 2],
        activation: Activation,
    ) -> [Tensor<Self, 2>; 2] {
        let up = Self::duplicate(on, &up); // others may hold what a gate multiplies
        on.note(
            on.gpu()
                .gate_backward(view(dy), view(&gate), view(&up), activation),
        );
        [gate, up]
    }

    fn activate_backward(
        on: &OnCuda,
        dy: &Tensor<Self, 2>,
        x: Tensor<Self, 2>,
        activation: Activation,
    ) -> Tensor<Self, 2> {
        on.note(on.gpu().activate_backward(view(dy), view(&x), activation));
        x
    }

    fn row_squares(on: &OnCuda, x: &Tensor<Self, 2>) -> Vec<f64> {
        let squares = on.note(on.gpu().row_squares(view(x)));
        squares.unwrap_or_else(|| vec![f64::NAN]) // the error is kept for `check`
    }

    fn output_error(
        on: &OnCuda,
        y: &Tensor<Self, 2>,
        target: &Tensor<Self, 2>,
        scale: RowScale,
    ) -> f64 {
        let error = on.note(on.gpu().output_error(view(y), view(target), scale));
        error.unwrap_or(f64::NAN) // likewise
    }

    fn error_gradient(
        on: &OnCuda,
        y: &Tensor<Self, 2>,
        target: &Tensor<Self, 2>,
        scale: RowScale,
        factor: f32,
    ) -> Tensor<Self, 2> {
        let [rows, columns] = y.dims();
        let out = on.blank(rows, columns);
        let (gradient, y, target) = (view(&out), view(y), view(target));
        on.note((on.gpu()).error_gradient(gradient, y, target, scale, factor));
        out
    }
}

/// A norm on the GPU.
pub(crate) fn device_norm(
    gpu: &Arc<Gpu>,
    kind: NormKind,
    weight: &[f32],
    bias: Option<&[f32]>,
    eps: f64,
) -> Result<DeviceNorm, CudaError> {
    match kind {
        NormKind::Rms => DeviceNorm::rms(gpu, weight, eps as f32),
        NormKind::Layer => DeviceNorm::layer(gpu, weight, bias, eps as f32),
    }
}

/// Values `[rows, width]` on the GPU, rounded to `dtype`. In parts: the f32 copy on its way need not
/// exist as a whole.
fn rounded(
    gpu: &Arc<Gpu>,
    values: &[f32],
    width: usize,
    dtype: Dtype,
) -> Result<Buffer, CudaError> {
    let there = Buffer::new(gpu, values.len() * 2)?;
    let matrix = there.matrix([values.len() / width, width], dtype);
    let rows = (1 << 26) / width;
    for (index, values) in values.chunks(rows * width).enumerate() {
        let first = index * rows;
        gpu.upload(
            matrix.row_range(first..first + values.len() / width),
            values,
        )?;
    }
    Ok(there)
}
