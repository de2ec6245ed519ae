//! The baseline file of `gptq regress`: the accuracy of a past quantization, and the tolerances for later ones.

use std::collections::BTreeMap;

use serde::de::{Deserializer, Error as _};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::outside_name::shown;
use crate::{CalibrationRequest, LayerLoss, LayerName, QuantSpec};

/// Version of [`Baseline`]; readers refuse a larger one.
pub const BASELINE_SCHEMA: u32 = 1;

/// A recipe, and what came of it. The recipe alone is written by hand.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Baseline {
    /// [`BASELINE_SCHEMA`].
    pub schema: u32,
    /// The quantization to run again.
    pub recipe: Recipe,
    /// Its results; absent until it ran once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub figures: Option<Figures>,
}

/// A quantization that can be repeated, and the text that its result is scored on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// A folder, relative to the file that holds the recipe, or `owner/name[:branch]`.
    pub model: String,
    /// Settings; keys that are none are refused, where a record may hold those of a later version.
    #[serde(deserialize_with = "known_settings")]
    pub spec: QuantSpec,
    /// Calibration tokens; a file is relative to the file that holds the recipe.
    pub calibration: CalibrationRequest,
    /// Text of the perplexity; likewise.
    pub evaluation: EvaluationRequest,
}

fn known_settings<'de, D: Deserializer<'de>>(deserializer: D) -> Result<QuantSpec, D::Error> {
    let given = Map::<String, Value>::deserialize(deserializer)?;
    let spec = QuantSpec::deserialize(Value::Object(given.clone())).map_err(D::Error::custom)?;
    let known = serde_json::to_value(&spec).map_err(D::Error::custom)?;
    match given.keys().find(|key| known.get(key.as_str()).is_none()) {
        None => Ok(spec),
        Some(key) => {
            let key = shown(key, 40);
            Err(D::Error::custom(format!("unknown field `{key}` of `spec`")))
        }
    }
}

/// The text that perplexity is measured on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EvaluationRequest {
    /// A registered name or a file, as `--dataset` takes it.
    pub dataset: String,
    /// Tokens in a window.
    pub seq_len: usize,
    /// Windows from the start; all where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_windows: Option<usize>,
    /// Whether each window begins with the beginning-of-sequence token; where it is absent, as the model's
    /// family needs it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub window_bos: Option<bool>,
}

/// The results of a recipe.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// Name and version of the tool.
    pub tool: String,
    /// Instruction set of the processor: another one may round otherwise.
    pub processor: String,
    /// The inputs that the figures belong to.
    pub inputs: Inputs,
    /// Figures of the whole model.
    pub overall: Overall,
    /// Tolerances for a later run.
    pub tolerances: Tolerances,
    /// A row per quantized linear, in the order of the data.
    pub layers: Vec<LayerFigures>,
}

/// Hashes of all that a recipe reads, sha256 in lower-case hex.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Inputs {
    /// Hashes of the float model's files, by name: `config.json` and every weight file.
    pub model: BTreeMap<String, String>,
    /// Hash of the calibration tokens, as little-endian u32.
    pub calibration_tokens: String,
    /// Hash of the evaluated tokens, likewise.
    pub evaluation_tokens: String,
}

/// One quantized linear.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerFigures {
    /// Module name.
    pub layer: LayerName,
    /// The loss reported by the solver; its `error` is also the one measured from the files.
    pub loss: LayerLoss,
    /// sha256 of what the files mean: codes, scales, zeros and group indices once they are read.
    pub content: String,
    /// sha256 of the stored bytes, by tensor: `qweight`, `qzeros`, `scales`, `g_idx`.
    pub tensors: BTreeMap<String, String>,
}

/// Scores of the float model and of the files.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Overall {
    /// Mean negative log-likelihood of the float model, nats per token.
    pub reference_nll: f64,
    /// Mean negative log-likelihood of the files, nats per token.
    pub nll: f64,
    /// `exp(nll)`, for people.
    pub perplexity: f64,
    /// Mean divergence of the files from the float model, nats.
    pub kl: f64,
    /// Share of positions where both have the same likeliest token.
    pub top1_agreement: f64,
}

