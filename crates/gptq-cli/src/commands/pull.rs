//! `gptq pull`.

use std::fs;
use std::path::{Path, PathBuf};

use gptq_repository::Repository;

use crate::Verdict;
use crate::args::PullArgs;
use crate::failure::Failure;
use crate::models::find;
use crate::output::check_vacant;
use crate::records::{RUN_RECORD, check_branch_files, check_folder, read_run};

pub fn run(args: &PullArgs) -> Result<Verdict, Failure> {
    check_vacant(&args.out)?;
    let out = std::path::absolute(&args.out)
        .map_err(|error| Failure::new(format!("`{}`: {error}", args.out.display())))?;
    let parent = out.parent().unwrap_or(Path::new("/")).to_path_buf();
    let failed = |doing: &str, path: &Path, error: std::io::Error| {
        Failure::new(format!("cannot {doing} `{}`: {error}", path.display()))
    };
    // Looked up before anything is written.
    let local = local(&args.source)?;
    let snapshot = match &local {
        Some(_) => None,
        None => Some(find(&args.source, &args.hub)?),
    };
    fs::create_dir_all(&parent).map_err(|error| failed("create", &parent, error))?;
    let beside = tempfile::Builder::new()
        .prefix(".pulling-")
        .tempdir_in(&parent)
        .map_err(|error| failed("write into", &parent, error))?;
    let part = beside.path().join("branch");
    match (local, snapshot) {
        (Some((repository, branch)), _) => {
            check_branch_files(&repository, &branch)?;
            repository.checkout(&branch, &part)?;
        }
        (None, Some(model)) => {
            copy(model.dir(), &part)?;
            check_copy(&part, &args.source)?;
        }
        (None, None) => {}
    }
    sync(&part).map_err(|error| failed("write", &part, error))?;
    fs::rename(&part, &out).map_err(|error| failed("write", &out, error))?;
    eprintln!("wrote {}", args.out.display());
    Ok(Verdict::Yes)
}

/// A repository on this machine, and the branch that is meant.
fn local(source: &str) -> Result<Option<(Repository, String)>, Failure> {
    let whole = (source.to_string(), "main".to_string());
    let parts = source
        .rsplit_once(':')
        .map(|(path, branch)| (path.to_string(), branch.to_string()));
    for (path, branch) in [Some(whole), parts].into_iter().flatten() {
        let path = PathBuf::from(path);
        if path.is_dir() {
            let repository = Repository::open(&path)?;
            repository.tip(&branch)?;
            return Ok(Some((repository, branch)));
        }
    }
    Ok(None)
}

/// Checks a download against the file hashes in its run record, if it has one.
fn check_copy(folder: &Path, source: &str) -> Result<(), Failure> {
    let record = folder.join(RUN_RECORD);
    if !record.exists() || read_run(&record)?.files.is_empty() {
        return Ok(());
    }
    match check_folder(folder)?.first_fault() {
        None => Ok(()),
        Some(wrong) => Err(Failure::new(format!("`{source}`: {wrong}"))),
    }
}

fn copy(folder: &Path, to: &Path) -> Result<(), Failure> {
    let failed = |error: std::io::Error| {
        Failure::new(format!("cannot copy `{}`: {error}", folder.display()))
    };
    fs::create_dir_all(to).map_err(failed)?;
    for entry in fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if entry.path().is_file() {
            fs::copy(entry.path(), to.join(entry.file_name())).map_err(failed)?;
        }
    }
    Ok(())
}

fn sync(folder: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(folder)? {
        fs::File::open(entry?.path())?.sync_all()?;
    }
    fs::File::open(folder)?.sync_all()
}
