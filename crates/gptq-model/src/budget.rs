//! What of a run fits on the GPU, in bytes.

use gptq_kernels::cuda::CudaError;

use crate::backend::{ShelfNeed, Shelves};

/// Memory that the driver, cuBLAS and cuSOLVER take for themselves, measured with nothing
/// allocated: 0.6 GB on an H200, and some room.
pub(crate) const LIBRARIES: usize = 850 << 20;

/// How many places of each shelf fit on the GPU beside everything else that a run needs there.
pub(crate) fn places_on_device(
    need: &ShelfNeed,
    memory: usize,
) -> Result<Shelves<usize>, CudaError> {
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
        true => (
            need.block_elements * 2 + widest * widest * 8,
            temporaries + row(widest),
            solving + widest * need.hidden * 12,
        ),
        false => (0, temporaries, solving),
    };
    let fixed = LIBRARIES
        + need.block_elements * 2
        + (1 + need.more_hessians) * widest * widest * 4
        + beside
        + temporaries.max(solving);
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
    let hidden = fit(row(need.hidden));
    let float = match need.float {
        true => fit(row(need.hidden)),
        false => 0,
    };
    Ok(Shelves {
        hidden,
        float,
        inner: fit(row(need.inner)),
    })
}

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
        float: false,
        more_hessians: 0,
    };

    #[test]
    fn a_larger_budget_keeps_more_activations_on_the_gpu() {
        let places = |gb: usize| {
            let fit = places_on_device(&NEED, gb * 1_000_000_000).unwrap();
            [fit.hidden, fit.inner]
        };
        let [six, ten, thirty] = [places(6), places(10), places(30)];
        assert_eq!(thirty, [32, 32]);
        assert_eq!((six[0], ten[0]), (32, 32), "hidden states come first");
        assert!(six[1] < ten[1] && ten[1] < 32, "{six:?} {ten:?}");
    }

    #[test]
    fn a_float_stream_leaves_less_room_for_inner_activations() {
        let need = ShelfNeed {
            float: true,
            ..NEED
        };
        let fit = places_on_device(&need, 10_000_000_000).unwrap();
        let without = places_on_device(&NEED, 10_000_000_000).unwrap();
        assert_eq!((fit.hidden, fit.float, without.float), (32, 32, 0));
        assert!(fit.inner < without.inner, "{}", fit.inner);
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
