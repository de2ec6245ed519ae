//! A run of a recipe, and what its files turn out to be.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use gptq_calibration::{EvaluationWindows, Windows};
use gptq_hub::Checkpoint;
use gptq_model::{Device, DeviceContext, ModelSpec};
use gptq_packer::{QuantizeConfig, VerifyError, packed_layers};
use gptq_pipeline::{
    CheckedWeights, FilesToMeasure, Job, PipelineError, WeightCheck, check_weights, measure_files,
};
use gptq_report::{LayerOutcome, Outcome};
use gptq_types::{
    EvalRecord, Inputs, LayerLoss, LayerName, Overall, RUN_RECORD_SCHEMA, Recipe, RunRecord,
    SolvedLayer, TensorSource,
};
use sha2::{Digest, Sha256};

use super::Place;
use super::inputs::{hash_model, hex};
use crate::args::HubArgs;
use crate::calibrate::calibrate;
use crate::device::processor;
use crate::failure::Failure;
use crate::models::{Model, find};
use crate::progress::Steps;
use crate::scoring::{Scorer, ScoringText};
use crate::watch::{TOOL, View, try_watch};

const RECORD_FILE: &str = "gptq_run.json";
/// The defaults of `gptq quantize`.
const SHARD_BYTES: u64 = 4_000_000_000;
const TEMPERATURE: f32 = 1.0;
/// Fewest windows of an evaluation: one window has no standard error.
const LEAST_WINDOWS: usize = 2;

/// Everything that a recipe reads.
pub struct Bench<'a> {
    recipe: &'a Recipe,
    model: Model,
    checked: CheckedWeights,
    windows: Windows,
    text: EvaluationWindows,
}

/// The outcome of measured files, with their scores.
pub struct Measurement {
    pub outcome: Outcome,
    /// Scores of the files against the float model; absent where the run stopped early.
    pub scored: Option<EvalRecord>,
}

impl<'a> Bench<'a> {
    /// Opens the model and reads both texts.
    pub fn open(recipe: &'a Recipe, place: &Place, hub: &HubArgs) -> Result<Self, Failure> {
        let model = find(&place.model(&recipe.model), hub)?;
        let config = ModelSpec::read(&model.config_json, &model.checkpoint.names())
            .map_err(|error| Failure::new(format!("{}: {error}", model.dir().display())))?;
        let mut request = recipe.calibration.clone();
        request.dataset = place.dataset(&request.dataset)?;
        let windows = calibrate(&request, TEMPERATURE, &model, &config, Device::Cpu, hub)?;
        let text = ScoringText {
            dataset: place.dataset(&recipe.evaluation.dataset)?,
            column: None,
            seq_len: recipe.evaluation.seq_len,
            max_windows: recipe.evaluation.max_windows,
            window_bos: recipe.evaluation.window_bos,
        };
        let text = text.read(&model, &config, hub)?;
        if text.ids.len() < LEAST_WINDOWS {
            return Err(Failure::with_hint(
                format!("the recipe's evaluation has {} window", text.ids.len()),
                format!(
                    "a noise floor needs {LEAST_WINDOWS}: raise max_windows, or give more text"
                ),
            ));
        }
        Ok(Bench {
            recipe,
            checked: check_weights(model.checkpoint.as_ref())?,
            text,
            model,
            windows,
        })
    }

    /// Hashes of all that was opened.
    pub fn inputs(&self) -> Result<Inputs, Failure> {
        Ok(Inputs {
            model: hash_model(&self.model)?,
            calibration_tokens: self.windows.record.token_sha256.clone(),
            evaluation_tokens: self.text.token_sha256.clone(),
        })
    }

