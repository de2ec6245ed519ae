//! One block is resident at a time: more blocks take no more memory.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use gptq_types::Dtype;

use crate::support::{Family, TinyModel, quantize, write_text};

/// How far the peaks of a shallow and a deep model may lie apart.
const TOLERANCE: f64 = 0.1;

#[test]
fn the_peak_does_not_grow_with_the_blocks() {
    let (Some(shallow), Some(deep)) = (peak_kib(2), peak_kib(16)) else {
        eprintln!("skipped: /proc/PID/status has no VmHWM here");
        return;
    };
    let growth = deep as f64 / shallow as f64 - 1.0;
    eprintln!("peak of 2 blocks {shallow} KiB, of 16 blocks {deep} KiB");
    assert!(
        growth < TOLERANCE,
        "{shallow} KiB for 2 blocks, {deep} KiB for 16"
    );
}

/// Peak resident memory of a run over a model whose weights would show among the activations.
fn peak_kib(layers: usize) -> Option<u64> {
    let folder = tempfile::tempdir().unwrap();
    let (model, text) = (folder.path().join("model"), folder.path().join("text.txt"));
    let shapes = TinyModel {
        dtype: Dtype::F16,
        hidden: 512,
        ffn: 1408,
        heads: 8,
        kv_heads: 8,
        head_dim: 64,
        vocab: 512,
        layers,
        ..TinyModel::new(Family::Llama)
    };
    shapes.write(&model);
    write_text(&text, shapes.vocab, 20_000);
    let mut command = quantize(&model, &folder.path().join("out"), &text);
    command.args(["--samples", "8", "--seq-len", "128"]);
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    let status = format!("/proc/{}/status", child.id());
    let mut peak = None;
    // The mark only rises, so the last look before the end is the one that counts.
    let ended = loop {
        peak = high_water_mark(Path::new(&status)).or(peak);
        match child.try_wait().unwrap() {
            Some(ended) => break ended,
            None => std::thread::sleep(Duration::from_millis(2)),
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
