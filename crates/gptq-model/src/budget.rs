//! Divides GPU memory among the activation stores of a run. Plain arithmetic: plans are made without a GPU too.

use gptq_types::GroupSize;

use crate::Streams;
use crate::backend::{ActivationSizes, ActivationStores};
use crate::batches::WindowRun;
use crate::spec::ModelSpec;

/// Memory that the driver, cuBLAS and cuSOLVER take for themselves, measured with nothing
/// allocated: 0.6 GB on an H200, and some room.
const LIBRARIES: usize = 850 << 20;

/// Rows of a batch on a GPU. Large products for the Hessian: each batch reads and writes all of the sum.
pub(crate) const BATCH_TOKENS: usize = 8192;

/// The part of an activation store that is on the GPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct StoreBudget {
    /// Slots on the GPU.
    pub places: usize,
    /// Staging buffers for copies that overlap with the work of the GPU; none if every slot is on the GPU.
    pub slots: usize,
}

/// The size that an activation store would like to have.
#[derive(Clone, Copy)]
struct StoreRequest {
    bytes: usize, // of a place
    places: usize,
    slots: usize, // where not all places are on the GPU
    slot_bytes: usize,
}

/// GPU memory in which a run does not fit, whatever waits in host memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "--gpu-memory of {:.1} GB is too little: a block, its solver{} and the libraries take {:.1} GB beside the \
     activations",
    *.memory as f64 / 1e9,
    if *.trains { ", its training" } else { "" },
    rounded_up(*.least)
)]
pub struct TooLittleMemory {
    /// Bytes that it may take.
    pub memory: usize,
    /// The least that would do.
    pub least: usize,
    /// Whether blocks are trained.
    pub trains: bool,
}

/// Tenths of GB, so that the number that an error names is enough.
fn rounded_up(bytes: usize) -> f64 {
    bytes.div_ceil(100_000_000) as f64 / 10.0
}

/// The activation stores of a run in the order in which they are served.
fn requests(need: &ActivationSizes) -> [StoreRequest; 6] {
    let row = |columns: usize| need.rows * columns * 2;
    let request = |columns: usize, places: usize, slots: usize| StoreRequest {
        bytes: row(columns),
        places,
        slots,
        slot_bytes: row(columns),
    };
    let followed = need.float.unwrap_or(0);
    let (donors, shared_kv) = need.shared_kv;
    let (blocks, by_token) = need.by_token;
    // The hidden states first: every tap reads them, and every step takes them and writes them again (in a
    // Llama five reads and two writes a block), each write between two reads; then what several blocks
    // read, or each block once; inner ones are read twice, and all written before any is read.
    [
        request(need.hidden, need.batches, 2),
        request(need.hidden, followed, 2),
        request(need.hidden, need.kept_inputs(), 2),
        request(shared_kv, 2 * donors * (need.batches + followed), 1),
        request(by_token, blocks * need.batches, 1),
        StoreRequest {
            slot_bytes: row(need.attention),
            ..request(need.inner, need.batches, 1)
        },
    ]
}

/// The part of each activation store that fits on the GPU beside everything else that a run needs there.
pub(crate) fn places_on_device(
    need: &ActivationSizes,
    memory: usize,
) -> Result<ActivationStores<StoreBudget>, TooLittleMemory> {
    let least = fixed_bytes(need);
    let Some(left) = memory.checked_sub(least) else {
        return Err(TooLittleMemory {
            memory,
            least,
            trains: need.training.is_some(),
        });
    };
    let [hidden, float, inputs, shared_kv, by_token, inner] = divide(requests(need), left);
    Ok(ActivationStores {
        hidden,
        float,
        inputs,
        shared_kv,
        by_token,
        inner,
        donors: need.shared_kv.0,
    })
}

/// Bytes that a run needs on the GPU apart from activation stores: libraries, weights, the latents of the block,
/// and either what solving its linears takes or, when that is freed, what training them takes.
fn fixed_bytes(need: &ActivationSizes) -> usize {
    let weights = match need.float {
        Some(_) => 2 * need.block_elements * 2,
        None => need.block_elements * 2,
    };
    let training = need.training.unwrap_or_default();
    let tape = need.rows * training.columns * 2;
    LIBRARIES + weights + training.latents + solving_bytes(need).max(training.beside_latents + tape)
}

