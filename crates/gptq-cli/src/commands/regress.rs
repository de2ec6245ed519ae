//! `gptq regress`.

use std::time::Instant;

use gptq_report::{
    Outcome, Verdict as Judgement, annotation, annotations, judge, junit, regression, tolerances,
};
use gptq_types::{Figures, Inputs, LayerFigures};

use crate::Verdict;
use crate::args::RegressArgs;
use crate::failure::Failure;
use crate::matrix::replace;
use crate::output::{print, print_json};
use crate::regression::{Bench, Measurement, Place, check_same, read, write};
use crate::watch::TOOL;

pub fn run(args: &RegressArgs) -> Result<Verdict, Failure> {
    let outcome = regress(args);
    if let (Err(failure), true) = (&outcome, annotates(args)) {
        let file = args.baseline.display().to_string();
        print(&annotation("error", &file, "cannot judge", &failure.text))?;
    }
    outcome
}

/// Whether to print annotations: on request, or under GitHub Actions unless stdout is JSON.
fn annotates(args: &RegressArgs) -> bool {
    let inside = std::env::var("GITHUB_ACTIONS").is_ok_and(|value| value == "true");
    args.github || (inside && !args.json)
}

fn regress(args: &RegressArgs) -> Result<Verdict, Failure> {
    let started = Instant::now();
    let mut baseline = read(&args.baseline)?;
    check_place(args)?;
    if baseline.figures.is_none() && !args.update {
        return Err(Failure::with_hint(
            format!(
                "`{}` holds a recipe, but no figures",
                args.baseline.display()
            ),
            "run it with --update on a state that is known to be good",
        ));
    }
    let recipe = baseline.recipe.clone();
    let bench = Bench::open(&recipe, &Place::of(&args.baseline), &args.hub)?;
    let inputs = bench.inputs()?;
    if let Some(figures) = &baseline.figures {
        match check_same(&figures.inputs, &inputs, &args.baseline) {
            Err(failure) if args.update => eprintln!("{}", failure.text),
            same => same?,
        }
    }
    let (judged, measurement) = match &args.checkpoint {
        Some(folder) => (format!("`{}`", folder.display()), bench.folder(folder)?),
        None => ("a run of the recipe".to_string(), bench.run(false)?),
    };
    let judgement = baseline.figures.as_ref().map(|figures| {
        let file = args.baseline.display().to_string();
        judge(&file, &judged, figures, &measurement.outcome)
    });
    if let Some(judgement) = &judgement {
        tell(args, judgement, started.elapsed().as_secs_f64())?;
    }
    if args.update {
        let reversed = bench.run(true)?;
        baseline.figures = Some(figures(inputs, measurement, &reversed.outcome)?);
        write(&args.baseline, &baseline)?;
        eprintln!("wrote {}", args.baseline.display());
        return Ok(Verdict::Yes);
    }
    Ok(
        match judgement.is_some_and(|judgement| judgement.is_red()) {
            true => Verdict::No,
            false => Verdict::Yes,
        },
    )
}

/// A file that could not be written at the end is found at the beginning.
fn check_place(args: &RegressArgs) -> Result<(), Failure> {
    let Some(file) = &args.junit else {
        return Ok(());
    };
    let folder = file
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty());
    match folder.is_none_or(|folder| folder.is_dir()) {
        true => Ok(()),
        false => Err(Failure::new(format!(
            "cannot write `{}`: there is no such folder",
            file.display()
        ))),
    }
}

fn tell(args: &RegressArgs, judgement: &Judgement, seconds: f64) -> Result<(), Failure> {
    if let Some(file) = &args.junit {
        replace(file, junit(judgement, seconds).as_bytes())
            .map_err(|error| Failure::new(format!("cannot write `{}`: {error}", file.display())))?;
    }
    match args.json {
        true => print_json(judgement)?,
        false => print(&regression(judgement))?,
    }
    match annotates(args) && !args.update {
        true => print(&annotations(judgement)),
        false => Ok(()),
    }
}

/// The figures that a baseline keeps; refuses a run whose files do not hold what the solver chose.
fn figures(
    inputs: Inputs,
    measurement: Measurement,
    reversed: &Outcome,
) -> Result<Figures, Failure> {
    let outcome = measurement.outcome;
    if let Some((layer, text)) = outcome.unfaithful.as_ref().or(reversed.unfaithful.as_ref()) {
        return Err(Failure::new(format!("{layer} {text}")));
    }
    let (Some(overall), Some(scored)) = (outcome.overall, measurement.scored) else {
        unreachable!("only an unfaithful run is not scored");
    };
    let tolerances = tolerances(&outcome, reversed, &scored);
    let mut layers = Vec::new();
    for layer in outcome.layers {
        let loss = layer.recorded.ok_or_else(|| {
            Failure::new(format!(
                "the run's record says nothing about {}",
                layer.layer
            ))
        })?;
        let apart = (layer.file_error - loss.error).abs();
        if apart > tolerances.file_error.value * loss.error {
            return Err(Failure::new(format!(
                "the files of {} have output error {}, the solver reported {}",
                layer.layer, layer.file_error, loss.error
            )));
        }
        layers.push(LayerFigures {
            layer: layer.layer,
            loss,
            content: layer.content,
            tensors: layer.tensors,
        });
    }
    Ok(Figures {
        tool: TOOL.to_string(),
        processor: outcome.processor,
        inputs,
        overall,
        tolerances,
        layers,
    })
}
