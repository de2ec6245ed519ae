//! Runners against the pass that streams blocks, on a true tiny model.

#[path = "../../../tests/support/data.rs"]
mod data;
mod mixed;

use std::path::Path;
use std::sync::Arc;

use data::{fixture, shared};
use gptq_inference::{OpenedModel, RunError, Runner, compare, logits, open};
use gptq_model::DeviceContext;
use gptq_packer::SafetensorsFile;
use gptq_types::TensorSource;

/// Logits of two f32 passes that sum in other orders.
const TOLERANCE: f32 = 2e-4;
const VOCAB: usize = 512;
const IDS: [u32; 24] = [
    1, 403, 407, 261, 378, 286, 410, 352, 270, 290, 31, 77, 500, 402, 261, 13, 9, 280, 345, 260,
    267, 337, 335, 429,
];

fn model(dir: &Path) -> OpenedModel {
    let file = SafetensorsFile::open(&dir.join("model.safetensors")).unwrap();
    opened(dir, Arc::new(file))
}

fn opened(dir: &Path, source: Arc<dyn TensorSource>) -> OpenedModel {
    let text = |name: &str| std::fs::read_to_string(dir.join(name)).ok();
    let quantize_config = text("quantize_config.json");
    let config = text("config.json").unwrap();
    open(source, &config, quantize_config.as_deref()).unwrap()
}

/// Packed with natural groups in every width, and with act-order.
const PACKED: [&str; 5] = [
    "gptqmodel/4bit-32g-v1-sym",
    "gptqmodel/4bit-64g-v2-asym-act",
    "gptqmodel/2bit-32g-v2-sym",
    "gptqmodel/3bit-32g-v1-asym-act",
    "gptqmodel/8bit-64g-v1-sym-act",
];

/// The float model and the packed ones.
fn models() -> impl Iterator<Item = OpenedModel> {
    let all = ["verne"].into_iter().chain(PACKED);
    all.map(|name| model(&fixture(name)))
}

#[track_caller]
fn close(got: &[f32], want: &[f32]) {
    let found = compare(got, want, VOCAB);
    assert!(found.max_difference < TOLERANCE, "{found:?}");
}

fn streamed(model: &OpenedModel, ids: &[u32]) -> Vec<f32> {
    logits(model.decoder(&DeviceContext::Cpu).unwrap().as_mut(), ids).unwrap()
}

fn runner(model: &OpenedModel, batch: usize, capacity: usize) -> Box<dyn Runner> {
    let mut runner = model.runner(&DeviceContext::Cpu).unwrap();
    runner.reset(batch, capacity).unwrap();
    runner
}

#[test]
fn prompts_and_steps_give_the_logits_of_the_streaming_pass() {
    for model in models() {
        prompts_and_steps(&model);
    }
}

/// 172 channels, of which the last group and the last word are not full.
#[test]
fn widths_that_no_group_divides_are_run_as_they_are() {
    for name in [
        "data/stories260k",
        "golden/gptq-4bit-32g-act0-sym1",
        "golden/gptq_v2-4bit-64g-act1-sym0",
    ] {
        if let Some(dir) = shared(name) {
            prompts_and_steps(&model(&dir));
        }
    }
}

fn prompts_and_steps(model: &OpenedModel) {
    let want = streamed(model, &IDS);
    let row = |at: usize| &want[at * VOCAB..][..VOCAB];
    let last = IDS.len() - 1;

    let mut whole = runner(model, 1, IDS.len());
    close(&whole.prefill(0, &IDS).unwrap(), row(last));

    // Two prompts, so that the second looks back, then tokens one by one.
    let mut steps = runner(model, 1, IDS.len());
    steps.prefill(0, &IDS[..3]).unwrap();
    close(&steps.prefill(0, &IDS[3..8]).unwrap(), row(7));
    for at in 8..IDS.len() {
        close(steps.step(&IDS[at..=at]).unwrap(), row(at));
    }
    assert!(steps.peak_memory() > 0);

    // No prompt at all.
    let mut steps = runner(model, 1, 4);
    for at in 0..4 {
        close(steps.step(&IDS[at..=at]).unwrap(), row(at));
    }
}

