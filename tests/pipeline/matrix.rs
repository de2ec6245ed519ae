//! Every kind of checkpoint is written, inspected, evaluated and read back to the same logits.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::support::{
    Family, TinyModel, gptq, json, quantize, run, small_model, tensor, write_text,
};

const GROUP: usize = 32;
const IDS: &str = "1,5,20,300,7,77,410,2";

struct Order {
    flags: &'static [&'static str],
    /// Whether g_idx is a permutation.
    permutes: bool,
}

#[test]
fn natural_order() {
    every_kind(&Order {
        flags: &[],
        permutes: false,
    });
}

#[test]
fn act_order() {
    every_kind(&Order {
        flags: &["--desc-act"],
        permutes: true,
    });
}

#[test]
fn act_order_with_static_groups() {
    every_kind(&Order {
        flags: &["--desc-act", "--static-groups"],
        permutes: false,
    });
}

#[test]
fn group_aware_order() {
    every_kind(&Order {
        flags: &["--act-group-aware"],
        permutes: false,
    });
}

/// A model, its text and its own logits.
struct Bench {
    folder: tempfile::TempDir,
    model: PathBuf,
    text: PathBuf,
    float_logits: PathBuf,
}

impl Bench {
    fn new(place: impl FnOnce(&Path) -> (PathBuf, PathBuf)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (model, text) = place(folder.path());
        let float_logits = folder.path().join("float.safetensors");
        write_logits(&model, &float_logits);
        Bench {
            model,
            text,
            float_logits,
            folder,
        }
    }
}

/// 172 channels, which no usual group size divides and no whole number of words holds.
fn odd_shapes(folder: &Path) -> (PathBuf, PathBuf) {
    let (model, text) = (folder.join("model"), folder.join("text.txt"));
    let shapes = TinyModel {
        ffn: 172,
        vocab: 512,
        ..TinyModel::new(Family::Llama)
    };
    shapes.write(&model);
    write_text(&text, shapes.vocab, 2_000);
    (model, text)
}

fn every_kind(order: &Order) {
    let (learned, odd_shapes) = (Bench::new(small_model), Bench::new(odd_shapes));
    for (bits, bench) in [
        (2, &odd_shapes),
        (3, &learned),
        (4, &odd_shapes),
        (8, &learned),
    ] {
        for format in ["gptq", "gptq_v2"] {
            for sym in [true, false] {
                one_kind(bench, order, bits, format, sym);
            }
        }
    }
}

fn one_kind(bench: &Bench, order: &Order, bits: u8, format: &str, sym: bool) {
    let symmetry = if sym { "--sym" } else { "--asym" };
    let name = format!("{bits}-{format}{symmetry}");
    let out = bench.folder.path().join(&name);
    let (bits_flag, group) = (bits.to_string(), GROUP.to_string());
    run(quantize(&bench.model, &out, &bench.text)
        .args(["--bits", &bits_flag, "--group-size", &group])
        .args(["--format", format, symmetry])
        .args(["--samples", "4", "--seq-len", "64"])
        .args(order.flags))
    .done();

    let found = json(gptq("inspect").arg(&out));
    check_inspection(&found["quantization"], order, bits, format, sym);
    for layer in found["quantization"]["layers"].as_array().unwrap() {
        check_groups(&out, layer, order.permutes);
    }

    let mut eval = gptq("eval");
    eval.arg(&out).arg("--dataset").arg(&bench.text);
    let records = json(eval.args(["--seq-len", "64", "--max-windows", "2"]));
    let perplexity = records[0]["perplexity"].as_f64();
    assert!(perplexity.is_some_and(|p| p > 1.0), "{name}: {records:#}");

    let logits = bench.folder.path().join(format!("{name}.safetensors"));
    write_logits(&out, &logits);
    expect_logits(&out, &logits).done();
    expect_logits(&out, &bench.float_logits).ended_with(1);
}

fn check_inspection(found: &Value, order: &Order, bits: u8, format: &str, sym: bool) {
    let zeros = match (sym, format) {
        (true, "gptq") => "gptq (v1)",
        (true, _) => "gptq_v2",
        (false, _) => "asymmetric: either",
    };
    assert_eq!(found["bits"], bits);
    assert_eq!(found["group_size"], GROUP);
    assert_eq!(found["sym"], sym);
    assert_eq!(found["declared_format"], format);
    assert_eq!(found["zero_points_found"], zeros);
    assert_eq!(found["agrees"], true);
    let layers = found["packed_layers"].as_u64().unwrap();
    assert!(
        layers > 0 && layers.is_multiple_of(7),
        "{layers} packed layers"
    );
    let permuted = if order.permutes { layers } else { 0 };
    assert_eq!(found["act_order_layers"], permuted);
}

/// g_idx puts every group's share of channels in it, in order or not.
fn check_groups(out: &Path, layer: &Value, permutes: bool) {
    let name = layer["name"].as_str().unwrap();
    let bytes = tensor(out, &format!("{name}.g_idx"));
    let mut g_idx: Vec<usize> = bytes
        .chunks_exact(4)
        .map(|b| i32::from_le_bytes([b[0], b[1], b[2], b[3]]) as usize)
        .collect();
    let trivial: Vec<usize> = (0..g_idx.len()).map(|channel| channel / GROUP).collect();
    assert_eq!(g_idx.len() as u64, layer["in_features"].as_u64().unwrap());
    assert_eq!(g_idx != trivial, permutes, "{name}");
    g_idx.sort_unstable();
    assert_eq!(g_idx, trivial, "{name}");
}

fn write_logits(model: &Path, file: &Path) {
    let mut verify = gptq("verify");
    verify.arg(model).arg("--write").arg(file);
    run(verify.args(["--ids", IDS])).done();
}

fn expect_logits(model: &Path, file: &Path) -> crate::support::Run {
    run(gptq("verify").arg(model).arg("--expect").arg(file))
}
