//! Model folders, whole and broken.
#![allow(missing_docs)]

use std::fs;
use std::path::Path;

use gptq_hub::{Checkpoint, HubError};
use gptq_packer::{SafetensorsFile, write_safetensors};
use gptq_types::{Dtype, TensorInfo, TensorSource};

#[path = "../../../tests/support/data.rs"]
mod data;

/// Writes tensors of one i32 each, holding 0, 1, 2, ...
fn write(dir: &Path, file: &str, names: &[&str]) {
    let values: Vec<[u8; 4]> = (0..names.len() as i32).map(i32::to_le_bytes).collect();
    let info = TensorInfo {
        dtype: Dtype::I32,
        shape: vec![1],
    };
    let tensors: Vec<_> = names
        .iter()
        .zip(&values)
        .map(|(name, value)| (*name, info.clone(), &value[..]))
        .collect();
    write_safetensors(&dir.join(file), &tensors, &Default::default()).unwrap();
}

fn write_index(dir: &Path, file: &str, pairs: &[(&str, &str)]) {
    let map: serde_json::Map<String, serde_json::Value> = pairs
        .iter()
        .map(|(tensor, shard)| (tensor.to_string(), (*shard).into()))
        .collect();
    let index = serde_json::json!({"metadata": {}, "weight_map": map});
    fs::write(dir.join(file), index.to_string()).unwrap();
}

const INDEX: &str = "model.safetensors.index.json";
const A: &str = "model-00001-of-00002.safetensors";
const B: &str = "model-00002-of-00002.safetensors";

fn two_shards() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), A, &["a", "b"]);
    write(dir.path(), B, &["c"]);
    write_index(dir.path(), INDEX, &[("a", A), ("b", A), ("c", B)]);
    dir
}

fn error_of(dir: &Path) -> String {
    let error = Checkpoint::open(dir).unwrap_err();
    let text = error.to_string();
    assert!(!text.contains('\n'), "{text}");
    text
}

#[test]
fn one_file_two_shards_and_other_names_open_alike() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), "model.safetensors", &["a", "b"]);
    fs::write(dir.path().join("config.json"), "{\"x\": 1}").unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.names(), ["a", "b"]);
    assert_eq!(checkpoint.bytes("b").unwrap(), [1, 0, 0, 0]);
    assert_eq!(checkpoint.config_json().unwrap(), "{\"x\": 1}");
    assert_eq!(checkpoint.dir(), dir.path());
    let bytes = fs::metadata(dir.path().join("model.safetensors"))
        .unwrap()
        .len();
    assert_eq!(checkpoint.weight_bytes(), bytes);
    assert!(checkpoint.require("z").is_err());

    // an index that names only that file agrees with it
    let single = "model.safetensors";
    write_index(dir.path(), INDEX, &[("a", single), ("b", single)]);
    assert!(Checkpoint::open(dir.path()).is_ok());

    let dir = two_shards();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.names(), ["a", "b", "c"]);
    assert_eq!(checkpoint.files(), [dir.path().join(A), dir.path().join(B)]);
    assert_eq!(checkpoint.info("c").unwrap().shape, [1]);

    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), "gptq_model-4bit-128g.safetensors", &["a"]);
    assert_eq!(Checkpoint::open(dir.path()).unwrap().names(), ["a"]);
}

#[cfg(unix)]
#[test]
fn links_into_the_blobs_of_a_cache_are_followed() {
    let dir = tempfile::tempdir().unwrap();
    let (blobs, snapshot) = (dir.path().join("blobs"), dir.path().join("snapshots/abc"));
    fs::create_dir_all(&blobs).unwrap();
    fs::create_dir_all(&snapshot).unwrap();
    write(&blobs, "0123", &["a"]);
    std::os::unix::fs::symlink("../../blobs/0123", snapshot.join("model.safetensors")).unwrap();
    assert_eq!(Checkpoint::open(&snapshot).unwrap().names(), ["a"]);
}

#[test]
fn places_without_weights_say_what_is_there() {
    let dir = tempfile::tempdir().unwrap();
    assert!(error_of(&dir.path().join("nowhere")).contains("nowhere` does not exist"));
    assert!(error_of(dir.path()).contains("holds no `*.safetensors` file"));
    fs::write(dir.path().join("pytorch_model.bin"), "x").unwrap();
    let error = Checkpoint::open(dir.path()).unwrap_err();
    assert!(error.to_string().contains("`pytorch_model.bin`"));
    assert!(error.to_string().contains("pickled weights are not read"));
    assert!(error.hint().unwrap().contains("safetensors"));
    let file = dir.path().join("pytorch_model.bin");
    assert!(error_of(&file).contains("is a file, not a model folder"));
}

#[test]
fn several_files_need_an_index() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), A, &["a"]);
    write(dir.path(), B, &["b"]);
    let text = error_of(dir.path());
    assert!(
        text.contains("no index") && text.contains(A) && text.contains(B),
        "{text}"
    );
}

