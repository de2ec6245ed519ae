//! Checkpoints scored on one text, against the first of them.

use std::time::Instant;

use gptq_calibration::{EvaluationWindows, Source, Tokenizer, evaluation_windows};
use gptq_inference::{Reference, evaluate};
use gptq_model::Device;
use gptq_types::EvalRecord;

use crate::args::HubArgs;
use crate::datasets::HubFiles;
use crate::failure::Failure;
use crate::models::Model;
use crate::progress::Steps;

/// Which text, and how much of it.
#[derive(Clone, Debug)]
pub struct ScoringText {
    pub dataset: String,
    pub seq_len: usize,
    pub max_windows: Option<usize>,
}

impl ScoringText {
    /// The windows, in the tokens of `model`.
    pub fn read(&self, model: &Model, hub: &HubArgs) -> Result<EvaluationWindows, Failure> {
        let source = Source::parse(&self.dataset)?;
        if source.is_generated() {
            let text =
                "`self` is for calibration: a model's own text says nothing of its perplexity";
            return Err(Failure::new(text));
        }
        let tokenizer = Tokenizer::open(model.dir())?;
        let files = HubFiles::new(hub);
        Ok(evaluation_windows(
            &source,
            self.seq_len,
            self.max_windows,
            &tokenizer,
            &files,
        )?)
    }
}

/// Scores one checkpoint after the other; the first is the reference.
pub struct Scorer<'a> {
    text: &'a EvaluationWindows,
    device: Device,
    plain: bool,
    first: Option<First>,
}

struct First {
    name: String,
    vocab_size: usize,
    hidden: Reference,
}

impl<'a> Scorer<'a> {
    /// With `plain`, beside other work, progress comes in lines instead of a bar.
    pub fn new(text: &'a EvaluationWindows, device: Device, plain: bool) -> Self {
        Scorer {
            text,
            device,
            plain,
            first: None,
        }
    }

    /// Runs all windows through `model`, which tables know as `name`.
    pub fn score(&mut self, name: &str, model: &Model) -> Result<EvalRecord, Failure> {
        let opened = model.open()?;
        let vocab_size = opened.config.vocab_size;
        self.text.check_vocabulary(vocab_size)?;
        if let Some(first) = &self.first
            && first.vocab_size != vocab_size
        {
            return Err(Failure::new(format!(
                "{name} has {vocab_size} tokens in its vocabulary, {} has {}",
                first.name, first.vocab_size
            )));
        }
        let start = Instant::now();
        let mut decoder = opened.decoder(self.device)?;
        let what = format!("{name}: scoring");
        let mut steps = Steps::beside(&what, opened.config.num_hidden_layers + 1, self.plain);
        let compared = self.first.as_ref().map(|first| &first.hidden);
        let (evaluation, hidden) = evaluate(
            decoder.as_mut(),
            &self.text.ids,
            compared,
            &mut |done, _| {
                steps.set(done);
            },
        )?;
        steps.end();
        self.first.get_or_insert(First {
            name: name.to_string(),
            vocab_size,
            hidden,
        });
        Ok(EvalRecord {
            model: name.to_string(),
            kind: opened.kind(),
            protocol: self.text.protocol.clone(),
            token_sha256: self.text.token_sha256.clone(),
            windows: evaluation.windows,
            seq_len: self.text.ids.iter().map(Vec::len).max().unwrap_or(0),
            nll: evaluation.nll,
            nll_stderr: evaluation.nll_stderr,
            perplexity: evaluation.perplexity(),
            kl: evaluation.kl,
            top1_agreement: evaluation.top1_agreement,
            weight_bytes: model.checkpoint.weight_bytes(),
            seconds: start.elapsed().as_secs_f64(),
            ..EvalRecord::default()
        })
    }
}
