//! `gptq eval`.

use std::num::NonZeroUsize;

use gptq_calibration::EvaluationWindows;
use gptq_inference::{Journal, Request, Step, evaluate, group_tokens};
use gptq_model::DeviceContext;
use serde_json::{Map, Value, json};

use crate::Verdict;
use crate::args::EvalArgs;
use crate::device;
use crate::failure::Failure;
use crate::models::{Model, find};
use crate::output::{print, print_json};
use crate::progress::Steps;
use crate::scored::Scored;
use crate::speed;
use crate::unread_keys;
use crate::watch::TOOL;

pub fn run(args: &EvalArgs) -> Result<Verdict, Failure> {
    let models = (args.models.iter())
        .map(|model| Ok(find(model, &args.hub)?.with_tokenizer(args.tokenizer.folder.as_deref())))
        .collect::<Result<Vec<Model>, Failure>>()?;
    let opened = models
        .iter()
        .map(Model::open)
        .collect::<Result<Vec<_>, _>>()?;
    for (name, opened) in args.models.iter().zip(&opened) {
        unread_keys::heed(&args.strict, name, &opened.spec)?;
    }
    let scored = Scored::read(args, &models[0], &opened[0])?;
    scored.check(args, &opened)?;
    let device = device::resolve(&args.device)?;
    let tokens = args
        .group_tokens
        .map_or(group_tokens(device.device()), NonZeroUsize::get);
    let mut journal = match &args.state {
        Some(path) => Journal::open(path, &settings(&scored, &models, &device, tokens)?)?,
        None => Journal::in_memory(),
    };
    let request = Request {
        models: &opened,
        device: &device,
        windows: &scored.windows(),
        passages: &scored.passages(),
        choices: &scored.choices(),
        group_tokens: tokens,
    };
    // Before anything else takes memory, which would count.
    let speeds = match args.speed.speed {
        true => (models.iter())
            .map(|model| speed::measure(model, &device, &args.speed))
            .collect::<Result<Vec<_>, _>>()?,
        false => Vec::new(),
    };
    let mut shown = Shown { args, steps: None };
    let scores = evaluate(&request, &mut journal, &mut |step| shown.hear(step))
        .map_err(|error| scored.placed(error))?;
    shown.end();
    let mut records = scored.records(args, &models, &opened, &scores)?;
    // Records of the first text come first; they carry the speeds.
    for (record, speed) in records.iter_mut().zip(speeds) {
        record.speed = Some(speed);
    }
    match args.json {
        true => print_json(&records)?,
        false => print(&gptq_report::comparison(&records))?,
    }
    Ok(Verdict::Yes)
}

/// Everything that the scores in a journal depend on, keyed by the name that an error gives a difference.
fn settings(
    scored: &Scored,
    models: &[Model],
    device: &DeviceContext,
    group_tokens: usize,
) -> Result<Map<String, Value>, Failure> {
    let mut settings = Map::new();
    let mut set = |what: &str, value: Value| settings.insert(what.to_string(), value);
    set("tool", json!(TOOL));
    set("device", json!(device.name()));
    let texts = &scored.texts;
    let of_texts = |of: &dyn Fn(&EvaluationWindows) -> String| match texts.as_slice() {
        [text] => json!(of(&text.windows)),
        texts => texts.iter().map(|text| of(&text.windows)).collect(),
    };
    set("text", of_texts(&|windows| windows.token_sha256.clone()));
    set("protocol", of_texts(&|windows| windows.protocol.clone()));
    let lambada = scored.lambada.as_ref().map(|found| &found.sha256);
    set("set of passages", json!(lambada));
    if !scored.tasks.is_empty() {
        let sets = scored.tasks.iter().map(|task| &task.questions.sha256);
        set("set of questions", sets.cloned().collect());
    }
    set("group size", json!(group_tokens));
    set("number of checkpoints", json!(models.len()));
    for (index, model) in models.iter().enumerate() {
        set(
            &format!("checkpoint {}", index + 1),
            json!(model.identity()?),
        );
    }
    Ok(settings)
}

/// Progress on stderr.
struct Shown<'a> {
    args: &'a EvalArgs,
    steps: Option<Steps>,
}

impl Shown<'_> {
    fn hear(&mut self, step: Step) {
        let Some(steps) = &mut self.steps else {
            if step.done > 0 {
                eprintln!("{} of {} passes are done already", step.done, step.all);
            }
            self.steps = Some(Steps::new("scoring", step.done, step.all));
            return;
        };
        steps.say(&self.args.models[step.model]);
        steps.set(step.done);
    }

    fn end(self) {
        if let Some(steps) = self.steps {
            steps.end();
        }
    }
}
