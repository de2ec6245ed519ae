//! Numbers and files that others published must come out again.

use std::fs;
use std::path::{Path, PathBuf};

use gptq_calibration::Tokenizer;
use gptq_types::{Dtype, TensorInfo};
use serde_json::Value;

use crate::support::{fixture, gptq, json, run, shared};

/// NLL of stories260k on the head of TinyStories, computed in f64 over 40 windows of 511 predictions.
const NLL_PER_TOKEN: f64 = 1.490_582_5;
/// f32 against f64 over five blocks.
const NLL_TOLERANCE: f64 = 1e-4;
const WINDOWS: usize = 40;
const CHUNK: usize = 511;
const BOS: u32 = 1;

/// Windows of the fixtures' scores, and their tokens.
const SCORED: usize = 64;
const SCORED_WINDOW: usize = 128;

#[test]
fn stories260k_has_its_likelihood() {
    let text = shared("data/tinystories/tinystories_head_944k.txt");
    let (Some(model), Some(text)) = (shared("data/stories260k"), text) else {
        return;
    };
    let story: String = fs::read_to_string(text)
        .unwrap()
        .chars()
        .take(60_000)
        .collect();
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
    let rows = rows.flat_map(|chunk| std::iter::once(&BOS).chain(chunk));
    let ids: Vec<u32> = rows.copied().collect();
    write_ids(path, [WINDOWS, 1 + CHUNK], &ids);
}

fn write_ids(path: &Path, shape: [usize; 2], ids: &[u32]) {
    let bytes: Vec<u8> = ids
        .iter()
        .flat_map(|&id| (id as i32).to_le_bytes())
        .collect();
    let info = TensorInfo {
        dtype: Dtype::I32,
        shape: shape.to_vec(),
    };
    let tensors = [("input_ids", info, bytes.as_slice())];
    gptq_packer::write_safetensors(path, &tensors, &Default::default()).unwrap();
}

/// Compared with transformers in f64 on the fixtures' tensors: all of GPTQModel's files at once, so
/// that the float model is scored once.
#[test]
fn checkpoints_of_another_tool_have_their_likelihood() {
    let folder = tempfile::tempdir().unwrap();
    let windows = folder.path().join("windows.safetensors");
    let tokenizer = Tokenizer::open(&fixture("verne")).unwrap();
    let text = fs::read_to_string(fixture("verne-held-out.txt")).unwrap();
    let ids = tokenizer.encode_plain(&text).unwrap();
    write_ids(
        &windows,
        [SCORED, SCORED_WINDOW],
        &ids[..SCORED * SCORED_WINDOW],
    );

    let folders = [vec![fixture("verne")], of_gptqmodel()].concat();
    let mut eval = gptq("eval");
    eval.args(&folders).arg("--dataset").arg(&windows);
    let records = json(eval.args(["--device", "cpu"]));
    for (index, folder) in folders.iter().enumerate() {
        let wanted = fs::read_to_string(folder.join("scores.json")).unwrap();
        let wanted: Value = serde_json::from_str(&wanted).unwrap();
        assert_eq!(wanted["windows"], SCORED);
        let (nll, wanted) = (&records[index]["nll"], &wanted["nll"]);
        let off = (nll.as_f64().unwrap() - wanted.as_f64().unwrap()).abs();
        assert!(off < NLL_TOLERANCE, "{}: {off}", folder.display());
    }
}

/// Every checkpoint among the fixtures that GPTQModel wrote.
fn of_gptqmodel() -> Vec<PathBuf> {
    let folders = fs::read_dir(fixture("gptqmodel")).unwrap();
    let mut folders: Vec<PathBuf> = folders.map(|entry| entry.unwrap().path()).collect();
    folders.sort();
    assert_eq!(folders.len(), 16);
    folders
}

/// The folder's name lists the settings that `inspect` must find: `4bit-64g-v2-asym-act`.
#[test]
fn checkpoints_of_another_tool_give_their_logits_and_are_what_they_are_called() {
    for checkpoint in of_gptqmodel() {
        let mut verify = gptq("verify");
        verify.arg(&checkpoint).arg("--expect");
        run(verify.arg(checkpoint.join("logits.safetensors"))).done();
        let found = json(gptq("inspect").arg(&checkpoint));
        let found = &found["quantization"];
        let name = checkpoint.file_name().unwrap().to_str().unwrap();
        let parts: Vec<&str> = name.split('-').collect();
        assert_eq!(format!("{}bit", found["bits"]), parts[0], "{name}");
        assert_eq!(format!("{}g", found["group_size"]), parts[1], "{name}");
        let zeros = match (parts[2], parts[3]) {
            (_, "asym") => "asymmetric: either",
            ("v1", _) => "gptq (v1)",
            _ => "gptq_v2",
        };
        assert_eq!(found["zero_points_found"], zeros, "{name}");
        assert_eq!(found["agrees"], true, "{name}");
        // Inputs of one group have no order to keep: of 64 and 160, with groups of 64, five of 35.
        let permuted = match (parts.len(), parts[1]) {
            (5, "32g") => 35,
            (5, _) => 5,
            _ => 0,
        };
        assert_eq!(found["act_order_layers"], permuted, "{name}");
    }
}

/// Widths that no group divides: stories260k has 172 inner channels.
#[test]
fn stories260k_of_another_tool_gives_its_logits() {
    let kinds = [
        ("gptq-4bit-32g-act0-sym1", 0, "gptq (v1)"),
        // Inputs are 64 or 172 wide; only the wider ones have several groups of 64 to permute.
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
