//! `gptq report`.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use gptq_report::{Found, FoundRun, Made, Report};
use gptq_repository::Repository;
use gptq_types::{EvalRecord, RunRecord};
use serde_json::Value;

use crate::Verdict;
use crate::args::ReportArgs;
use crate::failure::Failure;
use crate::matrix::{State, read_branches, read_text};
use crate::output::{check_vacant, print_json, publish};
use crate::records::{RUN_RECORD, check_schema, measured_nothing, read_branch, read_run};
use crate::watch::TOOL;

const PAGE: &str = "index.html";
const MARKDOWN: &str = "report.md";

pub fn run(args: &ReportArgs) -> Result<Verdict, Failure> {
    check_vacant(&args.out)?;
    let mut found = Found::default();
    for place in &args.runs {
        gather(place, &mut found)?;
    }
    let made = Made {
        tool: TOOL.to_string(),
        seconds: now(),
    };
    let report = Report::of(found, &made)?;
    let (page, markdown) = (report.html()?, report.markdown());
    publish(&args.out, &[(PAGE, &page), (MARKDOWN, &markdown)])?;
    eprintln!("wrote {}", args.out.join(PAGE).display());
    if args.json {
        print_json(&report)?;
    }
    Ok(Verdict::Yes)
}

fn gather(place: &Path, found: &mut Found) -> Result<(), Failure> {
    match (place.is_dir(), place.is_file()) {
        (true, _) if place.join(RUN_RECORD).exists() => found.runs.push(of_folder(place)?),
        (true, _) => found.runs.extend(of_repository(place)?),
        (_, true) => of_file(place, found)?,
        _ => return Err(unknown(place, "no such file or folder")),
    }
    Ok(())
}

fn unknown(place: &Path, why: &str) -> Failure {
    Failure::with_hint(
        format!("`{}`: {why}", place.display()),
        "a RUN is a checkpoint folder with gptq_run.json, a repository that `gptq matrix` made, \
         a file of `gptq eval --json`, or a file of one run record",
    )
}

fn of_folder(folder: &Path) -> Result<FoundRun, Failure> {
    let run = read_run(&folder.join(RUN_RECORD))?;
    let record = match read_branch(folder)? {
        // The branch that it was pulled from is a better name than the local folder.
        Some(record) => Some(record),
        // Records may be kept without their weights.
        None if folder.join("config.json").exists() => {
            let mut record = measured_nothing(folder, &run)?;
            record.permutation.branch = folder_name(folder);
            Some(record)
        }
        None => None,
    };
    let name = record.as_ref().map(|r| r.permutation.branch.clone());
    Ok(FoundRun {
        place: folder.display().to_string(),
        name: name.unwrap_or_else(|| folder_name(folder)),
        run,
        record,
    })
}

fn folder_name(folder: &Path) -> String {
    let whole = std::fs::canonicalize(folder).unwrap_or(folder.to_path_buf());
    let name = whole.file_name().map(|name| name.to_string_lossy());
    name.map_or_else(|| folder.display().to_string(), |name| name.into_owned())
}

fn of_repository(place: &Path) -> Result<Vec<FoundRun>, Failure> {
    let repository = Repository::open(place).map_err(|_| {
        unknown(
            place,
            "neither a checkpoint with gptq_run.json nor a repository",
        )
    })?;
    let state = State::read(place)?;
    let wanted: Vec<String> = (state.iter())
        .flat_map(|state| state.branches.iter().map(|b| b.branch.clone()))
        .collect();
    let branches = read_branches(&repository, &wanted)?;
    if branches.is_empty() {
        return Err(unknown(place, "a repository without branches"));
    }
    (branches.into_iter())
        .map(|branch| {
            let name = branch.record.permutation.branch.clone();
            let from = format!("{}:{name}", place.display());
            check_schema(&branch.run, &from)?;
            Ok(FoundRun {
                run: with_times(place, &name, branch.run)?,
                place: from,
                name,
                record: Some(branch.record),
            })
        })
        .collect()
}

/// Adds times to a branch's record: published records have none, the repository that made them keeps both.
fn with_times(place: &Path, branch: &str, run: RunRecord) -> Result<RunRecord, Failure> {
    let path = State::record(place, branch);
    if !path.exists() {
        return Ok(run);
    }
    let full = read_run(&path)?;
    Ok(match full.clone().timeless() == run {
        true => full,
        false => run,
    })
}

fn of_file(place: &Path, found: &mut Found) -> Result<(), Failure> {
    let no_record = |error: serde_json::Error| unknown(place, &format!("not a record: {error}"));
    let content: Value = serde_json::from_str(&read_text(place)?).map_err(no_record)?;
    if !content.is_array() {
        let run: RunRecord = serde_json::from_value(content).map_err(no_record)?;
        check_schema(&run, &place.display().to_string())?;
        found.runs.push(FoundRun {
            place: place.display().to_string(),
            name: file_name(place),
            run,
            record: None,
        });
        return Ok(());
    }
    let records: Vec<EvalRecord> = serde_json::from_value(content).map_err(no_record)?;
    if records.is_empty() {
        return Err(unknown(place, "holds no score"));
    }
    found.evaluations.push(records);
    Ok(())
}

/// A record in a folder goes by the folder, another one by its file.
fn file_name(path: &Path) -> String {
    match path.file_name().is_some_and(|name| name == RUN_RECORD) {
        true => folder_name(
            path.parent()
                .filter(|p| *p != Path::new(""))
                .unwrap_or(Path::new(".")),
        ),
        false => (path.file_stem()).map_or(String::new(), |s| s.to_string_lossy().into_owned()),
    }
}

/// Seconds since 1970, or what SOURCE_DATE_EPOCH says, as for the commits of a matrix.
fn now() -> i64 {
    let fixed = std::env::var("SOURCE_DATE_EPOCH").ok();
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    (fixed.and_then(|seconds| seconds.parse().ok()))
        .unwrap_or_else(|| since.map_or(0, |since| since.as_secs() as i64))
}