/// Hessians, and either a batch's temporaries or what solving the widest linear takes.
fn solving_bytes(need: &ActivationSizes) -> usize {
    let row = |columns: usize| need.rows * columns * 2;
    let widest = need.inner.max(need.hidden);
    // Of the temporaries three are as wide as the feed-forward; scores. Solving takes the factor in f64 beside
    // H, a weight three times in f32, its codes.
    let temporaries = 3 * row(widest) + 4 * row(need.hidden) + (400 << 20);
    let solving = widest * widest * 8 + widest * need.hidden * 14;
    // Beside a float stream: the rows' difference, two more matrices as large as H, and the target of a linear,
    // three times in f32.
    let (sums, temporaries, solving) = match need.float {
        Some(_) => (
            widest * widest * 8,
            temporaries + row(widest),
            solving + widest * need.hidden * 12,
        ),
        None => (0, temporaries, solving),
    };
    (1 + need.more_hessians) * widest * widest * 4 + sums + temporaries.max(solving)
}

/// Divides `left` bytes among requests in order. A request that is not granted as a whole gets its staging buffers
/// first, which are worth more than as many slots on the GPU; with too little memory for them there are none.
fn divide<const N: usize>(requests: [StoreRequest; N], left: usize) -> [StoreBudget; N] {
    let whole = |request: &StoreRequest| request.places * request.bytes;
    let slots = |request: &StoreRequest| match request.places {
        0 => 0,
        _ => request.slots * request.slot_bytes,
    };
    let enough = |granted: &usize| {
        let (first, rest) = requests.split_at(*granted);
        first.iter().map(whole).sum::<usize>() + rest.iter().map(slots).sum::<usize>() <= left
    };
    let granted = (0..=requests.len()).rev().find(enough);
    let mut left = left;
    let mut fits = [StoreBudget::default(); N];
    for (index, (fit, request)) in fits.iter_mut().zip(&requests).enumerate() {
        if granted.is_some_and(|granted| index >= granted && request.places > 0) {
            fit.slots = request.slots;
            left -= slots(request);
        }
    }
    for (fit, request) in fits.iter_mut().zip(&requests) {
        fit.places = (left / request.bytes.max(1)).min(request.places);
        left -= fit.places * request.bytes;
    }
    fits
}

/// A run as GPU memory sees it.
#[derive(Clone, Copy, Debug)]
pub struct GpuRun<'a> {
    /// Calibration windows.
    pub windows: &'a [WindowRun],
    /// Passes beside each other.
    pub streams: Streams,
    /// Groups of the grids, where blocks are trained.
    pub training: Option<GroupSize>,
    /// What [`Decoder::leave_room`](crate::Decoder::leave_room) is told.
    pub more_hessians: usize,
}

/// What a run takes of a GPU's memory, before it begins.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GpuMemory {
    /// The least that must be granted.
    pub least: usize,
    /// Most bytes allocated at a time, as a record has them: without what libraries take for themselves.
    pub peak: usize,
    /// Activations that wait in host memory.
    pub in_host_memory: usize,
    /// The part of what a step of training reads, the block's inputs and targets, that comes from there.
    pub fetched_share: f64,
}

impl GpuMemory {
    /// Of a run that may take `memory` bytes.
    ///
    /// # Errors
    /// If that is too little.
    pub fn of(spec: &ModelSpec, run: &GpuRun<'_>, memory: usize) -> Result<Self, TooLittleMemory> {
        let need = ActivationSizes::of_run(spec, run, BATCH_TOKENS);
        let fits = places_on_device(&need, memory)?;
        let fits = [
            fits.hidden,
            fits.float,
            fits.inputs,
            fits.shared_kv,
            fits.by_token,
            fits.inner,
        ];
        let (mut there, mut waiting) = (0, 0);
        for (fit, request) in fits.iter().zip(requests(&need)) {
            there += fit.places * request.bytes + fit.slots * request.slot_bytes;
            waiting += (request.places - fit.places) * request.slot_bytes;
        }
        let read = [1, 2].map(|at| (fits[at].places, requests(&need)[at].places));
        let all: usize = read.iter().map(|(_, places)| places).sum();
        let near: usize = read.iter().map(|(near, _)| near).sum();
        let least = fixed_bytes(&need);
        Ok(GpuMemory {
            least,
            peak: least + there - LIBRARIES,
            in_host_memory: waiting,
            fetched_share: (all - near) as f64 / all.max(1) as f64,
        })
    }
}

#[cfg(test)]
pub(crate) mod tests;
