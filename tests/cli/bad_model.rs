//! Models that cannot be quantized: each is refused by name, and nothing is left behind.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use gptq_packer::{SafetensorsFile, write_safetensors};
use gptq_types::Dtype;
use half::f16;
use serde_json::json;

use crate::support::{
    Family, TinyModel, edit_json, gptq, quantize, refused, run, write_tensors, write_text,
};

const Q_PROJ: &str = "model.layers.1.self_attn.q_proj.weight";

/// A folder with a model, a text and room for an output.
struct Place {
    folder: tempfile::TempDir,
    model: PathBuf,
}

impl Place {
    fn new(shapes: &TinyModel) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let model = folder.path().join("model");
        shapes.write(&model);
        write_text(&folder.path().join("text.txt"), shapes.vocab, 2_000);
        Place { folder, model }
    }

    fn sharded() -> Self {
        Place::new(&TinyModel {
            shards: 2,
            ..TinyModel::new(Family::Llama)
        })
    }

    fn single() -> Self {
        Place::new(&TinyModel::new(Family::Llama))
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    fn quantize(&self) -> Command {
        let text = self.path().join("text.txt");
        let mut command = quantize(&self.model, &self.path().join("out"), &text);
        command.args(["--group-size", "32", "--samples", "4", "--seq-len", "32"]);
        command
    }

    #[track_caller]
    fn refuses(&self, names: &[&str]) {
        refused(&mut self.quantize(), self.path(), names);
    }

    fn config(&self, edit: impl FnOnce(&mut serde_json::Value)) {
        edit_json(&self.model.join("config.json"), edit);
    }

    fn index(&self, edit: impl FnOnce(&mut serde_json::Value)) {
        edit_json(&self.model.join("model.safetensors.index.json"), edit);
    }

    /// Writes the weights again with one tensor changed.
    fn change(&self, name: &str, change: impl FnOnce(&mut Vec<f32>)) {
        TinyModel::new(Family::Llama).write_changed(&self.model, |tensors| {
            let tensor = tensors.iter_mut().find(|tensor| tensor.name == name);
            change(&mut tensor.unwrap().values);
        });
    }
}

#[test]
fn a_truncated_shard() {
    let place = Place::sharded();
    let shard = place.model.join("model-00002-of-00002.safetensors");
    let length = fs::metadata(&shard).unwrap().len();
    let file = fs::File::options().write(true).open(&shard).unwrap();
    file.set_len(length - 10).unwrap();
    place.refuses(&["model-00002-of-00002.safetensors", "cut short"]);
    file.set_len(4).unwrap();
    place.refuses(&["model-00002-of-00002.safetensors", "cut short"]);
}

#[test]
fn an_index_that_names_a_missing_file() {
    let place = Place::sharded();
    fs::remove_file(place.model.join("model-00001-of-00002.safetensors")).unwrap();
    place.refuses(&[
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "does not exist",
    ]);
}

#[test]
fn an_index_that_leaves_the_folder() {
    let place = Place::sharded();
    let shard = "model-00001-of-00002.safetensors";
    fs::rename(place.model.join(shard), place.path().join(shard)).unwrap();
    for outside in [
        format!("../{shard}"),
        place.path().join(shard).display().to_string(),
    ] {
        place.index(|index| {
            for file in index["weight_map"].as_object_mut().unwrap().values_mut() {
                if file.as_str().unwrap().ends_with(shard) {
                    *file = json!(outside);
                }
            }
        });
        place.refuses(&["model.safetensors.index.json", &outside]);
    }
}

#[test]
fn a_tensor_in_two_shards() {
    let place = Place::sharded();
    let extra = "model-00001-of-00002.safetensors";
    TinyModel::new(Family::Llama).write_changed(&place.path().join("other"), |tensors| {
        let half: Vec<_> = tensors.iter().step_by(2).chain([&tensors[1]]).collect();
        write_tensors(&place.model.join(extra), &half, Dtype::BF16);
    });
    place.refuses(&[
        "model.norm.weight",
        extra,
        "model-00002-of-00002.safetensors",
    ]);
}

