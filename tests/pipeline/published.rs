//! Numbers and files that others published must come out again.

use std::path::Path;

use gptq_calibration::Tokenizer;
use gptq_types::{Dtype, TensorInfo};

use crate::support::{gptq, json, run, shared, tiny_stories};

/// Of stories260k on the head of TinyStories: computed in f64, over 40 windows of 511 predictions.
const NLL_PER_TOKEN: f64 = 1.490_582_5;
/// f32 against f64 over five blocks.
const NLL_TOLERANCE: f64 = 1e-4;
const WINDOWS: usize = 40;
const CHUNK: usize = 511;
const BOS: u32 = 1;

#[test]
fn stories260k_has_its_likelihood() {
    let (Some(model), Some(story)) = (shared("data/stories260k"), tiny_stories(60_000)) else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let windows = folder.path().join("windows.safetensors");
    let tokenizer = Tokenizer::open(&model).unwrap();
    write_windows(&windows, &tokenizer.encode_plain(&story).unwrap());

    let mut eval = gptq("eval");
    let records = json(eval.arg(&model).arg("--dataset").arg(&windows));
    assert_eq!(records[0]["windows"], WINDOWS);
    assert_eq!(records[0]["seq_len"], 1 + CHUNK);
    assert_eq!(WINDOWS * CHUNK, 20_440);
    let nll = records[0]["nll"].as_f64().unwrap();
    let off = (nll - NLL_PER_TOKEN).abs();
    assert!(off < NLL_TOLERANCE, "{nll} is {off} off {NLL_PER_TOKEN}");
}

/// `input_ids` i32 `[40, 512]`: chunks of 511 tokens, each after a BOS.
fn write_windows(path: &Path, tokens: &[u32]) {
    let rows = tokens.chunks_exact(CHUNK).take(WINDOWS);
    let ids: Vec<u8> = rows
        .flat_map(|chunk| std::iter::once(&BOS).chain(chunk))
        .flat_map(|&id| (id as i32).to_le_bytes())
        .collect();
    let info = TensorInfo {
        dtype: Dtype::I32,
        shape: vec![WINDOWS, 1 + CHUNK],
    };
    let tensors = [("input_ids", info, ids.as_slice())];
    gptq_packer::write_safetensors(path, &tensors, &Default::default()).unwrap();
}

/// Checkpoints written by GPTQModel 7.7.0, with logits computed from their tensors in f64.
#[test]
fn checkpoints_of_another_tool_give_their_logits() {
    let kinds = [
        ("gptq-4bit-32g-act0-sym1", 0, "gptq (v1)"),
        // Of inputs 64 and 172, only the wider ones have several groups of 64 to permute.
        ("gptq_v2-4bit-64g-act1-sym0", 5, "asymmetric: either"),
    ];
    for (name, act_order_layers, zeros) in kinds {
        let Some(checkpoint) = shared(&format!("golden/{name}")) else {
            continue;
        };
        let expected = checkpoint.join("expected.safetensors");
        let mut verify = gptq("verify");
        run(verify.arg(&checkpoint).arg("--expect").arg(&expected)).done();
        let found = json(gptq("inspect").arg(&checkpoint));
        let found = &found["quantization"];
        assert_eq!(found["act_order_layers"], act_order_layers);
        assert_eq!(found["zero_points_found"], zeros);
        assert_eq!(found["agrees"], true);
    }
}
