//! A finished checkpoint against the float model, before its folder is published.

use std::path::Path;
use std::sync::Arc;

use gptq_calibration::{EvaluationWindows, Source};
use gptq_hub::Checkpoint;
use gptq_inference::{Journal, Request, evaluate, group_tokens, summarize};
use gptq_model::{DeviceContext, ModelSpec};
use gptq_pipeline::CompareError;
use gptq_types::{Divergence, RunRecord};

use crate::args::QuantizeArgs;
use crate::datasets::{is_one_text, local_copy, public_name};
use crate::failure::Failure;
use crate::models::Model;
use crate::progress::Steps;
use crate::scoring::{ScoringText, perplexity};
use crate::window_bos::recorded;

/// Default number of windows of a second text.
const WINDOWS: usize = 16;

/// The texts that a checkpoint is compared on, in order.
pub struct Texts(Vec<Text>);

struct Text {
    dataset: String,
    held_out: bool,
    windows: EvaluationWindows,
    /// The value for the record.
    window_bos: Option<bool>,
}

impl Texts {
    /// The second text, where one was given.
    pub fn read(args: &QuantizeArgs, model: &Model, spec: &ModelSpec) -> Result<Self, Failure> {
        let mut texts = Vec::new();
        if let Some(dataset) = &args.check_dataset {
            let windows = second(args, dataset, model, spec)?;
            windows.check_vocabulary(spec.vocab_size)?;
            texts.push(Text {
                dataset: dataset.clone(),
                held_out: false,
                window_bos: recorded(args.window_bos.choice(), windows.bos, spec),
                windows,
            });
        }
        Ok(Texts(texts))
    }

    /// Before all others the windows of the calibration text `dataset` that calibration does not see.
    pub fn put_first(
        &mut self,
        dataset: &str,
        windows: EvaluationWindows,
        window_bos: Option<bool>,
    ) {
        let text = Text {
            dataset: dataset.to_string(),
            held_out: true,
            windows,
            window_bos,
        };
        self.0.insert(0, text);
    }

    /// There is nothing to compare on.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Scores `model` and the packed files in `folder` on all texts.
    pub fn compare(
        &self,
        model: &Model,
        device: &DeviceContext,
        folder: &Path,
    ) -> Result<Vec<Divergence>, CompareError> {
        let compared = self.try_compare(model, device, folder);
        compared.map_err(|failure| {
            let advice = "without --check-windows and --check-dataset it is published as it is";
            CompareError {
                text: failure.text,
                hint: Some(match failure.hint {
                    Some(hint) => format!("{hint}; {advice}"),
                    None => advice.to_string(),
                }),
            }
        })
    }

    fn try_compare(
        &self,
        model: &Model,
        device: &DeviceContext,
        folder: &Path,
    ) -> Result<Vec<Divergence>, Failure> {
        let made = Model::of(Arc::new(Checkpoint::open(folder)?))?;
        let models = [model.open()?, made.open()?];
        let windows = self.0.iter().flat_map(|text| &text.windows.ids);
        let windows: Vec<Vec<u32>> = windows.cloned().collect();
        let request = Request {
            models: &models,
            device,
            windows: &windows,
            passages: &[],
            choices: &[],
            group_tokens: group_tokens(device.device()),
        };
        let mut steps: Option<Steps> = None;
        let scores = evaluate(&request, &mut Journal::in_memory(), &mut |step| {
            let what = "comparing with the float model";
            let steps = steps.get_or_insert_with(|| Steps::new(what, step.done, step.all));
            if step.done > 0 {
                steps.set(step.done);
            }
        })?;
        steps.into_iter().for_each(Steps::end);
        let mut start = 0;
        (self.0.iter())
            .map(|text| {
                let range = start..start + text.windows.ids.len();
                start = range.end;
                let [float, own] = [&scores[0], &scores[1]].map(|of| &of.windows[range.clone()]);
                let (float, own) = (summarize(float, &[]), summarize(own, float));
                let lengths = || text.windows.ids.iter().map(Vec::len);
                let compared = (own.comparison.as_ref())
                    .ok_or_else(|| Failure::new("no window was compared"))?;
                Ok(Divergence {
                    text: public_name(&text.dataset),
                    file: local_copy(&Source::parse(&text.dataset)?),
                    held_out: text.held_out,
                    protocol: text.windows.protocol.clone(),
                    token_sha256: text.windows.token_sha256.clone(),
                    windows: text.windows.ids.len(),
                    seq_len: lengths().max().unwrap_or(0),
                    tokens: lengths().sum(),
                    window_bos: text.window_bos,
                    float_perplexity: perplexity("float model", &float)?,
                    perplexity: perplexity("files", &own)?,
                    kl: compared.kl,
                })
            })
            .collect()
    }

    /// Says so where a record, of a folder that was finished before, lacks one of the texts.
    pub fn warn_of_missing(&self, record: &RunRecord) {
        let is_there = |text: &Text| {
            let mut found = record.divergence.iter();
            found.any(|of| of.token_sha256 == text.windows.token_sha256)
        };
        if !self.0.iter().all(is_there) {
            eprintln!(
                "warning: the folder was finished before, without a comparison on these windows; \
                 `gptq eval MODEL DIR` makes one"
            );
        }
    }
}

/// The first windows of a text that calibration did not see.
fn second(
    args: &QuantizeArgs,
    dataset: &str,
    model: &Model,
    spec: &ModelSpec,
) -> Result<EvaluationWindows, Failure> {
    let (calibration, source) = (Source::parse(&args.dataset)?, Source::parse(dataset)?);
    if is_one_text(&calibration, &source) {
        return Err(Failure::with_hint(
            format!("--check-dataset `{dataset}` is the calibration text"),
            "--check-windows N takes windows of it that calibration does not see",
        ));
    }
    let text = ScoringText {
        dataset: dataset.to_string(),
        column: None, // that of --column belongs to the calibration text
        seq_len: args.seq_len,
        max_windows: Some(match args.check_windows {
            0 => WINDOWS,
            windows => windows,
        }),
        window_bos: args.window_bos.choice(),
    };
    text.read(model, spec, &args.hub)
}
