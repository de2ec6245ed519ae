//! `gptq eval`.

use crate::Verdict;
use crate::args::EvalArgs;
use crate::device;
use crate::failure::Failure;
use crate::models::{Model, find};
use crate::output::{print, print_json};
use crate::scoring::{Scorer, ScoringText};

pub fn run(args: &EvalArgs) -> Result<Verdict, Failure> {
    let models = (args.models.iter())
        .map(|model| find(model, &args.hub))
        .collect::<Result<Vec<Model>, _>>()?;
    let text = ScoringText {
        dataset: args.dataset.clone(),
        seq_len: args.seq_len,
        max_windows: args.max_windows,
    };
    let text = text.read(&models[0], &args.hub)?;
    let device = device::resolve(&args.device)?;
    let mut scorer = Scorer::new(&text, device, false);
    let records = (args.models.iter().zip(&models))
        .map(|(name, model)| scorer.score(name, model))
        .collect::<Result<Vec<_>, _>>()?;
    match args.json {
        true => print_json(&records)?,
        false => print(&gptq_report::comparison(&records))?,
    }
    Ok(Verdict::Yes)
}
