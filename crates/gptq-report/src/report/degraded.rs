//! Degradations of a run, by name.

use gptq_types::{LayerLoss, LayerRecord, RunRecord};
use serde::Serialize;

/// Degradations of a run; all lists are empty if nothing degraded.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Degraded {
    /// Layers that plain rounding would have done better.
    pub worse: Vec<Worse>,
    /// Layers whose Hessian took more damping than asked for.
    pub damped: Vec<Damped>,
    /// Layers with input channels that no calibration token used.
    pub dead: Vec<Dead>,
    /// Warnings, each text once.
    pub warnings: Vec<Warned>,
    /// Layers whose error is not known: rounding to nearest sees no inputs.
    pub unmeasured: usize,
    /// All layers.
    pub layers: usize,
}

/// A layer above the error of rounding to nearest.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Worse {
    /// Module name.
    pub layer: String,
    /// Its error over that of rounding, above 1.
    pub ratio: f64,
}

/// A layer that was damped further.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Damped {
    /// Module name.
    pub layer: String,
    /// Share that was asked for.
    pub asked: f64,
    /// Share in the end.
    pub used: f64,
    /// Number of times damping was raised.
    pub escalations: u32,
}

/// A layer with unused inputs.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Dead {
    /// Module name.
    pub layer: String,
    /// Channels that were zero on every token.
    pub channels: usize,
    /// Number of all channels.
    pub of: usize,
}

/// A warning of the run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Warned {
    /// The warning.
    pub text: String,
    /// The modules it concerns; empty for the run.
    pub modules: Vec<String>,
}

/// Whether a layer was damped more than requested.
fn is_damped_further(loss: &LayerLoss, asked: f64) -> bool {
    loss.damp_escalations > 0 || loss.damp_used > asked * (1.0 + 1e-9)
}

impl Degraded {
    /// Looks through a run.
    pub(super) fn of(run: &RunRecord) -> Self {
        let asked = run.spec.damp_percent;
        let mut found = Degraded {
            warnings: warnings(run),
            layers: run.layers.len(),
            ..Degraded::default()
        };
        for layer in &run.layers {
            match &layer.loss {
                Some(loss) => found.add(layer, loss, asked),
                None => found.unmeasured += 1,
            }
        }
        found
    }

    /// Whether nothing degraded.
    pub fn is_nothing(&self) -> bool {
        self.no_layer() && self.warnings.is_empty()
    }

    /// Whether no layer degraded; there may be warnings.
    pub(super) fn no_layer(&self) -> bool {
        self.worse.is_empty() && self.damped.is_empty() && self.dead.is_empty()
    }

    fn add(&mut self, record: &LayerRecord, loss: &LayerLoss, asked: f64) {
        let layer = record.layer.0.clone();
        if record.is_worse_than_rtn() {
            self.worse.push(Worse {
                layer: layer.clone(),
                ratio: loss.error / loss.rtn_error,
            });
        }
        if is_damped_further(loss, asked) {
            self.damped.push(Damped {
                layer: layer.clone(),
                asked,
                used: loss.damp_used,
                escalations: loss.damp_escalations,
            });
        }
        if loss.dead_channels > 0 {
            self.dead.push(Dead {
                layer,
                channels: loss.dead_channels,
                of: record.in_features,
            });
        }
    }
}

fn warnings(run: &RunRecord) -> Vec<Warned> {
    let mut found: Vec<Warned> = Vec::new();
    for warning in &run.warnings {
        let module = Some(warning.module.clone()).filter(|module| !module.is_empty());
        match found.iter_mut().find(|known| known.text == warning.text) {
            Some(known) => known.modules.extend(module),
            None => found.push(Warned {
                text: warning.text.clone(),
                modules: module.into_iter().collect(),
            }),
        }
    }
    found
}