    /// Quantizes into a temporary folder as `gptq quantize` does, and measures the files. With
    /// `reversed`, calibration windows are added up last to first: the same Hessians but for the
    /// rounding of their sums.
    pub fn run(&self, reversed: bool) -> Result<Measurement, Failure> {
        let folder = tempfile::tempdir()
            .map_err(|error| Failure::new(format!("cannot make a temporary folder: {error}")))?;
        let out = folder.path().join("checkpoint");
        let mut windows = self.windows.ids.clone();
        if reversed {
            windows.reverse();
        }
        let job = Job {
            source: self.model.checkpoint.clone(),
            config_json: self.model.config_json.clone(),
            model_name: self.recipe.model.clone(),
            tokenizer: None,
            spec: self.recipe.spec.clone(),
            windows,
            calibration: Some(self.windows.record.clone()),
            companions: self.model.companions(),
            out_dir: out.clone(),
            max_shard_bytes: SHARD_BYTES,
            device: DeviceContext::Cpu,
            resume: false,
            check: WeightCheck::done(self.checked.clone()),
            tool: TOOL.to_string(),
        };
        match try_watch(&job, None, View::ALONE) {
            Ok(record) => {
                eprint!("{}", gptq_report::summary(&record));
                self.measure(&out, &job.windows, Some(&record))
            }
            Err(error) => match *error {
                PipelineError::Verify { layer, source } => Ok(unfaithful(layer, &source)),
                error => Err(error.into()),
            },
        }
    }

    /// Measures a folder that somebody made.
    pub fn folder(&self, folder: &Path) -> Result<Measurement, Failure> {
        let record = self.record(folder)?;
        self.measure(folder, &self.windows.ids, record.as_ref())
    }

    /// The folder's own record, where its figures are of these tokens and this arithmetic.
    fn record(&self, folder: &Path) -> Result<Option<RunRecord>, Failure> {
        let path = folder.join(RECORD_FILE);
        let alone = |why: &str| {
            eprintln!(
                "`{}` {why}: damping, and the solver's own errors, are not compared",
                path.display()
            );
            Ok(None)
        };
        if !path.exists() {
            return alone("is absent");
        }
        let record: RunRecord = serde_json::from_str(&crate::matrix::read_text(&path)?)
            .map_err(|error| Failure::new(format!("`{}`: {error}", path.display())))?;
        let tokens = record.calibration.as_ref().map(|c| &c.token_sha256);
        if record.schema > RUN_RECORD_SCHEMA {
            return alone("has a newer schema");
        }
        if tokens != Some(&self.windows.record.token_sha256) {
            return alone("is of other calibration tokens");
        }
        if record.device != "cpu" || record.shared_hessian {
            return alone("is of a GPU, or of Hessians that several settings shared");
        }
        Ok(Some(record))
    }

    fn measure(
        &self,
        folder: &Path,
        windows: &[Vec<u32>],
        record: Option<&RunRecord>,
    ) -> Result<Measurement, Failure> {
        let checkpoint = Arc::new(Checkpoint::open(folder)?);
        let made = Model::of(checkpoint)?;
        let settings = self.settings(&made)?;
        let layers = self.layers(&made, &settings, windows, record)?;
        let (overall, scored) = self.score(&made)?;
        Ok(Measurement {
            outcome: Outcome {
                processor: processor(),
                layers,
                overall: Some(overall),
                unfaithful: None,
            },
            scored: Some(scored),
        })
    }

    /// The packing of the files; refuses another than the recipe's.
    fn settings(&self, made: &Model) -> Result<QuantizeConfig, Failure> {
        let place = made.dir().display();
        let settings = (made.open()?.quantization)
            .ok_or_else(|| Failure::new(format!("`{place}` holds no packed linears")))?;
        let spec = &self.recipe.spec;
        let pairs = [
            ("bits", settings.bits.to_string(), spec.bits.to_string()),
            (
                "group size",
                settings.group_size.to_string(),
                spec.group_size.to_string(),
            ),
            ("sym", settings.sym.to_string(), spec.sym.to_string()),
            (
                "format",
                settings.format.to_string(),
                spec.format.to_string(),
            ),
        ];
        match pairs.iter().find(|(_, found, wanted)| found != wanted) {
            None => Ok(settings),
            Some((what, found, wanted)) => Err(Failure::new(format!(
                "`{place}` has {what} {found}, the recipe {wanted}"
            ))),
        }
    }

