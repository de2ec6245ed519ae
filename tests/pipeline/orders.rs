//! Orders that leave `g_idx` trivial by permuting channels, and the choice between orders.

use gptq_types::RunRecord;

use crate::support::{
    Family, TinyModel, gptq, json, quantize, run, tensor, tensor_names, write_text,
};

/// At 8 bits rounding costs nearly nothing: channels that do not fit together would cost all.
const SMALL_KL: f64 = 1e-3;

#[test]
fn permuted_channels_fit_together() {
    let folder = tempfile::tempdir().unwrap();
    let (model, text) = (folder.path().join("model"), folder.path().join("text.txt"));
    // Heads of two groups, two of them for one of the values; biases on values; a short last group.
    let shapes = TinyModel {
        head_dim: 32,
        ..TinyModel::new(Family::Qwen2)
    };
    shapes.write(&model);
    write_text(&text, shapes.vocab, 20_000);
    let made = |name: &str, flags: &[&str]| {
        let out = folder.path().join(name);
        let mut command = quantize(&model, &out, &text);
        command.args(["--bits", "8", "--group-size", "16", "--samples", "128"]);
        run(command.args(["--seq-len", "64"]).args(flags)).done();
        let record = std::fs::read(out.join("gptq_run.json")).unwrap();
        let record: RunRecord = serde_json::from_slice(&record).unwrap();
        (out, record)
    };
    let (natural, _) = made("natural", &[]);
    let (folded, record) = made("folded", &["--order", "folded"]);
    let (auto, chosen) = made("auto", &["--order", "auto", "--effort", "balanced"]);
    let (trained, of_trained) = made("trained", &["--order", "folded", "--effort", "best"]);

    for name in tensor_names(&folded) {
        if name.ends_with("g_idx") {
            let found = tensor(&folded, &name);
            let channels = 0..found.len() as u32 / 4;
            let trivial = channels.flat_map(|channel| (channel / 16).to_le_bytes());
            assert_eq!(found, trivial.collect::<Vec<u8>>(), "{name}");
            assert_eq!(found, tensor(&auto, &name), "{name}");
            assert_eq!(found, tensor(&trained, &name), "{name}");
        }
    }
    for layer in record.layers.iter().chain(&of_trained.layers) {
        let permutes = ["o_proj", "down_proj"]
            .iter()
            .any(|end| layer.layer.0.ends_with(end));
        assert_eq!(layer.folded.is_some(), permutes, "{}", layer.layer);
        assert_eq!(layer.order, None);
    }
    assert!(chosen.layers.iter().all(|layer| layer.order.is_some()));
    let bias = "model.layers.1.self_attn.v_proj.bias";
    assert_ne!(tensor(&folded, bias), tensor(&natural, bias));
    let sorted = |bytes: Vec<u8>| {
        let mut halves: Vec<_> = bytes.chunks(2).map(<[u8]>::to_vec).collect();
        halves.sort();
        halves
    };
    assert_eq!(
        sorted(tensor(&folded, bias)),
        sorted(tensor(&natural, bias))
    );

    let mut eval = gptq("eval");
    eval.arg(&model).args([&natural, &folded, &auto, &trained]);
    eval.arg("--dataset").arg(&text);
    let records = json(eval.args(["--seq-len", "64", "--max-windows", "16"]));
    for made in 1..5 {
        let kl = records[made]["kl"].as_f64().unwrap();
        assert!((0.0..SMALL_KL).contains(&kl), "{records:#}");
    }
}