#[test]
fn a_missing_tensor() {
    let place = Place::single();
    TinyModel::new(Family::Llama).write_changed(&place.model, |tensors| {
        tensors.retain(|tensor| tensor.name != Q_PROJ);
    });
    place.refuses(&[Q_PROJ, &place.model.display().to_string(), "missing"]);
}

#[test]
fn a_tensor_of_another_shape() {
    let place = Place::single();
    TinyModel::new(Family::Llama).write_changed(&place.model, |tensors| {
        let tensor = tensors.iter_mut().find(|tensor| tensor.name == Q_PROJ);
        tensor.unwrap().shape.reverse();
        let tensor = tensors
            .iter_mut()
            .find(|tensor| tensor.name == "model.norm.weight");
        let norm = tensor.unwrap();
        norm.shape = vec![32];
        norm.values.truncate(32);
    });
    let model = place.model.display().to_string();
    place.refuses(&["model.norm.weight", "[32]", "[64]", &model]);
}

#[test]
fn a_tensor_that_the_architecture_would_ignore() {
    let place = Place::new(&TinyModel::new(Family::Qwen2));
    place.config(|config| config["model_type"] = json!("llama"));
    place.refuses(&["model.layers.0.self_attn.", "bias", "llama"]);
}

#[test]
fn a_weight_that_is_no_number() {
    let place = Place::single();
    for (value, shown) in [(f32::NAN, "NaN"), (f32::NEG_INFINITY, "inf")] {
        place.change(Q_PROJ, |values| values[77] = value);
        place.refuses(&[Q_PROJ, shown, "77", &place.model.display().to_string()]);
    }
    // The last tensor that any block uses is looked at before the first block.
    place.change("lm_head.weight", |values| values[3] = f32::INFINITY);
    place.refuses(&["lm_head.weight", "inf"]);
}

#[test]
fn the_tokenizer_of_another_model() {
    let place = Place::single();
    let larger = TinyModel {
        vocab: 256,
        ..TinyModel::new(Family::Llama)
    };
    larger.write(&place.path().join("larger"));
    fs::copy(
        place.path().join("larger/tokenizer.json"),
        place.model.join("tokenizer.json"),
    )
    .unwrap();
    place.refuses(&["tokenizer.json", "255", "128"]);
}

/// The library asserts on the table of a normalizer; what it printed before it was caught filled the
/// terminal.
#[test]
fn a_tokenizer_that_makes_its_library_panic() {
    let place = Place::single();
    edit_json(&place.model.join("tokenizer.json"), |tokenizer| {
        tokenizer["normalizer"] =
            json!({"type": "Precompiled", "precompiled_charsmap": "/////w=="});
    });
    place.refuses(&["tokenizer.json"]);
}

#[test]
fn a_missing_tokenizer() {
    let place = Place::single();
    fs::remove_file(place.model.join("tokenizer.json")).unwrap();
    place.refuses(&["tokenizer.json", &place.model.display().to_string()]);
}

#[test]
fn a_corrupt_tokenizer() {
    let place = Place::single();
    fs::write(place.model.join("tokenizer.json"), "{\"model\": [").unwrap();
    place.refuses(&["tokenizer.json"]);
}

#[test]
fn a_corrupt_config() {
    let place = Place::single();
    fs::write(
        place.model.join("config.json"),
        "{\"model_type\": \"llama\",",
    )
    .unwrap();
    place.refuses(&["config.json", &place.model.display().to_string()]);
    fs::write(place.model.join("config.json"), [0xff, 0xfe]).unwrap();
    place.refuses(&["config.json", &place.model.display().to_string()]);
    fs::remove_file(place.model.join("config.json")).unwrap();
    place.refuses(&["config.json", &place.model.display().to_string()]);
}

#[test]
fn an_unknown_architecture() {
    let place = Place::single();
    place.config(|config| config["model_type"] = json!("mamba"));
    place.refuses(&["`mamba`", "llama, ministral3, mistral"]);
}