    fn layers(
        &self,
        made: &Model,
        settings: &QuantizeConfig,
        windows: &[Vec<u32>],
        record: Option<&RunRecord>,
    ) -> Result<Vec<LayerOutcome>, Failure> {
        let packed = made.checkpoint.as_ref();
        let files = FilesToMeasure {
            source: self.model.checkpoint.clone(),
            config_json: &self.model.config_json,
            packed,
            settings,
            windows,
            measure: self.recipe.spec.measure(),
            spec: record.map_or(&self.recipe.spec, |record| &record.spec),
            layers: record.map_or(&[], |record| &record.layers),
        };
        let mut steps = Steps::new("measuring files", 0, packed_layers(packed).len());
        let mut layers: Vec<LayerOutcome> = Vec::new();
        measure_files(&files, &mut |measured| {
            layers.push(LayerOutcome {
                layer: measured.layer.clone(),
                file_error: measured.error,
                recorded: record
                    .and_then(|record| reported(record, measured.layer, measured.error)),
                content: content_sha256(measured.solved),
                tensors: BTreeMap::new(),
            });
            steps.set(layers.len());
        })?;
        steps.end();
        for outcome in &mut layers {
            outcome.tensors = tensor_sha256(packed, &outcome.layer)?;
        }
        Ok(layers)
    }

    fn score(&self, made: &Model) -> Result<(Overall, EvalRecord), Failure> {
        let mut scorer = Scorer::new(&self.text, DeviceContext::Cpu, false);
        let reference = scorer.score("float model", &self.model)?;
        let scored = scorer.score("files", made)?;
        let overall = Overall {
            reference_nll: reference.nll,
            nll: scored.nll,
            perplexity: scored.perplexity,
            kl: scored.kl.unwrap_or(f64::NAN),
            top1_agreement: scored.top1_agreement.unwrap_or(f64::NAN),
        };
        Ok((overall, scored))
    }
}

/// The run stopped: what it read back was not what it had solved.
fn unfaithful(layer: LayerName, difference: &VerifyError) -> Measurement {
    let text = match difference {
        VerifyError::Mismatch {
            what,
            row,
            column,
            expected,
            found,
            ..
        } => {
            format!("{what} at [{row}, {column}] is {found} in the file, {expected} in the solver")
        }
        other => other.to_string(),
    };
    Measurement {
        outcome: Outcome {
            processor: processor(),
            layers: Vec::new(),
            overall: None,
            unfaithful: Some((layer, format!("is not stored as it was solved: {text}"))),
        },
        scored: None,
    }
}

fn reported(record: &RunRecord, layer: &LayerName, measured: f64) -> Option<LayerLoss> {
    let row = record.layers.iter().find(|row| row.layer == *layer)?;
    let loss = row.loss.clone()?;
    // The solver's error is of the codes before training, which are in no file.
    let error = match record.spec.trains() {
        true => measured,
        false => loss.error,
    };
    Some(LayerLoss { error, ..loss })
}

/// Codes, scales, zeros and group indices, little-endian, one after the other.
fn content_sha256(solved: &SolvedLayer) -> String {
    let mut hasher = Sha256::new();
    hasher.update(&solved.codes);
    for scale in &solved.scales {
        hasher.update(scale.to_bits().to_le_bytes());
    }
    for zero in &solved.zeros {
        hasher.update(zero.to_le_bytes());
    }
    for group in &solved.g_idx {
        hasher.update(group.to_le_bytes());
    }
    hex(&hasher.finalize())
}

/// sha256 of each stored tensor that exists: other tools may omit `g_idx`.
fn tensor_sha256(
    packed: &Checkpoint,
    layer: &LayerName,
) -> Result<BTreeMap<String, String>, Failure> {
    let mut hashes = BTreeMap::new();
    for suffix in ["qweight", "qzeros", "scales", "g_idx"] {
        let name = layer.tensor(suffix);
        if packed.info(&name).is_some() {
            let digest = Sha256::digest(packed.bytes(&name)?);
            hashes.insert(suffix.to_string(), hex(&digest));
        }
    }
    Ok(hashes)
}
