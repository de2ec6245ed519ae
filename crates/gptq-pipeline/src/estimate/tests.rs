use gptq_types::{Effort, GroupSize, QuantSpec};

use super::*;

/// An H200, as it measures itself.
const H200: GpuSpeed = GpuSpeed {
    products: 760e12,
    f32: 51e12,
    f64: 62e12,
    bytes: 4.0e12,
};
const WINDOWS: [WindowRun; 1] = [WindowRun {
    windows: 128,
    tokens: 2048,
}];

/// A Llama with `[hidden_size, intermediate_size, heads, kv_heads, blocks, vocab_size]`.
fn llama([hidden, inner, heads, kv_heads, blocks, vocab]: [usize; 6]) -> ModelSpec {
    let config = serde_json::json!({
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_hidden_layers": blocks,
        "vocab_size": vocab,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": true,
    });
    ModelSpec::parse(&config.to_string()).unwrap()
}

fn seven() -> ModelSpec {
    llama([4096, 11008, 32, 32, 32, 32000])
}

/// The parts of an effort, with the six epochs of the runs that times were measured on.
fn spec(effort: Effort) -> QuantSpec {
    QuantSpec {
        input_mismatch: effort.input_mismatch(),
        descent_passes: effort.descent_passes(),
        training_epochs: if effort == Effort::Best { 6 } else { 0 },
        ..QuantSpec::published()
    }
}

fn on_h200(model: &ModelSpec, effort: Effort, memory: usize) -> Forecast {
    let machine = Machine::Gpu {
        speed: H200,
        memory,
    };
    forecast(model, &spec(effort), &WINDOWS, &machine).unwrap()
}

/// Measured seconds: docs/runs/2026-12-01-h200-descent and -blocks, and SmolLM2-135M of the same days.
#[test]
fn seconds_on_an_h200_are_within_a_quarter_of_measured_ones() {
    let smol = llama([576, 1536, 9, 3, 30, 49152]);
    let seventy = llama([8192, 28672, 64, 8, 4, 32000]);
    for (name, model, effort, gb, measured) in [
        ("7B", &seven(), Effort::Fast, 10, 20.2),
        ("7B", &seven(), Effort::Balanced, 10, 35.7),
        ("70B, four blocks", &seventy, Effort::Fast, 40, 14.5),
        ("135M", &smol, Effort::Balanced, 10, 10.0),
        ("135M", &smol, Effort::Best, 10, 32.7),
    ] {
        let forecast = on_h200(model, effort, gb * 1_000_000_000);
        let ratio = forecast.seconds / measured;
        assert!((0.75..1.25).contains(&ratio), "{name}: {forecast:?}");
    }
}

#[test]
fn training_is_most_of_the_work_and_names_its_memory() {
    let [balanced, best] =
        [Effort::Balanced, Effort::Best].map(|effort| on_h200(&seven(), effort, 40_000_000_000));
    assert!(
        best.seconds > 3.0 * balanced.seconds,
        "{best:?} {balanced:?}"
    );
    assert!(best.gpu_memory > balanced.gpu_memory);
    let little = on_h200(&seven(), Effort::Best, 10_000_000_000);
    assert!(little.seconds > best.seconds, "activations cross the bus");
    assert!(little.host_memory > best.host_memory);
    assert!(little.gpu_memory < best.gpu_memory);
    let machine = Machine::Gpu {
        speed: H200,
        memory: 5_000_000_000,
    };
    let spec = spec(Effort::Best);
    let refused = forecast(&seven(), &spec, &WINDOWS, &machine).unwrap_err();
    assert!(refused.to_string().contains("its training"), "{refused}");
    assert!(check_gpu_memory(&seven(), &spec, &WINDOWS, refused.least).is_ok());
    assert!(check_gpu_memory(&seven(), &spec, &WINDOWS, refused.least - 1).is_err());
}

/// A block more is a block's time more, and no memory.
#[test]
fn a_forecast_grows_with_the_blocks() {
    let of = |blocks| llama([4096, 11008, 32, 32, blocks, 32000]);
    let [four, eight, twelve] =
        [4, 8, 12].map(|blocks| on_h200(&of(blocks), Effort::Best, 40_000_000_000));
    let steps = [twelve.seconds - eight.seconds, eight.seconds - four.seconds];
    assert!((steps[0] / steps[1] - 1.0).abs() < 1e-9, "{steps:?}");
    assert_eq!(four.gpu_memory, twelve.gpu_memory);
    assert_eq!(four.host_memory, twelve.host_memory);
}

#[test]
fn training_takes_three_passes_with_gradients_and_one_without() {
    assert_eq!(trained_passes(0, 32), [0.0; 2]);
    assert_eq!(trained_passes(6, 32), [6.0 * 7.0 / 8.0, 7.0 / 8.0]);
    assert_eq!(trained_passes(2, 1), [2.0, 3.0]);
    let model = seven();
    let of = |effort| {
        let spec = spec(effort);
        let work = Work {
            model: &model,
            spec: &spec,
            windows: &WINDOWS,
        };
        time::flop(&work)
    };
    let pass: f64 = (0..32)
        .map(|index| model.block_flop(index, 128, 2048))
        .sum();
    let more = (of(Effort::Best) - of(Effort::Balanced)) / pass;
    // A float stream that follows a quarter of the tokens more, with its sums, and another pass at the end.
    let training = 6.0 * 3.0 * 7.0 / 8.0 + 7.0 / 8.0;
    assert!(more > training + 1.25 && more < training + 1.7, "{more}");
}

/// stories260K on two cores: 16 384 tokens in windows of 256, groups of 32.
#[test]
fn seconds_on_a_processor_are_within_a_quarter_of_measured_ones() {
    let stories = llama([64, 172, 8, 4, 5, 512]);
    let windows = [WindowRun {
        windows: 64,
        tokens: 256,
    }];
    let machine = Machine::Processor { products: 134e9 };
    for (effort, measured) in [(Effort::Balanced, 1.14), (Effort::Best, 7.5)] {
        let spec = QuantSpec {
            group_size: GroupSize::Channels(32),
            ..spec(effort)
        };
        let forecast = forecast(&stories, &spec, &windows, &machine).unwrap();
        let ratio = forecast.seconds / measured;
        assert!((0.75..1.25).contains(&ratio), "{effort:?}: {forecast:?}");
        assert_eq!(forecast.gpu_memory, None);
    }
}

#[test]
fn a_processor_holds_the_latents_of_a_block_and_the_inputs_of_all_tokens() {
    let [balanced, best] = [Effort::Balanced, Effort::Best].map(|effort| {
        let machine = Machine::Processor { products: 1e11 };
        let forecast = forecast(&seven(), &spec(effort), &WINDOWS, &machine);
        forecast.unwrap().host_memory
    });
    let inputs = 4 * 128 * 2048 * 4096;
    let weights = 202_375_168;
    assert!(best > balanced + inputs + 4 * weights, "{balanced} {best}");
    assert!(best < balanced + inputs + 30 * weights, "{balanced} {best}");
    // A plan of absurd sizes is refused for what it takes.
    let machine = Machine::Processor { products: 1e11 };
    let windows = [WindowRun {
        windows: usize::MAX,
        tokens: 2048,
    }];
    let absurd = forecast(&seven(), &spec(Effort::Best), &windows, &machine).unwrap();
    assert_eq!(absurd.host_memory, u64::MAX);
}