#[test]
fn an_unknown_rope_scaling() {
    let place = Place::single();
    place.config(|config| config["rope_scaling"] = json!({"rope_type": "longrope", "factor": 2.0}));
    place.refuses(&["rope_scaling", "longrope"]);
    place.config(|config| config["rope_scaling"] = json!({"rope_type": "linear"}));
    place.refuses(&["config.json", "factor"]);
    // Without a type the kind of scaling is unknown.
    place.config(|config| config["rope_scaling"] = json!({"factor": 2.0}));
    place.refuses(&["config.json", "rope_type"]);
    place.config(|config| config["rope_scaling"] = json!("linear"));
    place.refuses(&["config.json", "rope_scaling"]);
}

#[test]
fn another_activation() {
    let place = Place::single();
    for value in [json!("gelu"), json!(["silu"])] {
        place.config(|config| config["hidden_act"] = value.clone());
        place.refuses(&["config.json", "hidden_act"]);
    }
}

#[test]
fn shapes_that_contradict_each_other() {
    let place = Place::single();
    place.config(|config| config["num_key_value_heads"] = json!(3));
    place.refuses(&["config.json", "num_attention_heads"]);
    place.config(|config| config["num_key_value_heads"] = json!("two"));
    place.refuses(&["config.json", "num_key_value_heads"]);
    place.config(|config| {
        config["num_key_value_heads"] = json!(2);
        config["num_hidden_layers"] = json!(3);
    });
    place.refuses(&["model.layers.2."]);
    place.config(|config| config["num_hidden_layers"] = json!(1));
    place.refuses(&["model.layers.1."]);
    place.config(|config| {
        config["num_hidden_layers"] = json!(2);
        config["hidden_size"] = json!(1u64 << 62);
    });
    place.refuses(&["config.json", "hidden_size"]);
    place.config(|config| config["hidden_size"] = json!(32));
    place.refuses(&["model.embed_tokens.weight"]);
}

/// K was taken from `g_idx`: two entries fewer have the same words, and a product asserted, exit 101.
#[test]
fn packed_tensors_of_another_shape_than_the_model() {
    let place = Place::single();
    let out = place.path().join("packed");
    let mut command = gptq("quantize");
    command.arg(&place.model).arg("--out").arg(&out);
    run(command.args(["--method", "rtn", "--group-size", "32"])).done();
    let path = out.join("model.safetensors");
    let file = SafetensorsFile::open(&path).unwrap();
    let whole: Vec<_> = (file.tensors().iter())
        .map(|(name, info)| (name.clone(), info.clone(), file.read(name).unwrap()))
        .collect();
    let text = place.path().join("text.txt");
    for suffix in ["g_idx", "scales", "qzeros", "qweight"] {
        let named = format!("model.layers.0.mlp.down_proj.{suffix}");
        let mut changed = whole.clone();
        let tensor = changed
            .iter_mut()
            .find(|(name, ..)| *name == named)
            .unwrap();
        tensor.1.shape[0] -= 1;
        tensor.2.truncate(tensor.1.bytes());
        let borrowed: Vec<_> = (changed.iter())
            .map(|(name, info, bytes)| (name.as_str(), info.clone(), bytes.as_slice()))
            .collect();
        write_safetensors(&path, &borrowed, &Default::default()).unwrap();
        let written = place.path().join("logits.safetensors");
        let flags: [(&str, Vec<&str>); 4] = [
            ("inspect", vec![]),
            (
                "verify",
                vec!["--write", written.to_str().unwrap(), "--ids", "1,2"],
            ),
            (
                "generate",
                vec!["--prompt", "w1", "--max-new-tokens", "2", "--device", "cpu"],
            ),
            (
                "eval",
                vec![
                    "--dataset",
                    text.to_str().unwrap(),
                    "--seq-len",
                    "32",
                    "--device",
                    "cpu",
                ],
            ),
        ];
        for (command, flags) in flags {
            let mut command = gptq(command);
            refused(command.arg(&out).args(flags), place.path(), &[&named]);
        }
    }
}

/// They ended in an abort, signal 6.
#[test]
fn a_measurement_that_fits_no_memory() {
    let place = Place::single();
    for batch in ["4000000000", "18446744073709551615"] {
        let mut command = gptq("eval");
        command
            .arg(&place.model)
            .arg("--dataset")
            .arg(place.path().join("text.txt"));
        command.args([
            "--seq-len",
            "32",
            "--device",
            "cpu",
            "--speed",
            "--speed-batch",
            batch,
        ]);
        let run = refused(&mut command, place.path(), &[batch, "GB are free"]);
        assert!(run.hint().is_some(), "{run:#?}");
    }
}

