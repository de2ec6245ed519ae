//! One block is resident at a time, and one group of windows while evaluating: more of either take
//! no more memory.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use gptq_types::Dtype;

use crate::support::{Cause, Family, TinyModel, gptq, quantize, skipped, write_text};

/// Largest relative difference between the peaks of a small and a large run.
const TOLERANCE: f64 = 0.05;
/// From this size on the C library gives what is freed back at once. By itself it raises that size, to
/// 32 MB at most, with every larger piece that is freed: the matrices of real models lie above, those
/// of this one below, and pieces that it keeps for later moved the peak by a block's worth.
const MAPPED_FROM: (&str, &str) = ("MALLOC_MMAP_THRESHOLD_", "1000000");

#[test]
fn the_peak_does_not_grow_with_the_blocks() {
    let (Some(shallow), Some(deep)) = (peak_kib(2), peak_kib(16)) else {
        skipped(Cause::Machine, "VmHWM in /proc/PID/status");
        return;
    };
    let growth = deep as f64 / shallow as f64 - 1.0;
    eprintln!("peak of 2 blocks {shallow} KiB, of 16 blocks {deep} KiB");
    assert!(
        growth < TOLERANCE,
        "{shallow} KiB for 2 blocks, {deep} KiB for 16"
    );
}

/// 16 windows a group: their hidden states, those of the reference and one inner activation take
/// 20 MB, all windows' at once eight times that.
#[test]
fn the_peak_does_not_grow_with_the_windows() {
    let folder = tempfile::tempdir().unwrap();
    let (model, text) = (folder.path().join("model"), folder.path().join("text.txt"));
    let shapes = wide(2);
    shapes.write(&model);
    write_text(&text, shapes.vocab, 20_000);
    let peak_kib = |windows: &str| {
        let mut command = gptq("eval");
        // against itself, so that the states of a reference are kept
        command.arg(&model).arg(&model).arg("--dataset").arg(&text);
        command.args(["--seq-len", "128", "--max-windows", windows]);
        peak_kib_of(command.args(["--group-tokens", "2048"]))
    };
    let (Some(few), Some(many)) = (peak_kib("16"), peak_kib("128")) else {
        skipped(Cause::Machine, "VmHWM in /proc/PID/status");
        return;
    };
    let growth = many as f64 / few as f64 - 1.0;
    eprintln!("peak of 16 windows {few} KiB, of 128 windows {many} KiB");
    assert!(
        growth < TOLERANCE,
        "{few} KiB for 16 windows, {many} KiB for 128"
    );
}

/// A model whose weights would show among the activations.
fn wide(layers: usize) -> TinyModel {
    TinyModel {
        dtype: Dtype::F16,
        hidden: 512,
        ffn: 1408,
        heads: 8,
        kv_heads: 8,
        head_dim: 64,
        vocab: 512,
        layers,
        ..TinyModel::new(Family::Llama)
    }
}

/// Peak resident memory of a quantization.
fn peak_kib(layers: usize) -> Option<u64> {
    let folder = tempfile::tempdir().unwrap();
    let (model, text) = (folder.path().join("model"), folder.path().join("text.txt"));
    let shapes = wide(layers);
    shapes.write(&model);
    write_text(&text, shapes.vocab, 20_000);
    let mut command = quantize(&model, &folder.path().join("out"), &text);
    peak_kib_of(command.args(["--samples", "8", "--seq-len", "128"]))
}

/// Peak resident memory of a command.
fn peak_kib_of(command: &mut Command) -> Option<u64> {
    let (name, value) = MAPPED_FROM;
    command
        .env(name, value)
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    let status = format!("/proc/{}/status", child.id());
    let mut peak = None;
    // The mark only rises, so the last look before the end is the one that counts.
    let ended = loop {
        peak = high_water_mark(Path::new(&status)).or(peak);
        match child.try_wait().unwrap() {
            Some(ended) => break ended,
            None => std::thread::sleep(Duration::from_millis(50)),
        }
    };
    assert!(ended.success(), "{ended}");
    peak
}

fn high_water_mark(status: &Path) -> Option<u64> {
    let text = std::fs::read_to_string(status).ok()?;
    let line = text.lines().find(|line| line.starts_with("VmHWM:"))?;
    line.split_whitespace().nth(1)?.parse().ok()
}
