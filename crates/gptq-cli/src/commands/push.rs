//! `gptq push`.

use std::fs;
use std::path::Path;

use gptq_hub::{Push, PushContent, PushFile, Pushed, is_companion, parse_model_ref, push_branches};
use gptq_repository::{FolderContent, Repository, check_branch_names, folder_files};
use gptq_types::FileRecord;

use crate::Verdict;
use crate::args::PushArgs;
use crate::failure::Failure;
use crate::models::options;
use crate::progress::Bytes;
use crate::records::{
    BRANCH_RECORD, RUN_RECORD, check_branch_files, check_listed, read_json, read_run,
};

const MESSAGE: &str = "GPTQ checkpoint";
const CONFIG: &str = "config.json";
/// Files of a checkpoint folder other than weights and companions from the model.
const OWN_FILES: [&str; 6] = [
    CONFIG,
    "quantize_config.json",
    "model.safetensors.index.json",
    RUN_RECORD,
    BRANCH_RECORD,
    "README.md",
];

pub fn run(args: &PushArgs) -> Result<Verdict, Failure> {
    let target = parse_model_ref(&args.target)?;
    let named = args.target.contains(':');
    let branches = match is_checkpoint(&args.place) {
        true => {
            if !args.branch.is_empty() {
                return Err(Failure::with_hint(
                    "--branch is for a repository; this is one checkpoint",
                    format!("`gptq push DIR {}:BRANCH`", target.repo),
                ));
            }
            check_branch_names([target.revision.as_str()])?;
            vec![(target.revision, of_folder(&args.place)?)]
        }
        false if named => {
            return Err(Failure::with_hint(
                format!(
                    "`{}` names a branch, and a repository has its own",
                    args.target
                ),
                "choose some of them with --branch",
            ));
        }
        false => of_repository(args)?,
    };
    let push = Push {
        repo: &target.repo,
        private: args.private,
        update: args.update,
        branches,
        message: MESSAGE,
    };
    let mut bar = Bytes::new();
    let pushed = push_branches(&push, &options(&args.hub), &mut |file, done, all| {
        bar.show(file, done, all);
    })?;
    bar.end();
    for (branch, what) in pushed {
        match what {
            Pushed::AlreadyThere => eprintln!("{branch}: was there already"),
            Pushed::Committed { objects } => {
                eprintln!("{branch}: pushed, {objects} large files sent");
            }
        }
    }
    Ok(Verdict::Yes)
}

/// Whether a folder holds a checkpoint, not a repository of branches.
fn is_checkpoint(place: &Path) -> bool {
    place.join(CONFIG).exists()
}

fn of_repository(args: &PushArgs) -> Result<Vec<(String, Vec<PushFile>)>, Failure> {
    let repository = Repository::open(&args.place)?;
    let names = match args.branch.as_slice() {
        [] => repository.branches()?,
        chosen => chosen.to_vec(),
    };
    if names.is_empty() {
        let text = format!("`{}` has no branch", args.place.display());
        return Err(Failure::new(text));
    }
    (names.into_iter())
        .map(|name| Ok((name.clone(), of_branch(&repository, &name)?)))
        .collect()
}

fn of_branch(repository: &Repository, branch: &str) -> Result<Vec<PushFile>, Failure> {
    check_branch_files(repository, branch)?;
    (repository.files(branch)?.into_iter())
        .map(|file| {
            let content = match (repository.object(branch, &file)?, &file.oid) {
                (Some(object), Some(oid)) => PushContent::Object {
                    file: object,
                    oid: oid.clone(),
                },
                _ => PushContent::Inline {
                    bytes: repository.read(branch, &file.name)?.unwrap_or_default(),
                    git_oid: file.git_oid.clone(),
                },
            };
            Ok(PushFile {
                path: file.name,
                size: file.bytes,
                content,
            })
        })
        .collect()
}

/// The files of a folder that `quantize` wrote, each as its run record has it.
fn of_folder(folder: &Path) -> Result<Vec<PushFile>, Failure> {
    let names = checkpoint_names(folder)?;
    let refused = |text: String| Failure::new(format!("`{}`: {text}", folder.display()));
    let config: serde_json::Value = read_json(&folder.join(CONFIG))?;
    if !config["quantization_config"].is_object() {
        return Err(refused(format!("`{CONFIG}` has no quantization_config")));
    }
    if names.iter().all(|name| !is_weights(name)) {
        return Err(refused("it holds no safetensors".to_string()));
    }
    let files = folder_files(folder, &names)?;
    let found = (files.iter())
        .map(|file| {
            let record = FileRecord {
                bytes: file.bytes,
                sha256: file.sha256.clone(),
            };
            (file.name.clone(), record)
        })
        .collect();
    let record = folder.join(RUN_RECORD);
    let place = format!("`{}`", folder.display());
    if !record.exists() || !check_listed(&read_run(&record)?, &found, &place)? {
        eprintln!("no run record lists these files: they are sent as they are");
    }
    (files.into_iter())
        .map(|file| {
            let content = match file.content {
                FolderContent::Plain { bytes, git_oid } => PushContent::Inline { bytes, git_oid },
                FolderContent::Large { file: path } => PushContent::Object {
                    file: path,
                    oid: file.sha256,
                },
            };
            Ok(PushFile {
                path: file.name,
                size: file.bytes,
                content,
            })
        })
        .collect()
}

/// The files of a folder that belong to a checkpoint; others are reported and not pushed.
fn checkpoint_names(folder: &Path) -> Result<Vec<String>, Failure> {
    let failed = |error: std::io::Error| {
        Failure::new(format!("cannot read `{}`: {error}", folder.display()))
    };
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        let name = name.to_string_lossy().into_owned();
        match is_weights(&name) || OWN_FILES.contains(&name.as_str()) || is_companion(&name) {
            true => names.push(name),
            false => eprintln!(
                "left out: `{}` is no file of a checkpoint",
                gptq_types::outside_name::shown(&name, 80)
            ),
        }
    }
    names.sort();
    Ok(names)
}

fn is_weights(name: &str) -> bool {
    name.ends_with(".safetensors") && !name.starts_with('.')
}