#[test]
fn an_index_that_contradicts_is_refused() {
    let dir = two_shards();
    write(dir.path(), "model.safetensors", &["a"]);
    assert!(error_of(dir.path()).contains("`model.safetensors` lies beside it"));

    let dir = two_shards();
    fs::remove_file(dir.path().join(B)).unwrap();
    assert!(error_of(dir.path()).contains(&format!("`{B}`, which does not exist")));

    let dir = two_shards();
    write_index(dir.path(), INDEX, &[("a", A), ("c", A), ("b", B)]);
    let text = error_of(dir.path());
    assert!(
        text.contains("tensor `b` is not in") && text.contains(B),
        "{text}"
    );

    let dir = two_shards();
    write(dir.path(), B, &["c", "a"]);
    let text = error_of(dir.path());
    assert!(text.contains("tensor `a` is in both") && text.contains(A) && text.contains(B));

    let dir = two_shards();
    fs::write(dir.path().join(INDEX), "{\"weight_map\": 3}").unwrap();
    assert!(error_of(dir.path()).contains("not a safetensors index"));
}

#[test]
fn names_that_leave_the_folder_are_refused() {
    let outside = tempfile::tempdir().unwrap();
    write(outside.path(), "x.safetensors", &["a"]);
    let absolute = outside.path().join("x.safetensors");
    for name in [
        absolute.to_str().unwrap(),
        "../x.safetensors",
        "sub/x.safetensors",
        "..",
        "",
    ] {
        let dir = two_shards();
        write_index(dir.path(), INDEX, &[("a", name), ("c", B)]);
        let error = Checkpoint::open(dir.path()).unwrap_err();
        assert!(matches!(error, HubError::ShardName { .. }), "{error}");
    }
}

#[test]
fn a_shard_cut_short_is_named() {
    let dir = two_shards();
    let bytes = fs::read(dir.path().join(B)).unwrap();
    fs::write(dir.path().join(B), &bytes[..bytes.len() - 1]).unwrap();
    let text = error_of(dir.path());
    assert!(text.contains(B) && text.contains("cut short"), "{text}");
}

#[test]
fn what_is_no_model_folder_is_named() {
    // an adapter was once "holds no `*.safetensors` file", or a tensor that is missing
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), "adapter_model.safetensors", &["a"]);
    let config = r#"{"base_model_name_or_path": "acme/base", "peft_type": "LORA"}"#;
    fs::write(dir.path().join("adapter_config.json"), config).unwrap();
    assert!(error_of(dir.path()).ends_with("is an adapter of `acme/base`, not a model"));
    // with merged weights in the same folder it is a model
    write(dir.path(), "model.safetensors", &["a"]);
    Checkpoint::open(dir.path()).unwrap();

    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("model.Q4_0.gguf"), "GGUF").unwrap();
    let error = Checkpoint::open(dir.path()).unwrap_err();
    assert!(
        error.to_string().contains("`model.Q4_0.gguf` but no"),
        "{error}"
    );
    assert!(
        error
            .hint()
            .unwrap()
            .contains("gptq import model.Q4_0.gguf")
    );
}

#[test]
fn a_pointer_or_a_page_in_place_of_any_file_is_named() {
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n";
    for name in [
        "tokenizer.json",
        "config.json",
        "model.safetensors",
        INDEX,
        "vocab.json",
    ] {
        for (text, what) in [
            (pointer, "git-LFS pointer"),
            ("<!DOCTYPE html>", "web page"),
        ] {
            let dir = tempfile::tempdir().unwrap();
            write(dir.path(), "model.safetensors", &["a"]);
            fs::write(dir.path().join("config.json"), "{}").unwrap();
            fs::write(dir.path().join(name), text).unwrap();
            let error = Checkpoint::open(dir.path()).unwrap_err();
            let line = error.to_string();
            assert!(line.contains(name) && line.contains(what), "{line}");
            assert!(error.hint().is_some(), "{line}");
        }
    }
}

#[test]
fn the_declared_file_is_chosen_among_several() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), "gptq_model-4bit-32g.safetensors", &["a"]);
    write(dir.path(), "old.act-order.safetensors", &["b"]);
    assert!(error_of(dir.path()).contains("several weight files"));
    let settings = dir.path().join("quantize_config.json");
    fs::write(
        &settings,
        r#"{"model_file_base_name": "gptq_model-4bit-32g"}"#,
    )
    .unwrap();
    assert_eq!(Checkpoint::open(dir.path()).unwrap().names(), ["a"]);
    fs::write(&settings, r#"{"model_file_base_name": "../other"}"#).unwrap();
    assert!(error_of(dir.path()).contains("several weight files"));
}

