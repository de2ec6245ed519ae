//! Contents of a folder and of its weight files.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use gptq_packer::SafetensorsFile;
use serde_json::Value;
use sha2::{Digest, Sha256};

/// Every path below `folder`, hidden ones included, sorted.
pub fn entries(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![folder.to_path_buf()];
    while let Some(folder) = open.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path.clone());
            }
            found.push(path);
        }
    }
    found.sort();
    found
}

/// sha256 of every file of a checkpoint by name, but for the run record, which holds times.
pub fn hashes(folder: &Path) -> BTreeMap<String, String> {
    entries(folder)
        .iter()
        .filter(|path| path.is_file())
        .map(|path| {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            let digest = Sha256::digest(fs::read(path).unwrap());
            let hex = digest.iter().map(|byte| format!("{byte:02x}")).collect();
            (name, hex)
        })
        .filter(|(name, _)| name != "gptq_run.json")
        .collect()
}

/// Both folders hold the same files, byte for byte.
#[track_caller]
pub fn same_files(left: &Path, right: &Path) {
    assert_eq!(hashes(left), hashes(right));
}

fn weight_files(folder: &Path) -> Vec<SafetensorsFile> {
    entries(folder)
        .iter()
        .filter(|path| path.extension().is_some_and(|end| end == "safetensors"))
        .map(|path| SafetensorsFile::open(path).unwrap())
        .collect()
}

/// Names of all tensors of a checkpoint.
pub fn tensor_names(folder: &Path) -> Vec<String> {
    weight_files(folder)
        .iter()
        .flat_map(|file| file.tensors().keys().cloned().collect::<Vec<_>>())
        .collect()
}

/// The stored bytes of a tensor of a checkpoint.
#[track_caller]
pub fn tensor(folder: &Path, name: &str) -> Vec<u8> {
    weight_files(folder)
        .iter()
        .find(|file| file.tensors().contains_key(name))
        .unwrap_or_else(|| panic!("no tensor `{name}`"))
        .read(name)
        .unwrap()
}

/// Changes the stored bytes of a tensor of a checkpoint of one file.
pub fn edit_tensor(folder: &Path, name: &str, edit: impl FnOnce(&mut [u8])) {
    let path = folder.join("model.safetensors");
    let file = SafetensorsFile::open(&path).unwrap();
    let mut tensors: Vec<_> = (file.tensors().iter())
        .map(|(name, info)| (name.as_str(), info.clone(), file.read(name).unwrap()))
        .collect();
    let edited = tensors.iter_mut().find(|(found, ..)| *found == name);
    edit(&mut edited.unwrap().2);
    let borrowed: Vec<_> = (tensors.iter())
        .map(|(name, info, bytes)| (*name, info.clone(), bytes.as_slice()))
        .collect();
    gptq_packer::write_safetensors(&path, &borrowed, &BTreeMap::new()).unwrap();
}

/// Changes a JSON file in place.
pub fn edit_json(path: &Path, edit: impl FnOnce(&mut Value)) {
    let mut value: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    edit(&mut value);
    fs::write(path, serde_json::to_vec_pretty(&value).unwrap()).unwrap();
}
