//! `gptq eval`.

use std::num::NonZeroUsize;

use gptq_calibration::{EvaluationWindows, Passages, Tokenizer};
use gptq_inference::{
    Journal, OpenedModel, Passage, Request, Scores, Step, accuracy, evaluate, group_tokens,
};
use gptq_model::Device;
use gptq_types::EvalRecord;
use serde_json::{Map, Value, json};

use crate::Verdict;
use crate::args::EvalArgs;
use crate::datasets::HubFiles;
use crate::device;
use crate::failure::Failure;
use crate::models::{Model, find};
use crate::output::{print, print_json};
use crate::progress::Steps;
use crate::scoring::{ScoringText, check_same_vocabulary, record};
use crate::unread_keys;
use crate::watch::TOOL;

/// Name of the task in records and tables.
const LAMBADA: &str = "lambada";
use crate::speed;

pub fn run(args: &EvalArgs) -> Result<Verdict, Failure> {
    let models = (args.models.iter())
        .map(|model| Ok(find(model, &args.hub)?.with_tokenizer(args.tokenizer.folder.as_deref())))
        .collect::<Result<Vec<Model>, Failure>>()?;
    let opened = models
        .iter()
        .map(Model::open)
        .collect::<Result<Vec<_>, _>>()?;
    for (name, opened) in args.models.iter().zip(&opened) {
        unread_keys::heed(&args.strict, name, &opened.config)?;
    }
    let text = Text::read(args, &models[0])?;
    text.check(args, &opened)?;
    let device = device::resolve(&args.device)?;
    let tokens = args
        .group_tokens
        .map_or(group_tokens(device), NonZeroUsize::get);
    let mut journal = match &args.state {
        Some(path) => Journal::open(path, &settings(&text, &models, device, tokens)?)?,
        None => Journal::in_memory(),
    };
    let request = Request {
        models: &opened,
        device,
        windows: &text.windows.ids,
        passages: &text.passages(),
        group_tokens: tokens,
    };
    // Before anything else takes memory, which would count.
    let speeds = match args.speed.speed {
        true => (models.iter())
            .map(|model| speed::measure(model, device, &args.speed))
            .collect::<Result<Vec<_>, _>>()?,
        false => Vec::new(),
    };
    let mut shown = Shown { args, steps: None };
    let scores = evaluate(&request, &mut journal, &mut |step| shown.hear(step))?;
    shown.end();
    let mut records = text.records(args, &models, &opened, &scores);
    for (record, speed) in records.iter_mut().zip(speeds) {
        record.speed = Some(speed);
    }
    match args.json {
        true => print_json(&records)?,
        false => print(&gptq_report::comparison(&records))?,
    }
    Ok(Verdict::Yes)
}

/// What checkpoints are scored on.
struct Text {
    windows: EvaluationWindows,
    lambada: Option<Passages>,
}

impl Text {
    /// In the tokens of `model`.
    fn read(args: &EvalArgs, model: &Model) -> Result<Self, Failure> {
        let text = ScoringText {
            dataset: args.dataset.clone(),
            column: args.column.clone(),
            seq_len: args.seq_len,
            max_windows: args.max_windows,
        };
        let lambada = match &args.lambada {
            Some(given) => Some(Passages::read(
                given,
                args.lambada_examples,
                &Tokenizer::open(model.tokenizer_dir())?,
                &HubFiles::new(&args.hub),
            )?),
            None => None,
        };
        Ok(Text {
            windows: text.read(model, &args.hub)?,
            lambada,
        })
    }

    /// Refuses tokens that a model does not know; says which windows are longer than it was
    /// trained on.
    fn check(&self, args: &EvalArgs, opened: &[OpenedModel]) -> Result<(), Failure> {
        let vocabulary = |index: usize| {
            let name = args.models[index].as_str();
            (name, opened[index].config.vocab_size)
        };
        for index in 1..opened.len() {
            check_same_vocabulary(vocabulary(0), vocabulary(index))?;
        }
        let (_, vocab_size) = vocabulary(0);
        self.windows.check_vocabulary(vocab_size)?;
        if let Some(lambada) = &self.lambada {
            lambada.check_vocabulary(vocab_size)?;
        }
        let positions = opened[0].config.max_position_embeddings;
        let passages = self.lambada.iter().flat_map(|found| &found.passages);
        let longest = [
            ("windows", self.windows.ids.iter().map(Vec::len).max()),
            ("passages", passages.map(|passage| passage.ids.len()).max()),
        ];
        for (what, tokens) in longest {
            if let Some(tokens) = tokens.filter(|&tokens| tokens > positions) {
                eprintln!(
                    "warning: {what} of {tokens} tokens exceed the model's {positions} positions"
                );
            }
        }
        Ok(())
    }

    fn passages(&self) -> Vec<Passage> {
        let passages = self.lambada.iter().flat_map(|found| &found.passages);
        passages
            .map(|passage| Passage {
                ids: passage.ids.clone(),
                answer: passage.answer,
            })
            .collect()
    }

    fn records(
        &self,
        args: &EvalArgs,
        models: &[Model],
        opened: &[OpenedModel],
        scores: &[Scores],
    ) -> Vec<EvalRecord> {
        (0..models.len())
            .map(|index| {
                let name = &args.models[index];
                let (own, first) = (&scores[index], &scores[0]);
                let which = (&models[index], &opened[index]);
                let mut record = record(name, which, &self.windows, &own.windows, &first.windows);
                record.seconds = own.seconds;
                if let Some(lambada) = &self.lambada {
                    record.accuracy = Some(accuracy(LAMBADA, &own.answers));
                    record.protocol += &format!("; {LAMBADA}: {}", lambada.protocol);
                }
                record
            })
            .collect()
    }
}

/// Everything that scores in a journal depend on, by the name under which a difference is told.
fn settings(
    text: &Text,
    models: &[Model],
    device: Device,
    group_tokens: usize,
) -> Result<Map<String, Value>, Failure> {
    let mut settings = Map::new();
    let mut set = |what: &str, value: Value| settings.insert(what.to_string(), value);
    set("tool", json!(TOOL));
    set("device", json!(device::name(device)));
    set("text", json!(text.windows.token_sha256));
    set("protocol", json!(text.windows.protocol));
    let lambada = text.lambada.as_ref().map(|found| &found.sha256);
    set("set of passages", json!(lambada));
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