/// How much worse each figure may get. An improvement of the same size is reported too.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Tolerances {
    /// Tolerance of a layer's output error, as a share of the baseline's.
    pub layer_error: Tolerance,
    /// Between the error that the solver reported and that of the files, as a share of the first.
    pub file_error: Tolerance,
    /// Tolerance of the float model's log-likelihood, nats, up or down.
    pub reference_nll: Tolerance,
    /// Tolerance of the quantized model's log-likelihood, nats.
    pub nll: Tolerance,
    /// Tolerance of the divergence, as a share of the baseline's.
    pub kl: Tolerance,
    /// Tolerance of the share of equal top tokens.
    pub top1_agreement: Tolerance,
}

/// A limit and where it comes from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Tolerance {
    /// In the unit of its field.
    pub value: f64,
    /// Why this much.
    pub reason: String,
}

impl Baseline {
    /// Refuses settings outside their range, and a recipe that would have no layer errors.
    ///
    /// # Errors
    /// Checks the baseline; the error says what is wrong.
    pub fn check(&self) -> Result<(), String> {
        if self.recipe.spec.method == crate::Method::Rtn {
            let text = "method rtn has no layer errors to compare: it looks at no data";
            return Err(text.to_string());
        }
        self.recipe
            .spec
            .validate()
            .map_err(|error| error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Method, QuantSpec};

    const BY_HAND: &str = r#"{
        "schema": 1,
        "recipe": {
            "model": "owner/name",
            "spec": {
                "bits": 4, "group_size": 128, "sym": true, "order": "natural",
                "damp_percent": 0.1, "method": "gptq", "format": "gptq", "scale_search": true
            },
            "calibration": {"dataset": "c4", "samples": 128, "seq_len": 2048, "seed": 0},
            "evaluation": {"dataset": "wikitext2", "seq_len": 2048}
        }
    }"#;

    #[test]
    fn a_recipe_is_written_by_hand() {
        let baseline: Baseline = serde_json::from_str(BY_HAND).unwrap();
        assert_eq!(baseline.recipe.spec, QuantSpec::published());
        assert_eq!(baseline.figures, None);
        assert_eq!(baseline.check(), Ok(()));
        assert_eq!(baseline.recipe.calibration.window_bos, None);
        assert!(!serde_json::to_string(&baseline).unwrap().contains("bos"));
        let begun = BY_HAND.replace("2048}\n", "2048, \"window_bos\": true}\n");
        let begun: Baseline = serde_json::from_str(&begun).unwrap();
        assert_eq!(begun.recipe.evaluation.window_bos, Some(true));
        let misspelt = BY_HAND.replace(
            "\"seq_len\": 2048}\n",
            "\"seq_len\": 2048, \"window\": 3}\n",
        );
        let error = serde_json::from_str::<Baseline>(&misspelt).unwrap_err();
        assert!(error.to_string().contains("`window`"), "{error}");
        // A misplaced key was once ignored, and dropped by `--update`.
        let misplaced = BY_HAND.replace("\"sym\": true", "\"sym\": true, \"effort\": \"fast\"");
        let error = serde_json::from_str::<Baseline>(&misplaced).unwrap_err();
        assert!(error.to_string().contains("`effort`"), "{error}");
    }

    #[test]
    fn a_recipe_without_calibration_is_refused() {
        let mut baseline: Baseline = serde_json::from_str(BY_HAND).unwrap();
        baseline.recipe.spec.method = Method::Rtn;
        baseline.recipe.spec.scale_search = false;
        assert!(baseline.check().unwrap_err().contains("rtn"));
        baseline.recipe.spec = QuantSpec {
            damp_percent: 2.0,
            ..QuantSpec::published()
        };
        assert!(baseline.check().unwrap_err().contains('2'));
    }
}
