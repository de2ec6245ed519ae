//! The runner on a GPU against the pass in f32 on the processor, on a true tiny model. Skipped by
//! name where there is no GPU.
#![cfg(feature = "cuda")]
#![allow(clippy::print_stderr)]

#[path = "../../../tests/support/data.rs"]
mod data;
mod mixed;

use std::sync::{Arc, Mutex, MutexGuard};

use data::{Cause, fixture, skipped};
use gptq_inference::{OpenedModel, Runner, compare, logits, open};
use gptq_kernels::cuda::devices;
use gptq_model::{Device, DeviceContext};
use gptq_packer::SafetensorsFile;
use gptq_types::{Dtype, SourceError, TensorInfo, TensorSource};

/// Tolerances for sixteen-bit activations: largest difference of a logit (they span about 20), and mean
/// KL divergence in f16 and in bf16, which has an eighth of the precision. The pass that streams blocks
/// differs by as much on the same GPU.
const DIFFERENCE: f32 = 0.5;
const DIVERGENCE: [f64; 2] = [1e-4, 1e-2];
const VOCAB: usize = 512;
const IDS: [u32; 24] = [
    1, 403, 407, 261, 378, 286, 410, 352, 270, 290, 31, 77, 500, 402, 261, 13, 9, 280, 345, 260,
    267, 337, 335, 429,
];

/// One test at a time: a runner's memory is measured as that of the whole process.
fn alone() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(|held| held.into_inner())
}

/// A file in which the channels of some linears belong to other groups: other weights, but good ones.
struct Regrouped(SafetensorsFile);

impl TensorSource for Regrouped {
    fn place(&self) -> String {
        self.0.place()
    }

    fn names(&self) -> Vec<String> {
        self.0.names()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.0.info(name)
    }

    fn bytes(&self, name: &str) -> Result<Vec<u8>, SourceError> {
        let bytes = self.0.bytes(name)?;
        let other = ["k_proj.g_idx", "up_proj.g_idx"];
        if !other.iter().any(|suffix| name.ends_with(suffix)) {
            return Ok(bytes);
        }
        let (groups, _) = bytes.as_chunks::<4>();
        Ok(groups.iter().rev().flatten().copied().collect())
    }
}

fn weights(path: &str) -> SafetensorsFile {
    SafetensorsFile::open(&fixture(path).join("model.safetensors")).unwrap()
}

fn opened(path: &str, source: Arc<dyn TensorSource>) -> OpenedModel {
    let dir = fixture(path);
    let text = |name: &str| std::fs::read_to_string(dir.join(name)).ok();
    let quantize_config = text("quantize_config.json");
    let config = text("config.json").unwrap();
    open(source, &config, quantize_config.as_deref()).unwrap()
}

/// Floats, packed with natural groups, and packed with act-order.
const MODELS: [&str; 3] = [
    "verne",
    "gptqmodel/4bit-32g-v1-sym",
    "gptqmodel/4bit-64g-v2-asym-act",
];

/// `paths`, where there is a GPU.
fn with_a_gpu(paths: &'static [&'static str]) -> &'static [&'static str] {
    match devices().is_empty() {
        false => paths,
        true => {
            skipped(Cause::Machine, "a GPU");
            &[]
        }
    }
}

fn models() -> impl Iterator<Item = OpenedModel> {
    let found = with_a_gpu(&MODELS).iter();
    found.map(|path| opened(path, Arc::new(weights(path))))
}

fn packed() -> &'static [&'static str] {
    with_a_gpu(&MODELS[1..])
}

/// KL(want || got) of one position, nats.
fn divergence(got: &[f32], want: &[f32]) -> f64 {
    let log_sum = |x: &[f32]| x.iter().map(|&x| f64::from(x).exp()).sum::<f64>().ln();
    let (of_got, of_want) = (log_sum(got), log_sum(want));
    (got.iter().zip(want))
        .map(|(&got, &want)| {
            let (got, want) = (f64::from(got) - of_got, f64::from(want) - of_want);
            want.exp() * (want - got)
        })
        .sum()
}

/// Divergences of positions compared, and what their mean may be.
struct Seen {
    all: Vec<f64>,
    most: f64,
}

impl Seen {
    fn of(model: &OpenedModel) -> Self {
        let bf16 = model.embedding().unwrap().dtype == Dtype::BF16;
        Seen {
            all: Vec::new(),
            most: DIVERGENCE[usize::from(bf16)],
        }
    }

    #[track_caller]
    fn close(&mut self, got: &[f32], want: &[f32]) {
        let found = compare(got, want, VOCAB);
        assert!(found.max_difference < DIFFERENCE, "{found:?}");
        self.all.push(divergence(got, want));
    }
}

impl Drop for Seen {
    fn drop(&mut self) {
        let mean = self.all.iter().sum::<f64>() / self.all.len().max(1) as f64;
        eprintln!("mean KL {mean:.2e} of {} positions", self.all.len());
        assert!(
            std::thread::panicking() || mean < self.most,
            "mean KL {mean}"
        );
    }
}

/// The first GPU, of which a pass may take so many bytes.
fn opened_gpu(memory: usize) -> DeviceContext {
    DeviceContext::open(Device::Cuda { ordinal: 0, memory }).unwrap()
}

fn wanted(model: &OpenedModel, ids: &[u32]) -> Vec<f32> {
    let mut decoder = model.decoder(&DeviceContext::Cpu).unwrap();
    logits(decoder.as_mut(), ids).unwrap()
}

