//! Divides GPU memory among the activation stores of a run.

use gptq_kernels::cuda::CudaError;

use crate::backend::{ActivationSizes, ActivationStores};

/// Memory that the driver, cuBLAS and cuSOLVER take for themselves, measured with nothing
/// allocated: 0.6 GB on an H200, and some room.
const LIBRARIES: usize = 850 << 20;

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

/// The part of each activation store that fits on the GPU beside everything else that a run needs there.
pub(crate) fn places_on_device(
    need: &ActivationSizes,
    memory: usize,
) -> Result<ActivationStores<StoreBudget>, CudaError> {
    let fixed = fixed_bytes(need);
    let Some(left) = memory.checked_sub(fixed) else {
        return Err(CudaError::Invalid(format!(
            "--gpu-memory of {:.1} GB is too little: a block, its solver and the libraries take \
             {:.1} GB beside the activations",
            memory as f64 / 1e9,
            fixed as f64 / 1e9
        )));
    };
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
    let [hidden, float, inputs, shared_kv, by_token, inner] = divide(
        [
            request(need.hidden, need.batches, 2),
            request(need.hidden, followed, 2),
            request(
                need.hidden,
                if need.keeps_inputs { need.batches } else { 0 },
                2,
            ),
            request(shared_kv, 2 * donors * (need.batches + followed), 1),
            request(by_token, blocks * need.batches, 1),
            StoreRequest {
                slot_bytes: row(need.attention),
                ..request(need.inner, need.batches, 1)
            },
        ],
        left,
    );
    Ok(ActivationStores {
        hidden,
        float,
        inputs,
        shared_kv,
        by_token,
        inner,
        donors,
    })
}

/// Bytes that a run needs on the GPU apart from activation stores.
fn fixed_bytes(need: &ActivationSizes) -> usize {
    let row = |columns: usize| need.rows * columns * 2;
    let widest = need.inner.max(need.hidden);
    // Weights of a block; a batch's temporaries, of which three are as wide as the feed-forward;
    // scores; and either those or what solving the widest linear takes: the factor in f64 beside
    // H, a weight three times in f32, its codes.
    let temporaries = 3 * row(widest) + 4 * row(need.hidden) + (400 << 20);
    let solving = widest * widest * 8 + widest * need.hidden * 14;
    // Beside a float stream: its block, the rows' difference, two more matrices as large as H, and the
    // target of a linear, three times in f32.
    let (beside, temporaries, solving) = match need.float {
        Some(_) => (
            need.block_elements * 2 + widest * widest * 8,
            temporaries + row(widest),
            solving + widest * need.hidden * 12,
        ),
        None => (0, temporaries, solving),
    };
    LIBRARIES
        + need.block_elements * 2
        + (1 + need.more_hessians) * widest * widest * 4
        + beside
        + temporaries.max(solving)
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Llama 2 7B with 128 windows of 2048 tokens.
    const NEED: ActivationSizes = ActivationSizes {
        batches: 32,
        rows: 8192,
        hidden: 4096,
        attention: 4096,
        inner: 11008,
        shared_kv: (0, 0),
        by_token: (0, 0),
        block_elements: 202_375_168,
        float: None,
        keeps_inputs: false,
        more_hessians: 0,
    };

    #[test]
    fn a_larger_budget_keeps_more_activations_on_the_gpu() {
        let places = |gb: usize| {
            let fit = places_on_device(&NEED, gb * 1_000_000_000).unwrap();
            [fit.hidden.places, fit.inner.places]
        };
        let [six, ten, thirty] = [places(6), places(10), places(30)];
        assert_eq!(thirty, [32, 32]);
        assert_eq!((six[0], ten[0]), (32, 32), "hidden states come first");
        assert!(six[1] < ten[1] && ten[1] < 32, "{six:?} {ten:?}");
    }

    #[test]
    fn a_float_stream_leaves_less_room_for_inner_activations() {
        let need = ActivationSizes {
            float: Some(24),
            ..NEED
        };
        let fit = places_on_device(&need, 10_000_000_000).unwrap();
        let without = places_on_device(&NEED, 10_000_000_000).unwrap();
        let places = [fit.hidden, fit.float, without.float].map(|fit| fit.places);
        assert_eq!(places, [32, 24, 0]);
        assert!(fit.inner.places < without.inner.places, "{:?}", fit.inner);
    }

    #[test]
    fn what_crosses_the_bus_has_slots_and_nothing_else_has() {
        let need = ActivationSizes {
            float: Some(24),
            ..NEED
        };
        for gb in 6..20 {
            let fit = places_on_device(&need, gb * 1_000_000_000).unwrap();
            let slots = |fit: StoreBudget, all: usize, slots: usize| {
                let want = if fit.places < all { slots } else { 0 };
                assert_eq!(fit.slots, want, "{gb} GB: {fit:?}");
            };
            slots(fit.hidden, 32, 2);
            slots(fit.float, 24, 2);
            slots(fit.inner, 32, 1);
        }
    }

    #[test]
    fn places_and_slots_are_no_more_than_what_is_left() {
        let requests =
            [(3, 32, 2), (3, 28, 2), (8, 32, 1)].map(|(bytes, places, slots)| StoreRequest {
                bytes,
                places,
                slots,
                slot_bytes: bytes,
            });
        let all = 3 * 32 + 3 * 28 + 8 * 32;
        for left in 0..all + 30 {
            let taken = |(fit, request): (&StoreBudget, &StoreRequest)| {
                (fit.places + fit.slots) * request.bytes
            };
            let fits = divide(requests, left);
            let taken: usize = fits.iter().zip(&requests).map(taken).sum();
            assert!(taken <= left, "{left}: {fits:?}");
            if left >= all {
                assert_eq!(taken, all, "everything fits and nothing crosses: {fits:?}");
            }
        }
        let little = divide(requests, 12);
        assert_eq!(little.map(|fit| fit.slots), [0; 3], "too little for slots");
        assert_eq!(little.map(|fit| fit.places), [4, 0, 0]);
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
