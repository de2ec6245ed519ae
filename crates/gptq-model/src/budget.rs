//! How much of a run's activations fits on the GPU, in bytes.

use gptq_kernels::cuda::CudaError;

use crate::backend::{ShelfNeed, Shelves};

/// Memory that the driver, cuBLAS and cuSOLVER take for themselves, measured with nothing
/// allocated: 0.6 GB on an H200, and some room.
const LIBRARIES: usize = 850 << 20;

/// What a shelf has on the GPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Fit {
    /// Places.
    pub places: usize,
    /// As large as a place in host memory, for copies beside the work of the GPU; none where every place is
    /// there.
    pub slots: usize,
}

/// What a shelf would have.
#[derive(Clone, Copy)]
struct Wish {
    bytes: usize, // of a place
    places: usize,
    slots: usize, // where not all places are on the GPU
    slot_bytes: usize,
}

/// How much of each shelf fits on the GPU beside everything else that a run needs there.
pub(crate) fn places_on_device(need: &ShelfNeed, memory: usize) -> Result<Shelves<Fit>, CudaError> {
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
    let wish = |columns: usize, places: usize, slots: usize| Wish {
        bytes: row(columns),
        places,
        slots,
        slot_bytes: row(columns),
    };
    let followed = need.float.unwrap_or(0);
    let (lenders, lent) = need.lent;
    let (blocks, by_token) = need.by_token;
    // The hidden states first: every tap reads them, and every step takes them and writes them again (in a
    // Llama five reads and two writes a block), each write between two reads; then what several blocks
    // read, or each block once; inner ones are read twice, and all written before any is read.
    let [hidden, float, lent, by_token, inner] = divide(
        [
            wish(need.hidden, need.batches, 2),
            wish(need.hidden, followed, 2),
            wish(lent, 2 * lenders * (need.batches + followed), 1),
            wish(by_token, blocks * need.batches, 1),
            Wish {
                slot_bytes: row(need.attention),
                ..wish(need.inner, need.batches, 1)
            },
        ],
        left,
    );
    Ok(Shelves {
        hidden,
        float,
        lent,
        by_token,
        inner,
        lenders,
    })
}

/// Bytes that a run needs whatever waits elsewhere.
fn fixed_bytes(need: &ShelfNeed) -> usize {
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

/// Divides `left` bytes among wishes, the first of them first. Those that are not granted as a whole
/// get their slots, which are worth more than as many places; with too little for these there are none.
fn divide<const N: usize>(wishes: [Wish; N], left: usize) -> [Fit; N] {
    let whole = |wish: &Wish| wish.places * wish.bytes;
    let slots = |wish: &Wish| match wish.places {
        0 => 0,
        _ => wish.slots * wish.slot_bytes,
    };
    let enough = |granted: &usize| {
        let (first, rest) = wishes.split_at(*granted);
        first.iter().map(whole).sum::<usize>() + rest.iter().map(slots).sum::<usize>() <= left
    };
    let granted = (0..=wishes.len()).rev().find(enough);
    let mut left = left;
    let mut fits = [Fit::default(); N];
    for (index, (fit, wish)) in fits.iter_mut().zip(&wishes).enumerate() {
        if granted.is_some_and(|granted| index >= granted && wish.places > 0) {
            fit.slots = wish.slots;
            left -= slots(wish);
        }
    }
    for (fit, wish) in fits.iter_mut().zip(&wishes) {
        fit.places = (left / wish.bytes.max(1)).min(wish.places);
        left -= fit.places * wish.bytes;
    }
    fits
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Llama 2 7B with 128 windows of 2048 tokens.
    const NEED: ShelfNeed = ShelfNeed {
        batches: 32,
        rows: 8192,
        hidden: 4096,
        attention: 4096,
        inner: 11008,
        lent: (0, 0),
        by_token: (0, 0),
        block_elements: 202_375_168,
        float: None,
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
        let need = ShelfNeed {
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
        let need = ShelfNeed {
            float: Some(24),
            ..NEED
        };
        for gb in 6..20 {
            let fit = places_on_device(&need, gb * 1_000_000_000).unwrap();
            let slots = |fit: Fit, all: usize, slots: usize| {
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
        let wishes = [(3, 32, 2), (3, 28, 2), (8, 32, 1)].map(|(bytes, places, slots)| Wish {
            bytes,
            places,
            slots,
            slot_bytes: bytes,
        });
        let all = 3 * 32 + 3 * 28 + 8 * 32;
        for left in 0..all + 30 {
            let taken = |(fit, wish): (&Fit, &Wish)| (fit.places + fit.slots) * wish.bytes;
            let fits = divide(wishes, left);
            let taken: usize = fits.iter().zip(&wishes).map(taken).sum();
            assert!(taken <= left, "{left}: {fits:?}");
            if left >= all {
                assert_eq!(taken, all, "everything fits and nothing crosses: {fits:?}");
            }
        }
        let little = divide(wishes, 12);
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