/// 10^7 blocks took 3 GB and 7 s, 2^63 aborted; heads of 2^63 times 2 wrapped around to none, and
/// `inspect` printed a number of parameters.
#[test]
fn sizes_that_no_tensor_backs() {
    let place = Place::single();
    for (key, value) in [
        ("num_hidden_layers", json!(10_000_000)),
        ("num_hidden_layers", json!(i64::MAX)),
        ("num_hidden_layers", json!(4000)),
        ("num_attention_heads", json!(1u64 << 63)),
        ("head_dim", json!(1u64 << 62)),
        ("head_dim", json!(0)),
        ("vocab_size", json!(1u64 << 40)),
        ("intermediate_size", json!(u64::MAX)),
        ("max_position_embeddings", json!(0)),
        ("max_position_embeddings", json!(u64::MAX)),
        ("rms_norm_eps", json!(-1.0)),
        ("rope_theta", json!(0.0)),
    ] {
        let mut before = json!(null);
        place.config(|config| {
            before = config[key].clone();
            config[key] = value.clone();
        });
        let named = if value == 4000 {
            "model.layers.2."
        } else {
            key
        };
        for command in ["inspect", "verify"] {
            let mut command = gptq(command);
            command.arg(&place.model);
            if command.get_args().next() == Some("verify".as_ref()) {
                let out = place.path().join("logits.safetensors");
                command.arg("--write").arg(out).args(["--ids", "1"]);
            }
            refused(&mut command, place.path(), &[named]);
        }
        place.config(|config| config[key] = before);
    }
}

/// Each was passed over in silence, and the logits were those of another model.
#[test]
fn keys_that_change_the_function() {
    let place = Place::single();
    for (key, value) in [
        ("partial_rotary_factor", json!(0.5)),
        (
            "rope_parameters",
            json!({"rope_type": "default", "partial_rotary_factor": 0.5}),
        ),
        (
            "rope_parameters",
            json!({"full_attention": {"rope_theta": 500_000.0}}),
        ),
        ("final_logit_softcapping", json!(30.0)),
        ("attention_multiplier", json!(0.0156)),
        ("query_pre_attn_scalar", json!(256)),
        ("layer_types", json!(["full_attention", "linear_attention"])),
        ("num_local_experts", json!(8)),
    ] {
        let named = match value.get("partial_rotary_factor") {
            Some(_) => "partial_rotary_factor",
            None => key,
        };
        place.config(|config| config[key] = value);
        place.refuses(&["config.json", named]);
        let run = run(gptq("inspect").arg(&place.model)).ended_with(1);
        assert!(run.stdout.contains("eval refuses"), "{run:#?}");
        assert!(run.stdout.contains(named), "{run:#?}");
        place.config(|config| config[key] = json!(null));
    }
}

/// A key that nobody knows is named once, in the record too, and refused where that is asked for.
#[test]
fn keys_that_nobody_knows() {
    let place = Place::single();
    place.config(|config| config["zeta_factor"] = json!(2.0));
    let mut strict = place.quantize();
    refused(strict.arg("--strict"), place.path(), &["zeta_factor"]);
    let warned = run(&mut place.quantize()).done();
    assert_eq!(
        warned.stderr.matches("zeta_factor").count(),
        1,
        "{warned:#?}"
    );
    let record = fs::read_to_string(place.path().join("out/gptq_run.json")).unwrap();
    assert!(record.contains("zeta_factor"), "{record}");
}

/// Readers differ in which of the two they take.
#[test]
fn a_tied_head_beside_another_one() {
    let place = Place::single();
    place.config(|config| config["tie_word_embeddings"] = json!(true));
    place.refuses(&["lm_head.weight", "tie_word_embeddings"]);
}

#[test]
fn a_group_larger_than_a_layer() {
    let place = Place::single();
    let mut command = gptq("quantize");
    command
        .arg(&place.model)
        .arg("--out")
        .arg(place.path().join("out"));
    command.args(["--method", "rtn"]);
    let run = refused(&mut command, place.path(), &["128", "64", "q_proj"]);
    assert!(run.hint().is_some(), "{run:#?}");
}