#[test]
fn the_streaming_pass_in_f16_is_no_closer() {
    let _alone = alone();
    for model in models() {
        let mut seen = Seen::of(&model);
        let device = opened_gpu(4 << 30);
        let got = logits(model.decoder(&device).unwrap().as_mut(), &IDS).unwrap();
        for (got, want) in got.chunks(VOCAB).zip(wanted(&model, &IDS).chunks(VOCAB)) {
            seen.close(got, want);
        }
    }
}

fn runner(model: &OpenedModel, batch: usize, capacity: usize) -> Box<dyn Runner> {
    let mut runner = model.runner(&opened_gpu(0)).unwrap();
    runner.reset(batch, capacity).unwrap();
    runner
}

#[test]
fn prompts_and_steps_give_the_logits_of_the_processor() {
    let _alone = alone();
    for model in models() {
        let mut seen = Seen::of(&model);
        let want = wanted(&model, &IDS);
        let row = |at: usize| &want[at * VOCAB..][..VOCAB];
        let last = IDS.len() - 1;

        let mut whole = runner(&model, 1, IDS.len());
        seen.close(&whole.prefill(0, &IDS).unwrap(), row(last));

        // Two prompts, so that the second looks back, then tokens one by one: the first step is
        // queued, those behind it run as recorded.
        let mut steps = runner(&model, 1, IDS.len());
        steps.prefill(0, &IDS[..3]).unwrap();
        seen.close(&steps.prefill(0, &IDS[3..8]).unwrap(), row(7));
        for at in 8..IDS.len() {
            seen.close(steps.step(&IDS[at..=at]).unwrap(), row(at));
        }
        assert!(steps.peak_memory() > 0);

        // A longer cache, of which several shares are empty.
        steps.reset(1, 700).unwrap();
        for at in 0..4 {
            seen.close(steps.step(&IDS[at..=at]).unwrap(), row(at));
        }
    }
}

#[test]
fn sequences_of_different_lengths_do_not_see_each_other() {
    let _alone = alone();
    for model in models() {
        let mut seen = Seen::of(&model);
        let starts = [&IDS[..9], &IDS[5..6], &IDS[2..20]];
        let then = [[7u32, 300, 12, 8], [301, 8, 9, 9], [9, 10, 11, 12]];
        let mut together = runner(&model, 3, 24);
        for (sequence, ids) in starts.iter().enumerate() {
            together.prefill(sequence, ids).unwrap();
        }
        let mut got = Vec::new();
        for step in 0..4 {
            let tokens: Vec<u32> = then.iter().map(|tokens| tokens[step]).collect();
            got = together.step(&tokens).unwrap().to_vec();
        }
        for (sequence, ids) in starts.iter().enumerate() {
            let ids = [ids, &then[sequence][..]].concat();
            let want = wanted(&model, &ids);
            let got = &got[sequence * VOCAB..][..VOCAB];
            seen.close(got, &want[want.len() - VOCAB..]);
        }
    }
}

/// q, k, v and gate, up that do not share an order are products of their own.
#[test]
fn linears_of_a_stage_with_other_groups_are_read_as_they_are() {
    let _alone = alone();
    for path in packed() {
        let model = opened(path, Arc::new(Regrouped(weights(path))));
        let mut seen = Seen::of(&model);
        let want = wanted(&model, &IDS);
        let row = |at: usize| &want[at * VOCAB..][..VOCAB];
        let mut runner = runner(&model, 1, IDS.len());
        seen.close(&runner.prefill(0, &IDS[..9]).unwrap(), row(8));
        for at in 9..IDS.len() {
            seen.close(runner.step(&IDS[at..=at]).unwrap(), row(at));
        }
    }
}

/// Rows of a float `o_proj` end where those of a packed one have padding, which must be zero again when the
/// packed one reads it: a second sequence would show the difference.
#[test]
fn packed_beside_float_linears_are_read_as_they_are() {
    let _alone = alone();
    for path in packed() {
        let mixed = mixed::Mixed::open(&fixture(path), &fixture("verne"));
        let model = opened(path, Arc::new(mixed));
        let mut seen = Seen::of(&model);
        let want = wanted(&model, &IDS);
        let row = |at: usize| &want[at * VOCAB..][..VOCAB];
        let mut runner = runner(&model, 2, IDS.len());
        for sequence in 0..2 {
            seen.close(&runner.prefill(sequence, &IDS[..9]).unwrap(), row(8));
        }
        for (at, &id) in IDS.iter().enumerate().skip(9) {
            let got = runner.step(&[id, id]).unwrap();
            seen.close(&got[..VOCAB], row(at));
            seen.close(&got[VOCAB..], row(at));
        }
    }
}

#[test]
fn two_runs_give_the_same_bits() {
    let _alone = alone();
    for model in models() {
        let run = || {
            let mut runner = runner(&model, 2, 300);
            runner.prefill(0, &IDS).unwrap();
            runner.prefill(1, &IDS[..7]).unwrap();
            (0..9)
                .map(|step| runner.step(&[step, 7]).unwrap().to_vec())
                .collect::<Vec<_>>()
        };
        assert_eq!(run(), run());
    }
}

#[test]
fn a_prompt_longer_than_a_piece_is_read_in_pieces() {
    let _alone = alone();
    for model in models() {
        let mut seen = Seen::of(&model);
        let ids: Vec<u32> = (0..2100).map(|at| IDS[at % 24]).collect();
        let want = wanted(&model, &ids);
        let mut runner = runner(&model, 1, ids.len() + 1);
        let got = runner.prefill(0, &ids).unwrap();
        seen.close(&got, &want[want.len() - VOCAB..]);
    }
}
