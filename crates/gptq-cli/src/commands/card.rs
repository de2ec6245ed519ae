//! `gptq card`.

use std::path::Path;

use gptq_repository::Repository;
use gptq_types::{
    Branch, BranchRecord, CalibrationRequest, Permutation, RunRecord, TensorSource, branch_name,
    describe,
};

use crate::Verdict;
use crate::args::CardArgs;
use crate::failure::Failure;
use crate::matrix::{State, card_info, read_branches, read_text, render};
use crate::output::print;

pub fn run(args: &CardArgs) -> Result<Verdict, Failure> {
    match args.place.join("gptq_run.json").exists() {
        true => of_folder(args),
        false => of_repository(args),
    }
}

fn of_repository(args: &CardArgs) -> Result<Verdict, Failure> {
    let repository = Repository::open(&args.place)?;
    let state = State::read(&args.place)?;
    let wanted: Vec<String> = (state.iter())
        .flat_map(|state| state.branches.iter().map(|b| b.branch.clone()))
        .collect();
    let branches = read_branches(&repository, &wanted)?;
    let info = match (&args.card, &state) {
        (None, Some(state)) => state.card.clone(),
        _ => card_info(args.card.as_deref(), &args.place, "")?,
    };
    let model_type = state.map_or(String::new(), |state| state.model_type);
    let card = render(&info, &model_type, &branches, args.template.as_deref())?;
    if !args.commit {
        print(&card)?;
        return Ok(Verdict::Yes);
    }
    let mut changed = 0;
    for branch in &branches {
        let name = &branch.record.permutation.branch;
        changed +=
            usize::from(repository.replace(name, "README.md", card.as_bytes(), "Model card")?);
    }
    eprintln!("{changed} of {} branches have a new card", branches.len());
    Ok(Verdict::Yes)
}

fn of_folder(args: &CardArgs) -> Result<Verdict, Failure> {
    if args.commit {
        return Err(Failure::new(
            "--commit is for a repository; a folder's card is printed",
        ));
    }
    let run: RunRecord = read(&args.place.join("gptq_run.json"))?;
    let stored = args.place.join("gptq_branch.json");
    let record = match stored.exists() {
        true => read(&stored)?,
        false => measured_nothing(&args.place, &run)?,
    };
    let info = card_info(args.card.as_deref(), &args.place, "")?;
    let config: serde_json::Value = read(&args.place.join("config.json"))?;
    let model_type = config["model_type"].as_str().unwrap_or_default();
    let card = render(
        &info,
        model_type,
        &[Branch { record, run }],
        args.template.as_deref(),
    )?;
    print(&card)?;
    Ok(Verdict::Yes)
}

/// The record of a folder that `quantize` made: everything but scores.
fn measured_nothing(folder: &Path, run: &RunRecord) -> Result<BranchRecord, Failure> {
    let checkpoint = gptq_hub::Checkpoint::open(folder)?;
    let shapes: Vec<(usize, usize)> = (run.layers.iter())
        .map(|layer| (layer.in_features, layer.out_features))
        .collect();
    let calibration = run.calibration.as_ref();
    Ok(BranchRecord {
        permutation: Permutation {
            branch: branch_name(&run.spec),
            spec: run.spec.clone(),
            calibration: CalibrationRequest {
                dataset: calibration.map_or(String::new(), |c| c.dataset.clone()),
                samples: calibration.map_or(0, |c| c.samples),
                seq_len: calibration.map_or(0, |c| c.seq_len),
                seed: calibration.map_or(0, |c| c.seed),
            },
            desc: describe(&run.spec),
        },
        weight_bytes: checkpoint.weight_bytes(),
        bits_per_weight: bits_per_weight(&checkpoint, run),
        readings: gptq_packer::readings(&run.spec, &shapes),
        evaluation: None,
    })
}

fn read<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T, Failure> {
    serde_json::from_str(&read_text(path)?)
        .map_err(|error| Failure::new(format!("`{}`: {error}", path.display())))
}

fn bits_per_weight(checkpoint: &gptq_hub::Checkpoint, run: &RunRecord) -> f64 {
    let bytes: usize = (run.layers.iter())
        .flat_map(|row| ["qweight", "qzeros", "scales", "g_idx"].map(|s| row.layer.tensor(s)))
        .filter_map(|name| Some(checkpoint.info(&name)?.bytes()))
        .sum();
    let weights = run
        .layers
        .iter()
        .map(|layer| layer.in_features * layer.out_features);
    8.0 * bytes as f64 / weights.sum::<usize>().max(1) as f64
}
