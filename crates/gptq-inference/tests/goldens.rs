//! Checkpoints written by GPTQModel 7.7.0 must give the logits computed from their own tensors.

#[path = "../../../tests/support/data.rs"]
mod data;

use std::path::Path;
use std::sync::Arc;

use data::{fixture, shared};
use gptq_inference::{compare, logits, open, score_reference, score_windows, summarize};
use gptq_model::DeviceContext;
use gptq_packer::SafetensorsFile;
use gptq_types::TensorSource;

/// Logits of f32 arithmetic against f64.
const LOGIT_TOLERANCE: f32 = 1e-3;

fn decoder(dir: &Path) -> Box<dyn gptq_model::Decoder> {
    let source = Arc::new(SafetensorsFile::open(&dir.join("model.safetensors")).unwrap());
    let text = |name: &str| std::fs::read_to_string(dir.join(name)).ok();
    let quantize_config = text("quantize_config.json");
    let opened = open(
        source,
        &text("config.json").unwrap(),
        quantize_config.as_deref(),
    )
    .unwrap();
    opened.decoder(&DeviceContext::Cpu).unwrap()
}

fn check(model: &Path, expected: &Path) {
    let expected = SafetensorsFile::open(expected).unwrap();
    let ids: Vec<u32> = expected
        .bytes("input_ids")
        .unwrap()
        .chunks_exact(4)
        .map(|b| u32::from_le_bytes(b.try_into().unwrap()))
        .collect();
    let want: Vec<f32> = expected
        .bytes("logits")
        .unwrap()
        .chunks_exact(4)
        .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
        .collect();
    let got = logits(decoder(model).as_mut(), &ids).unwrap();
    let comparison = compare(&got, &want, 512);
    assert!(
        comparison.max_difference < LOGIT_TOLERANCE,
        "{}: {comparison:?}",
        model.display()
    );
}

/// Floats, and every width and format that GPTQModel writes.
#[test]
fn fixtures_give_the_logits_of_their_own_tensors() {
    let verne = fixture("verne");
    check(&verne, &verne.join("logits.safetensors"));
    let folders = std::fs::read_dir(fixture("gptqmodel")).unwrap();
    let mut checked = 0;
    for folder in folders.map(|entry| entry.unwrap().path()) {
        check(&folder, &folder.join("logits.safetensors"));
        checked += 1;
    }
    assert_eq!(checked, 16);
}

#[test]
fn golden_v1_sym() {
    let Some(dir) = shared("golden/gptq-4bit-32g-act0-sym1") else {
        return;
    };
    check(&dir, &dir.join("expected.safetensors"));
}

#[test]
fn golden_v2_act_order_asym() {
    let Some(dir) = shared("golden/gptq_v2-4bit-64g-act1-sym0") else {
        return;
    };
    check(&dir, &dir.join("expected.safetensors"));
}

#[test]
fn golden_unquantized() {
    let Some(dir) = shared("data/stories260k") else {
        return;
    };
    let Some(expected) = shared("golden/fp32_expected.safetensors") else {
        return;
    };
    check(&dir, &expected);
}

/// A model compared with itself does not diverge, and the block-wise pass gives the same
/// likelihoods as its logits.
#[test]
fn evaluation_agrees_with_the_logits() {
    let dir = fixture("verne");
    let windows = vec![vec![1, 403, 407, 261, 378], vec![1, 410, 352, 270, 290]];
    let mut model = decoder(&dir);
    let mut passes = 0;
    let mut count = || passes += 1;
    let (first, hidden) = score_reference(model.as_mut(), &windows, &mut count).unwrap();
    assert_eq!(passes, 5 + 1);
    let again = score_windows(model.as_mut(), &windows, Some(&hidden), &mut || {});
    let again = summarize(&again.unwrap(), &first);
    let first = summarize(&first, &[]);
    assert_eq!(first.nll, again.nll);
    let compared = again.comparison.unwrap();
    assert!(compared.kl.abs() < 1e-9);
    assert_eq!(compared.top1_agreement, 1.0);

    let mut nll = 0.0;
    for window in &windows {
        let all = logits(model.as_mut(), window).unwrap();
        for (row, &target) in all.chunks_exact(512).zip(&window[1..]) {
            let sum: f64 = row.iter().map(|&x| f64::from(x).exp()).sum();
            nll += (sum.ln() - f64::from(row[target as usize])) / 8.0;
        }
    }
    assert!(
        (first.nll - nll).abs() < 1e-5,
        "{} against {nll}",
        first.nll
    );
}
