use super::*;

const GB: usize = 1_000_000_000;

/// A Llama of two blocks with `[hidden_size, intermediate_size, heads, kv_heads]`.
pub(crate) fn shape_of_a_llama([hidden, inner, heads, kv_heads]: [usize; 4]) -> ModelSpec {
    let config = serde_json::json!({
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_hidden_layers": 2,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": false,
    });
    ModelSpec::parse(&config.to_string()).unwrap()
}

const WINDOWS: [WindowRun; 1] = [WindowRun {
    windows: 128,
    tokens: 2048,
}];

/// 128 windows of 2048 tokens, without a float stream.
const FAST: GpuRun<'_> = GpuRun {
    windows: &WINDOWS,
    streams: Streams::One,
    training: None,
    more_hessians: 0,
};
const BALANCED: GpuRun<'_> = GpuRun {
    streams: Streams::BesideFloat,
    ..FAST
};
const BEST: GpuRun<'_> = GpuRun {
    training: Some(GroupSize::Channels(128)),
    ..BALANCED
};

fn seven() -> ModelSpec {
    shape_of_a_llama([4096, 11008, 32, 32])
}

fn need(run: &GpuRun<'_>) -> ActivationSizes {
    ActivationSizes::of_run(&seven(), run, BATCH_TOKENS)
}

#[test]
fn sizes_are_those_of_llama_2_7b() {
    let need = need(&BALANCED);
    assert_eq!((need.batches, need.rows, need.float), (32, 8192, Some(24)));
    assert_eq!(
        [need.hidden, need.attention, need.inner],
        [4096, 4096, 11008]
    );
    assert_eq!(need.block_elements, 202_375_168);
}

#[test]
fn a_larger_budget_keeps_more_activations_on_the_gpu() {
    let places = |gb: usize| {
        let fit = places_on_device(&need(&FAST), gb * GB).unwrap();
        [fit.hidden.places, fit.inner.places]
    };
    let [six, ten, thirty] = [places(6), places(10), places(30)];
    assert_eq!(thirty, [32, 32]);
    assert_eq!((six[0], ten[0]), (32, 32), "hidden states come first");
    assert!(six[1] < ten[1] && ten[1] < 32, "{six:?} {ten:?}");
}

#[test]
fn a_float_stream_leaves_less_room_for_inner_activations() {
    let fit = places_on_device(&need(&BALANCED), 10 * GB).unwrap();
    let without = places_on_device(&need(&FAST), 10 * GB).unwrap();
    let places = [fit.hidden, fit.float, without.float].map(|fit| fit.places);
    assert_eq!(places, [32, 24, 0]);
    assert!(fit.inner.places < without.inner.places, "{:?}", fit.inner);
}

#[test]
fn what_crosses_the_bus_has_slots_and_nothing_else_has() {
    for (run, least, followed, kept) in [(&BALANCED, 6, 24, 0), (&BEST, 8, 32, 32)] {
        for gb in least..30 {
            let fit = places_on_device(&need(run), gb * GB).unwrap();
            let slots = |fit: StoreBudget, all: usize, slots: usize| {
                let want = if fit.places < all { slots } else { 0 };
                assert_eq!(fit.slots, want, "{gb} GB: {fit:?}");
            };
            slots(fit.hidden, 32, 2);
            slots(fit.float, followed, 2);
            slots(fit.inputs, kept, 2);
            slots(fit.inner, 32, 1);
        }
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

/// Training was not counted at first: such a run began, and ended where memory did.
#[test]
fn training_a_7b_block_fits_ten_gigabytes_and_not_six() {
    let of = |gb: usize| GpuMemory::of(&seven(), &BEST, gb * GB);
    let all = of(40).unwrap();
    assert_eq!((all.in_host_memory, all.fetched_share), (0, 0.0));
    assert!(all.peak < 20 * GB, "{all:?}");
    assert!(all.least > 7 * GB && all.least < 8 * GB, "{all:?}");
    let ten = of(10).unwrap();
    assert_eq!(ten.least, all.least);
    assert!(ten.peak <= 10 * GB - LIBRARIES, "{ten:?}");
    assert!(ten.in_host_memory > 0 && ten.fetched_share > 0.0, "{ten:?}");
    let error = of(6).unwrap_err();
    assert_eq!(error.least, all.least);
    let text = error.to_string();
    assert!(text.contains("--gpu-memory of 6.0 GB"), "{text}");
    assert!(text.contains("its training"), "{text}");
    let named: f64 = text.split(" take ").nth(1).unwrap()[..3].parse().unwrap();
    let enough = (named * 1e9) as usize;
    assert!(GpuMemory::of(&seven(), &BEST, enough).is_ok(), "{text}");
}

#[test]
fn a_budget_below_what_a_block_needs_is_refused() {
    let error = places_on_device(&need(&FAST), 2 * GB).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("--gpu-memory of 2.0 GB"), "{text}");
    assert!(!text.contains("training"), "{text}");
}

/// `gpu_memory_peak` of runs on an H200, docs/runs/2026-12-01-h200-descent and -blocks.
#[test]
fn the_peak_is_that_of_a_record() {
    let seventy = shape_of_a_llama([8192, 28672, 64, 8]);
    for (spec, run, gb, recorded) in [
        (&seven(), &FAST, 10, 9.016e9),
        (&seven(), &BALANCED, 10, 8.742e9),
        (&seventy, &FAST, 40, 33.7e9),
    ] {
        let memory = GpuMemory::of(spec, run, gb * GB).unwrap();
        let ratio = memory.peak as f64 / recorded;
        assert!((0.95..1.1).contains(&ratio), "{memory:?}, {recorded}");
    }
}