#[test]
fn shapes_that_3_bit_codes_cannot_fill() {
    let place = Place::new(&TinyModel {
        ffn: 112,
        ..TinyModel::new(Family::Llama)
    });
    let mut command = place.quantize();
    let names = ["3-bit", "112", "mlp.gate_proj"];
    let run = refused(command.args(["--bits", "3"]), place.path(), &names);
    assert!(run.hint().is_some(), "{run:#?}");
}

#[test]
fn a_model_that_is_quantized_already() {
    let place = Place::single();
    run(&mut place.quantize()).done();
    let packed = place.path().join("out");
    let packed_name = packed.display().to_string();
    // Before anything is fetched to calibrate on.
    let mut again = gptq("quantize");
    again
        .arg(&packed)
        .arg("--out")
        .arg(place.path().join("again"));
    refused(
        &mut again,
        place.path(),
        &[&packed_name, "quantized already"],
    );

    // Float tensors with such a declaration are left by merging an adapter: that model can be quantized.
    fs::remove_dir_all(&packed).unwrap();
    place.config(|config| config["quantization_config"] = json!({"quant_method": "awq"}));
    let told = run(&mut place.quantize()).done();
    assert!(told.stderr.contains("`awq`"), "{told:#?}");
}

/// Copies a packed checkpoint and changes the bytes of one tensor in the copy.
fn damage(packed: &Path, copy: &Path, name: &str, change: impl FnOnce(&mut [u8])) {
    let file = SafetensorsFile::open(&packed.join("model.safetensors")).unwrap();
    let mut stored: Vec<_> = file
        .tensors()
        .iter()
        .map(|(name, info)| (name.as_str(), info.clone(), file.read(name).unwrap()))
        .collect();
    let tensor = stored.iter_mut().find(|tensor| tensor.0 == name);
    change(&mut tensor.unwrap().2);
    let tensors: Vec<_> = stored
        .iter()
        .map(|(name, info, bytes)| (*name, info.clone(), bytes.as_slice()))
        .collect();
    fs::create_dir_all(copy).unwrap();
    for file in ["config.json", "quantize_config.json", "tokenizer.json"] {
        fs::copy(packed.join(file), copy.join(file)).unwrap();
    }
    write_safetensors(&copy.join("model.safetensors"), &tensors, file.metadata()).unwrap();
}

#[test]
fn a_packed_checkpoint_that_is_damaged() {
    let place = Place::single();
    run(&mut place.quantize()).done();
    let (packed, copy) = (place.path().join("out"), place.path().join("copy"));
    let text = place.path().join("text.txt");
    let layer = "model.layers.1.mlp.down_proj";
    let refuses = |names: &[&str]| {
        let mut eval = gptq("eval");
        eval.arg(&copy).arg("--dataset").arg(&text);
        refused(eval.args(["--seq-len", "32"]), place.path(), names);
    };
    let copy_name = copy.display().to_string();
    for group in [3i32, -1] {
        damage(&packed, &copy, &format!("{layer}.g_idx"), |bytes| {
            bytes[4..8].copy_from_slice(&group.to_le_bytes());
        });
        refuses(&[layer, &copy_name, &group.to_string()]);
    }
    for value in [f16::NAN, f16::NEG_INFINITY] {
        damage(&packed, &copy, &format!("{layer}.scales"), |bytes| {
            bytes[..2].copy_from_slice(&value.to_le_bytes());
        });
        refuses(&[layer, &copy_name]);
    }
    for (key, value) in [("bits", json!(8)), ("group_size", json!(64))] {
        damage(&packed, &copy, "model.norm.weight", |_| {});
        edit_json(&copy.join("quantize_config.json"), |config| {
            config[key] = value.clone()
        });
        refuses(&[&copy_name, key]);
        edit_json(&copy.join("config.json"), |config| {
            config["quantization_config"][key] = value.clone();
        });
        refuses(&["model.layers.0.", &copy_name]);
    }
    damage(&packed, &copy, "model.norm.weight", |_| {});
    fs::remove_file(copy.join("quantize_config.json")).unwrap();
    edit_json(&copy.join("config.json"), |config| {
        config
            .as_object_mut()
            .unwrap()
            .remove("quantization_config");
    });
    refuses(&[&copy_name, "quantize_config.json"]);
}

