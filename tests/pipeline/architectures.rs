//! Every family is quantized and evaluated; what is not quantized passes through unchanged.

use gptq_types::Dtype;

use crate::support::{Family, TinyModel, gptq, json, quantize, tensor, tensor_names, write_text};

/// The divergence that 8-bit codes may cause in an untrained model, in nats.
const SMALL_KL: f64 = 0.01;

#[test]
fn llama_in_f16_tied() {
    quantized(&TinyModel {
        dtype: Dtype::F16,
        tied: true,
        ..TinyModel::new(Family::Llama)
    });
}

#[test]
fn mistral_in_f32_sharded() {
    quantized(&TinyModel {
        dtype: Dtype::F32,
        shards: 3,
        ..TinyModel::new(Family::Mistral)
    });
}

#[test]
fn qwen2_in_bf16_with_biases() {
    quantized(&TinyModel::new(Family::Qwen2));
}

#[test]
fn qwen3_in_bf16_tied_and_sharded_with_a_head_width_of_its_own() {
    quantized(&TinyModel {
        tied: true,
        shards: 2,
        ..TinyModel::new(Family::Qwen3)
    });
}

#[test]
fn every_family_is_known_by_its_name() {
    let folder = tempfile::tempdir().unwrap();
    for family in Family::ALL {
        let model = folder.path().join(family.model_type());
        TinyModel::new(family).write(&model);
        let found = json(gptq("inspect").arg(&model));
        assert_eq!(found["architecture"], family.model_type());
        assert!(found["quantization"].is_null());
    }
}

fn quantized(shapes: &TinyModel) {
    let folder = tempfile::tempdir().unwrap();
    let place = |name: &str| folder.path().join(name);
    let (model, text, out) = (place("model"), place("text.txt"), place("out"));
    shapes.write(&model);
    write_text(&text, shapes.vocab, 3_000);
    let mut command = quantize(&model, &out, &text);
    command.args(["--bits", "8", "--group-size", "32"]);
    let record = json(command.args(["--samples", "8", "--seq-len", "64"]));
    let layers = record["layers"].as_array().unwrap();
    assert_eq!(layers.len(), 7 * shapes.layers);

    let before = tensor_names(&model);
    let mut after = tensor_names(&out);
    for layer in layers {
        let name = layer["layer"].as_str().unwrap();
        assert!(before.contains(&format!("{name}.weight")));
        for suffix in ["qweight", "qzeros", "scales", "g_idx"] {
            let packed = format!("{name}.{suffix}");
            assert!(after.contains(&packed), "{packed}");
            after.retain(|name| *name != packed);
        }
    }
    // All other tensors were copied.
    for name in &after {
        assert_eq!(tensor(&model, name), tensor(&out, name), "{name}");
    }
    assert_eq!(after.len(), before.len() - layers.len());
    let biases = after.iter().filter(|name| name.ends_with("_proj.bias"));
    let expected = if shapes.family == Family::Qwen2 { 3 } else { 0 };
    assert_eq!(biases.count(), expected * shapes.layers);
    assert_eq!(
        after.iter().any(|name| name == "lm_head.weight"),
        !shapes.tied
    );

    let mut eval = gptq("eval");
    eval.arg(&model).arg(&out).arg("--dataset").arg(&text);
    let records = json(eval.args(["--seq-len", "64", "--max-windows", "8"]));
    let kl = records[1]["kl"].as_f64().unwrap();
    assert!((0.0..SMALL_KL).contains(&kl), "{records:#}");
    assert!(records[1]["perplexity"].as_f64().unwrap() > 1.0);
}
