//! Text models inside multimodal checkpoints: other parts, and settings that are declared twice.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use gptq_packer::SafetensorsFile;
use serde_json::{Value, json};

use crate::support::{
    Family, Tensor, TinyModel, edit_json, gptq, quantize, refused, run, write_text,
};

const TOWER: &str = "model.audio_tower.layers.0.norm.weight";

struct Place {
    folder: tempfile::TempDir,
    model: PathBuf,
}

fn tensor(name: &str) -> Tensor {
    Tensor {
        name: name.to_string(),
        shape: vec![4],
        values: vec![1.0; 4],
    }
}

impl Place {
    /// A Llama under `model.language_model.` with a tower whose names sort before it.
    fn new(more: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let model = folder.path().join("model");
        let shapes = TinyModel::new(Family::Llama);
        shapes.write_changed(&model, |tensors| {
            for tensor in tensors.iter_mut() {
                if let Some(rest) = tensor.name.strip_prefix("model.") {
                    tensor.name = format!("model.language_model.{rest}");
                }
            }
            tensors.extend([TOWER].iter().chain(more).map(|name| tensor(name)));
        });
        edit_json(&model.join("config.json"), |config| {
            let text = config.take();
            *config = json!({"model_type": "llava", "text_config": text, "audio_config": {}});
        });
        write_text(&folder.path().join("text.txt"), shapes.vocab, 2_000);
        Place { folder, model }
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    fn config(&self, edit: impl FnOnce(&mut Value)) {
        edit_json(&self.model.join("config.json"), edit);
    }

    fn quantize(&self) -> Command {
        let text = self.path().join("text.txt");
        let mut command = quantize(&self.model, &self.path().join("out"), &text);
        command.args(["--group-size", "32", "--samples", "4", "--seq-len", "32"]);
        command
    }
}

/// They were copied unread. The last one is inside the decoder, and was not looked at where anything
/// carried came before it in the alphabet.
#[test]
fn a_tensor_of_the_text_model_that_nobody_reads_is_refused() {
    for name in [
        "lm_head.bias",
        "model.lm_head.weight",
        "model.norm.weight",
        "language_model.model.layers.0.self_attn.q_proj.bias",
        "model.language_model.norm.bias",
    ] {
        let place = Place::new(&[name]);
        refused(&mut place.quantize(), place.path(), &[name]);
        let mut eval = gptq("eval");
        eval.arg(&place.model).arg("--dataset");
        eval.arg(place.path().join("text.txt"));
        refused(eval.args(["--seq-len", "32"]), place.path(), &[name]);
    }
}

#[test]
fn what_belongs_to_other_parts_is_copied() {
    let place = Place::new(&["mtp.norm.weight", "model.image_newline"]);
    run(&mut place.quantize()).done();
    let file = SafetensorsFile::open(&place.path().join("out/model.safetensors")).unwrap();
    for name in [TOWER, "mtp.norm.weight", "model.image_newline"] {
        assert!(file.tensors().contains_key(name), "{name}");
    }
}

/// Readers took the one outside or the one inside.
#[test]
fn settings_outside_of_the_text_model_that_differ_are_refused() {
    let place = Place::new(&[]);
    for (key, value) in [
        ("tie_word_embeddings", json!(true)),
        ("rope_theta", json!(5e5)),
        ("final_logit_softcapping", json!(30.0)),
    ] {
        place.config(|config| config[key] = value);
        refused(&mut place.quantize(), place.path(), &[key, "text_config"]);
        place.config(|config| config[key] = json!(null));
    }
}

/// Such settings were once copied into the result, along with those of the checkpoint.
#[test]
fn settings_of_a_quantization_inside_a_part_are_told_and_not_copied() {
    for part in ["text_config", "audio_config"] {
        let place = Place::new(&[]);
        let settings = json!({"quant_method": "fp8", "bits": 8});
        place.config(|config| config[part]["quantization_config"] = settings.clone());
        let told = run(&mut place.quantize()).done();
        let words = "declares the quantization `fp8`, but all weights are float";
        assert!(told.stderr.contains(words), "{told:#?}");
        let config = fs::read_to_string(place.path().join("out/config.json")).unwrap();
        assert!(!config.contains("fp8"), "{config}");
        let config: Value = serde_json::from_str(&config).unwrap();
        assert!(config[part].get("quantization_config").is_none());
        assert_eq!(config["quantization_config"]["bits"], 4);
    }
}