#[test]
fn a_folder_without_weights() {
    let place = Place::single();
    fs::remove_file(place.model.join("model.safetensors")).unwrap();
    place.refuses(&[&place.model.display().to_string()]);
    fs::write(place.model.join("pytorch_model.bin"), "").unwrap();
    place.refuses(&["pytorch_model.bin"]);
    fs::remove_dir_all(&place.model).unwrap();
    place.refuses(&[&place.model.display().to_string(), "does not exist"]);
}

#[test]
fn a_file_that_is_no_safetensors() {
    let place = Place::single();
    let weights = place.model.join("model.safetensors");
    fs::write(&weights, [b'{'; 64]).unwrap();
    place.refuses(&["model.safetensors"]);
    let mut header = 2u64.to_le_bytes().to_vec();
    header.extend(b"[]");
    fs::write(&weights, header).unwrap();
    place.refuses(&["model.safetensors"]);
}

#[test]
fn a_gguf_file_that_is_none() {
    let place = Place::single();
    let file = place.path().join("model.gguf");
    fs::write(&file, b"GGUF\x03\x00\x00\x00").unwrap();
    let mut import = gptq("import");
    import.arg(&file).arg("--out").arg(place.path().join("out"));
    refused(&mut import, place.path(), &["model.gguf"]);
    let mut command = gptq("inspect");
    let run = refused(command.arg(&file), place.path(), &["model.gguf"]);
    assert!(run.hint().unwrap().contains("gptq import"), "{run:#?}");
}

/// A tensor was called `\u{1b}[31m` and 100 kB of letters more; the error steered the terminal and
/// filled it.
#[test]
fn names_from_a_file_neither_steer_nor_fill_the_terminal() {
    let place = Place::sharded();
    let index = place.model.join("model.safetensors.index.json");
    let name = format!("\u{1b}[31m\nerror: {}", "x".repeat(100_000));
    edit_json(&index, |index| {
        let first = index["weight_map"].as_object().unwrap().values().next();
        let file = first.unwrap().clone();
        index["weight_map"][&name] = file;
    });
    let run = refused(&mut place.quantize(), place.path(), &["\\u{1b}[31m"]);
    assert!(run.error_line().len() < 1_200, "{}", run.error_line().len());
}

/// The perplexity was `inf`, and `null` in JSON, at exit 0.
#[test]
fn logits_beyond_any_perplexity() {
    let place = Place::single();
    place.change("lm_head.weight", |values| {
        values.iter_mut().for_each(|value| *value *= 1e9);
    });
    let text = place.path().join("text.txt");
    for format in [&[][..], &["--json"]] {
        let mut eval = gptq("eval");
        eval.arg(&place.model).arg("--dataset").arg(&text);
        eval.args(["--seq-len", "32", "--max-windows", "2"])
            .args(format);
        refused(&mut eval, place.path(), &["too much for a perplexity"]);
    }
    let mut checked = place.quantize();
    let failed = run(checked.args(["--check-windows", "2"])).ended_with(2);
    let error = failed.error_line();
    assert!(error.contains("float model: the mean negative"), "{error}");
    assert!(!place.path().join("out").exists());
}

/// The hint spoke of f16 on a processor, which computes in f32.
#[test]
fn hidden_states_beyond_f32() {
    let place = Place::single();
    place.change("model.layers.1.mlp.down_proj.weight", |values| {
        values.iter_mut().for_each(|value| *value = 3e38);
    });
    let mut eval = gptq("eval");
    eval.arg(&place.model).arg("--dataset");
    eval.arg(place.path().join("text.txt"));
    eval.args(["--seq-len", "32", "--max-windows", "2", "--device", "cpu"]);
    let told = refused(&mut eval, place.path(), &["block 1", "overflows F32"]);
    let hint = told.hint().unwrap();
    assert!(
        hint.contains("a weight is damaged") && !hint.contains("16"),
        "{hint}"
    );
}
