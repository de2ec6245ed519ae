//! Model folders, whole and broken.
#![allow(missing_docs)]

use std::fs;
use std::path::Path;

use gptq_hub::{Checkpoint, HubError};
use gptq_packer::write_safetensors;
use gptq_types::{Dtype, TensorInfo, TensorSource};

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