#[test]
fn eight_bit_floats_are_read_by_blocks() {
    let dir = tempfile::tempdir().unwrap();
    let info = |dtype, shape: &[usize]| TensorInfo {
        dtype,
        shape: shape.to_vec(),
    };
    let scales: Vec<u8> = [1.0f32, 2.0].iter().flat_map(|x| x.to_le_bytes()).collect();
    let name = "model.layers.0.mlp.up_proj.weight";
    let scale = format!("{name}_scale_inv");
    let tensors = [
        (
            name,
            info(Dtype::F8E4M3, &[1, 4]),
            &[0x38, 0x38, 0x38, 0xb8][..],
        ),
        (scale.as_str(), info(Dtype::F32, &[1, 2]), &scales[..]),
    ];
    let path = dir.path().join("model.safetensors");
    write_safetensors(&path, &tensors, &Default::default()).unwrap();
    let config = r#"{"torch_dtype": "float32", "quantization_config":
        {"quant_method": "fp8", "weight_block_size": [128, 2]}}"#;
    fs::write(dir.path().join("config.json"), config).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.names(), [name]);
    assert_eq!(checkpoint.info(name).unwrap(), info(Dtype::F32, &[1, 4]));
    let bytes = checkpoint.bytes(name).unwrap();
    let values: Vec<f32> = (bytes.as_chunks::<4>().0.iter())
        .map(|bytes| f32::from_le_bytes(*bytes))
        .collect();
    assert_eq!(values, [1.0, 1.0, 2.0, -2.0]);
    // a multimodal model may declare the type for its decoder only
    let nested = config.replacen("\"torch_dtype\"", "\"text_config\": {\"dtype\"", 1);
    let nested = nested.replacen("\"float32\"", "\"float32\"}", 1);
    fs::write(dir.path().join("config.json"), nested).unwrap();
    let read = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(read.info(name).unwrap().dtype, Dtype::F32);
    let mut part = [0; 7];
    checkpoint.read_at(name, 6, &mut part).unwrap();
    assert_eq!(part, bytes[6..13]);
    assert!(checkpoint.notes()[0].contains("F8_E4M3"));

    write_safetensors(&path, &tensors[..1], &Default::default()).unwrap();
    let error = Checkpoint::open(dir.path()).unwrap_err();
    assert!(
        error.to_string().contains("no `weight_scale_inv`"),
        "{error}"
    );
    assert!(error.hint().is_some());
}

#[test]
fn settings_left_beside_floats_are_said() {
    // `quantize` once refused a folder that `eval` accepted, both without a reason
    let dir = tempfile::tempdir().unwrap();
    let half = TensorInfo {
        dtype: Dtype::F16,
        shape: vec![1],
    };
    let tensors = [("model.norm.weight", half, &[0, 0][..])];
    let path = dir.path().join("model.safetensors");
    write_safetensors(&path, &tensors, &Default::default()).unwrap();
    let config = r#"{"quantization_config": {"quant_method": "bitsandbytes"}}"#;
    fs::write(dir.path().join("config.json"), config).unwrap();
    let notes = Checkpoint::open(dir.path()).unwrap().notes();
    assert!(
        notes[0].contains("declares the quantization `bitsandbytes`"),
        "{notes:?}"
    );
}

#[test]
fn a_text_config_keeps_all_names() {
    let dir = tempfile::tempdir().unwrap();
    let names = [
        "language_model.lm_head.weight",
        "language_model.model.embed_tokens.weight",
        "vision_tower.layers.0.q_proj.weight",
    ];
    let wrapped = names.map(|name| format!("_orig_mod.{name}"));
    write(
        dir.path(),
        "model.safetensors",
        &wrapped.each_ref().map(|name| &name[..]),
    );
    let config = dir.path().join("config.json");
    fs::write(&config, r#"{"text_config": {"model_type": "gemma3_text"}}"#).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.names(), names);
    assert_eq!(checkpoint.bytes(names[2]).unwrap(), [2, 0, 0, 0]);
    assert_eq!(checkpoint.notes().len(), 1);
    // without `text_config` the folder claims to be a decoder, which it is not
    fs::write(&config, r#"{"text_config": null}"#).unwrap();
    assert!(error_of(dir.path()).contains("part of no decoder"));
}

#[test]
fn multimodal_folders_of_the_hub_open_with_their_names() {
    for name in [
        "gemma3_hub",
        "mistral3_hub",
        "qwen3_5_hub",
        "qwen3_5_moe_hub",
    ] {
        let Some(folder) = data::shared(&format!("golden-arch/{name}")) else {
            return;
        };
        let stored = SafetensorsFile::open(&folder.join("model.safetensors")).unwrap();
        let checkpoint = Checkpoint::open(&folder).unwrap();
        assert!(
            checkpoint.names().iter().eq(stored.tensors().keys()),
            "{name}"
        );
        assert!(checkpoint.notes().is_empty());
    }
}
