//! `gptq verify`.

use std::collections::BTreeMap;
use std::path::Path;

use gptq_inference::{compare, logits};
use gptq_model::DeviceContext;
use gptq_packer::{SafetensorsFile, write_safetensors};
use gptq_types::{Dtype, TensorInfo};

use crate::Verdict;
use crate::args::VerifyArgs;
use crate::device;
use crate::failure::Failure;
use crate::models::{find, folder};
use crate::output::print;
use crate::records::check_folder;
use crate::unread_keys;

/// GPU memory that one short sequence may take.
const WORKSPACE: usize = 10_000_000_000;

pub fn run(args: &VerifyArgs) -> Result<Verdict, Failure> {
    if args.write.is_none() && args.expect.is_none() {
        return files(&folder(&args.model, &args.hub)?);
    }
    if !args.tolerance.is_finite() || args.tolerance < 0.0 {
        let text = format!(
            "--tolerance {} is not a number of 0 or more",
            args.tolerance
        );
        return Err(Failure::new(text));
    }
    let opened = find(&args.model, &args.hub)?.open()?;
    unread_keys::heed(&args.strict, &args.model, &opened.spec)?;
    let vocab = opened.spec.vocab_size;
    let mut decoder =
        opened.decoder(&DeviceContext::open(device::pick(args.device, WORKSPACE)?)?)?;
    if let Some(path) = &args.write {
        let got = logits(decoder.as_mut(), &args.ids)?;
        write(path, &args.ids, &got, vocab)?;
        eprintln!("wrote {}", path.display());
        return Ok(Verdict::Yes);
    }
    let path = args.expect.as_deref().unwrap_or(Path::new(""));
    let (ids, expected) = read(path, vocab)?;
    let got = logits(decoder.as_mut(), &ids)?;
    if let Some(at) = got.iter().position(|logit| !logit.is_finite()) {
        print(&format!(
            "the logit at token {}, entry {} is {}\n",
            at / vocab,
            at % vocab,
            got[at]
        ))?;
        return Ok(Verdict::No);
    }
    let found = compare(&got, &expected, vocab);
    print(&format!(
        "largest difference {:.3e} (got {}, expected {}) at token {}, entry {}; same top token {:.2} %; KL {:.3e}\n",
        found.max_difference,
        found.values.0,
        found.values.1,
        found.at.0,
        found.at.1,
        100.0 * found.top1_agreement,
        found.kl
    ))?;
    match found.max_difference <= args.tolerance {
        true => Ok(Verdict::Yes),
        false => Ok(Verdict::No),
    }
}

/// Every file against the sha256 that the folder's record lists.
fn files(folder: &Path) -> Result<Verdict, Failure> {
    let verdict = check_folder(folder)?;
    for (name, how) in &verdict.differing {
        print(&format!("{name} {how}\n"))?;
    }
    for name in &verdict.missing {
        print(&format!("{name} is missing\n"))?;
    }
    for name in &verdict.extra {
        print(&format!("{name} is not in the record: not checked\n"))?;
    }
    let all = verdict.sound.len() + verdict.differing.len() + verdict.missing.len();
    print(&format!(
        "{} of {all} files are as they were written\n",
        verdict.sound.len()
    ))?;
    match verdict.is_sound() {
        true => Ok(Verdict::Yes),
        false => Ok(Verdict::No),
    }
}

fn read(path: &Path, vocab: usize) -> Result<(Vec<u32>, Vec<f32>), Failure> {
    let file = SafetensorsFile::open(path)?;
    let tensor = |name: &str, dtype: Dtype, shape: &dyn Fn(&[usize]) -> bool, wanted: &str| {
        let info = file.tensors().get(name);
        match info.filter(|info| info.dtype == dtype && shape(&info.shape)) {
            Some(_) => Ok(file.read(name)?),
            None => Err(Failure::new(format!(
                "`{}` has no tensor `{name}` of {wanted}",
                path.display()
            ))),
        }
    };
    let ids = tensor(
        "input_ids",
        Dtype::I32,
        &|s| s.len() == 1 && s[0] > 0,
        "I32 [t]",
    )?;
    let tokens = ids.len() / 4;
    let wanted = format!("F32 [{tokens}, {vocab}]");
    let logits = tensor("logits", Dtype::F32, &|s| s == [tokens, vocab], &wanted)?;
    let words = |bytes: &[u8]| -> Vec<u32> {
        (bytes.chunks_exact(4))
            .map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            .collect()
    };
    let logits: Vec<f32> = words(&logits).into_iter().map(f32::from_bits).collect();
    match logits.iter().position(|logit| !logit.is_finite()) {
        None => Ok((words(&ids), logits)),
        Some(at) => Err(Failure::new(format!(
            "`{}`: the logit at token {}, entry {} is {}",
            path.display(),
            at / vocab,
            at % vocab,
            logits[at]
        ))),
    }
}

fn write(path: &Path, ids: &[u32], logits: &[f32], vocab: usize) -> Result<(), Failure> {
    let id_bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    let logit_bytes: Vec<u8> = logits.iter().flat_map(|x| x.to_le_bytes()).collect();
    let info = |dtype, shape| TensorInfo { dtype, shape };
    let tensors = [
        (
            "input_ids",
            info(Dtype::I32, vec![ids.len()]),
            id_bytes.as_slice(),
        ),
        (
            "logits",
            info(Dtype::F32, vec![ids.len(), vocab]),
            &logit_bytes,
        ),
    ];
    Ok(write_safetensors(path, &tensors, &BTreeMap::new())?)
}
