//! `gptq verify DIR`: every file against the record of the run that wrote it.

use std::fs;
use std::path::{Path, PathBuf};

use gptq_types::{Dtype, TensorInfo};

use crate::support::{Family, Run, TinyModel, edit_json, gptq, quantize, run, write_text};

fn made(folder: &Path) -> PathBuf {
    let (model, text, out) = (
        folder.join("model"),
        folder.join("text.txt"),
        folder.join("out"),
    );
    let shapes = TinyModel::new(Family::Llama);
    shapes.write(&model);
    write_text(&text, shapes.vocab, 2_000);
    let mut command = quantize(&model, &out, &text);
    command.args(["--group-size", "none", "--desc-act", "--asym"]);
    let shards = [
        "--samples",
        "2",
        "--seq-len",
        "16",
        "--max-shard-size",
        "1MB",
    ];
    run(command.args(shards)).done();
    out
}

fn verified(out: &Path) -> Run {
    run(gptq("verify").arg(out))
}

#[test]
fn every_file_is_checked_against_the_record() {
    let folder = tempfile::tempdir().unwrap();
    let out = made(folder.path());
    let told = verified(&out).done();
    assert!(told.stdout.contains("4 of 4 files"), "{told:#?}");

    fs::write(out.join("README.md"), "x").unwrap();
    let told = verified(&out).done();
    assert!(
        told.stdout.contains("README.md is not in the record"),
        "{told:#?}"
    );

    let shard = out.join("model.safetensors");
    let whole = fs::read(&shard).unwrap();
    let mut flipped = whole.clone();
    *flipped.last_mut().unwrap() ^= 1;
    fs::write(&shard, &flipped).unwrap();
    let told = verified(&out).ended_with(1);
    assert!(
        told.stdout.contains("model.safetensors has sha256"),
        "{told:#?}"
    );
    fs::write(&shard, &whole[1..]).unwrap();
    let told = verified(&out).ended_with(1);
    assert!(told.stdout.contains("model.safetensors has"), "{told:#?}");
    fs::remove_file(&shard).unwrap();
    let told = verified(&out).ended_with(1);
    assert!(
        told.stdout.contains("model.safetensors is missing"),
        "{told:#?}"
    );
    fs::write(&shard, &whole).unwrap();
    verified(&out).done();

    edit_json(&out.join("gptq_run.json"), |run| {
        run["files"] = serde_json::json!({})
    });
    verified(&out).ended_with(2).error_line();
    fs::remove_file(out.join("gptq_run.json")).unwrap();
    verified(&out).ended_with(2).error_line();
}

/// One group a row: every g_idx is 0, and readers slow down or refuse at the word desc_act.
#[test]
fn act_order_without_groups_is_not_declared() {
    let folder = tempfile::tempdir().unwrap();
    let out = made(folder.path());
    for name in ["config.json", "quantize_config.json"] {
        let text = fs::read_to_string(out.join(name)).unwrap();
        assert!(text.contains(r#""desc_act": false"#), "{name}: {text}");
    }
    let told = run(gptq("inspect").arg(&out)).done();
    assert!(
        told.stdout.contains("0 linears with a permuted"),
        "{told:#?}"
    );
    let told = run(gptq("card").arg(&out)).done();
    assert!(!told.stdout.contains("is a permutation"), "{told:#?}");
}

#[test]
fn a_tolerance_is_a_number_and_so_is_a_logit() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    TinyModel::new(Family::Llama).write(&model);
    let expected = folder.path().join("logits.safetensors");
    let mut write = gptq("verify");
    write
        .arg(&model)
        .args(["--ids", "1,2,3", "--write"])
        .arg(&expected);
    run(&mut write).done();
    let against = |tolerance: &str| {
        let mut verify = gptq("verify");
        verify.arg(&model).arg("--expect").arg(&expected);
        run(verify.args(["--tolerance", tolerance]))
    };
    against("0").done();
    for tolerance in ["inf", "nan", "-1", "-inf"] {
        let told = against(tolerance).ended_with(2);
        assert!(told.error_line().contains("--tolerance"), "{told:#?}");
    }
    let ids: Vec<u8> = [1i32, 2].iter().flat_map(|id| id.to_le_bytes()).collect();
    let mut logits = vec![0u8; 2 * 128 * 4];
    logits[4..8].copy_from_slice(&f32::NAN.to_le_bytes());
    let info = |dtype, shape| TensorInfo { dtype, shape };
    let tensors = [
        ("input_ids", info(Dtype::I32, vec![2]), ids.as_slice()),
        ("logits", info(Dtype::F32, vec![2, 128]), &logits),
    ];
    gptq_packer::write_safetensors(&expected, &tensors, &Default::default()).unwrap();
    let told = against("1").ended_with(2);
    assert!(
        told.error_line().contains("token 0, entry 1 is NaN"),
        "{told:#?}"
    );
}
