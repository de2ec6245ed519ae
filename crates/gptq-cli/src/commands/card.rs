//! `gptq card`.

use gptq_repository::Repository;
use gptq_types::Branch;

use crate::Verdict;
use crate::args::CardArgs;
use crate::failure::Failure;
use crate::matrix::{State, card_info, read_branches, render};
use crate::output::print;
use crate::records::{
    RUN_RECORD, check_branch, measured_nothing, read_branch, read_json, read_run,
};

pub fn run(args: &CardArgs) -> Result<Verdict, Failure> {
    match args.place.join(RUN_RECORD).exists() {
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
    let run = read_run(&args.place.join(RUN_RECORD))?;
    let record = match read_branch(&args.place)? {
        Some(record) => record,
        None => measured_nothing(&args.place, &run)?,
    };
    let branch = Branch { record, run };
    check_branch(&branch, &branch.record.permutation.branch)?;
    let info = card_info(args.card.as_deref(), &args.place, "")?;
    let config: serde_json::Value = read_json(&args.place.join("config.json"))?;
    let model_type = config["model_type"].as_str().unwrap_or_default();
    let card = render(&info, model_type, &[branch], args.template.as_deref())?;
    print(&card)?;
    Ok(Verdict::Yes)
}