#[test]
fn sequences_of_different_lengths_do_not_see_each_other() {
    for model in models() {
        let starts = [&IDS[..9], &IDS[5..6], &IDS[2..20]];
        let then = [[7u32, 300], [301, 8], [9, 10]];
        let mut together = runner(&model, 3, 20);
        for (sequence, ids) in starts.iter().enumerate() {
            together.prefill(sequence, ids).unwrap();
        }
        let mut got = Vec::new();
        for step in 0..2 {
            let tokens: Vec<u32> = then.iter().map(|tokens| tokens[step]).collect();
            got = together.step(&tokens).unwrap().to_vec();
        }
        for (sequence, ids) in starts.iter().enumerate() {
            let ids = [ids, &then[sequence][..]].concat();
            let want = streamed(&model, &ids);
            close(
                &got[sequence * VOCAB..][..VOCAB],
                &want[want.len() - VOCAB..],
            );
        }
    }
}

#[test]
fn a_reset_forgets_and_threads_change_nothing() {
    for model in models() {
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
            pool.build().unwrap().install(|| {
                let mut runner = runner(&model, 1, 24);
                runner.prefill(0, &IDS[3..20]).unwrap();
                runner.reset(2, 24).unwrap();
                let first = runner.prefill(1, &IDS[..20]).unwrap();
                let next = runner.step(&IDS[20..22]).unwrap();
                [&first, next].concat()
            })
        };
        let one = run(1);
        assert_eq!(one, run(3));
        let want = streamed(&model, &IDS[..20]);
        close(&one[..VOCAB], &want[19 * VOCAB..]);
    }
}

#[test]
fn calls_that_cannot_be_met_are_refused_with_their_numbers() {
    let model = model(&fixture("verne"));
    let mut runner = runner(&model, 2, 4);
    let refused = |result: Result<(), RunError>, text: &str| {
        assert_eq!(result.unwrap_err().to_string(), text);
    };
    let none = |_: Vec<f32>| ();
    refused(
        runner.prefill(2, &[1]).map(none),
        "sequence 2 is not one of 2",
    );
    refused(
        runner.prefill(0, &[]).map(none),
        "a prompt of no tokens says nothing about the next one",
    );
    refused(
        runner.prefill(0, &[1; 5]).map(none),
        "sequence 0 holds 0 of 4 tokens, 5 more do not fit",
    );
    refused(
        runner.prefill(0, &[512]).map(none),
        "token id 512 is outside the vocabulary of 512: the tokenizer does not belong to the model",
    );
    refused(
        runner.step(&[1]).map(|_| ()),
        "1 tokens were given to 2 sequences, one each is needed",
    );
    runner.prefill(1, &[1; 4]).unwrap();
    refused(
        runner.step(&[1, 1]).map(|_| ()),
        "sequence 1 holds 4 of 4 tokens, 1 more do not fit",
    );
}

#[test]
fn packed_beside_float_linears_are_read_as_they_are() {
    for name in PACKED {
        let (dir, float) = (fixture(name), fixture("verne"));
        let packed = model(&dir);
        let model = opened(&dir, Arc::new(mixed::Mixed::open(&dir, &float)));
        let want = streamed(&model, &IDS);
        assert_ne!(want, streamed(&packed, &IDS), "the floats are read");
        let row = |at: usize| &want[at * VOCAB..][..VOCAB];
        let mut runner = runner(&model, 1, IDS.len());
        close(&runner.prefill(0, &IDS[..9]).unwrap(), row(8));
        for at in 9..IDS.len() {
            close(runner.step(&IDS[at..=at]).unwrap(), row(at));
        }
    }
}
