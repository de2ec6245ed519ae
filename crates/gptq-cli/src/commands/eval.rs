//! `gptq eval`.

use std::time::Instant;

use gptq_calibration::{EvaluationWindows, Source, Tokenizer, evaluation_windows};
use gptq_inference::{Reference, evaluate};
use gptq_types::EvalRecord;

use crate::Verdict;
use crate::args::EvalArgs;
use crate::datasets::HubFiles;
use crate::device;
use crate::failure::Failure;
use crate::models::{Model, find};
use crate::output::{print, print_json};
use crate::progress::Steps;

pub fn run(args: &EvalArgs) -> Result<Verdict, Failure> {
    let models = (args.models.iter())
        .map(|model| find(model, &args.hub))
        .collect::<Result<Vec<Model>, _>>()?;
    let text = read_text(args, &models[0])?;
    let device = device::resolve(&args.device)?;
    let mut reference: Option<(Reference, usize)> = None;
    let mut records = Vec::new();
    for (name, model) in args.models.iter().zip(&models) {
        let opened = model.open()?;
        text.check_vocabulary(opened.config.vocab_size)?;
        if let Some((_, vocab)) = reference
            && vocab != opened.config.vocab_size
        {
            return Err(Failure::new(format!(
                "{name} has {} tokens in its vocabulary, {} has {vocab}",
                opened.config.vocab_size, args.models[0]
            )));
        }
        let start = Instant::now();
        let mut decoder = opened.decoder(device)?;
        let mut steps = Steps::new(name, 0, opened.config.num_hidden_layers + 1);
        let compared = reference.as_ref().map(|(hidden, _)| hidden);
        let (evaluation, hidden) =
            evaluate(decoder.as_mut(), &text.ids, compared, &mut |done, _| {
                steps.set(done);
            })?;
        steps.end();
        records.push(EvalRecord {
            model: name.clone(),
            kind: opened.kind(),
            protocol: text.protocol.clone(),
            token_sha256: text.token_sha256.clone(),
            windows: evaluation.windows,
            seq_len: text.ids.iter().map(Vec::len).max().unwrap_or(0),
            nll: evaluation.nll,
            nll_stderr: evaluation.nll_stderr,
            perplexity: evaluation.perplexity(),
            kl: evaluation.kl,
            top1_agreement: evaluation.top1_agreement,
            weight_bytes: model.checkpoint.weight_bytes(),
            seconds: start.elapsed().as_secs_f64(),
        });
        reference.get_or_insert((hidden, opened.config.vocab_size));
    }
    match args.json {
        true => print_json(&records)?,
        false => print(&gptq_report::comparison(&records))?,
    }
    Ok(Verdict::Yes)
}

/// The windows, in the tokens of the first model.
fn read_text(args: &EvalArgs, model: &Model) -> Result<EvaluationWindows, Failure> {
    let source = Source::parse(&args.dataset)?;
    if source.is_generated() {
        let text = "`self` is for calibration: a model's own text says nothing of its perplexity";
        return Err(Failure::new(text));
    }
    let tokenizer = Tokenizer::open(model.dir())?;
    let files = HubFiles::new(&args.hub);
    Ok(evaluation_windows(
        &source,
        args.seq_len,
        args.max_windows,
        &tokenizer,
        &files,
    )?)
}
