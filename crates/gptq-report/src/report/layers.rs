//! Layer records by depth: a module of the block, a value for each block.

use gptq_types::{LayerLoss, RunRecord};

use super::data::Report;

/// A linear of every block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Module {
    /// Path inside of the block: `self_attn.q_proj`.
    pub(super) path: String,
}

impl Module {
    /// `q`, `down`.
    pub(super) fn title(&self) -> &str {
        let last = self.path.rsplit('.').next().unwrap_or(&self.path);
        last.strip_suffix("_proj").unwrap_or(last)
    }
}

/// Block and path of a layer: `model.layers.3.mlp.up_proj` is `mlp.up_proj` of block 3.
pub(super) fn place(layer: &str) -> Option<(usize, &str)> {
    let mut rest = layer;
    while let Some((word, after)) = rest.split_once('.') {
        if let Ok(block) = word.parse() {
            return Some((block, after));
        }
        rest = after;
    }
    None
}

/// Modules with a known error, in the order of the data.
pub(super) fn modules(report: &Report) -> Vec<Module> {
    let mut found: Vec<Module> = Vec::new();
    for run in report.rows.iter().filter_map(|row| row.run.as_ref()) {
        let measured = run.layers.iter().filter(|layer| layer.loss.is_some());
        for (_, path) in measured.filter_map(|layer| place(&layer.layer.0)) {
            if found.iter().all(|module| module.path != path) {
                found.push(Module {
                    path: path.to_string(),
                });
            }
        }
    }
    found
}

/// The last block with a known error.
pub(super) fn last_block(report: &Report) -> usize {
    (report.rows.iter())
        .filter_map(|row| row.run.as_ref())
        .flat_map(|run| run.layers.iter().filter(|layer| layer.loss.is_some()))
        .filter_map(|layer| Some(place(&layer.layer.0)?.0))
        .max()
        .unwrap_or(0)
}

/// A value of a module in every block, by block.
pub(super) fn by_depth(
    run: &RunRecord,
    module: &Module,
    value: impl Fn(&LayerLoss) -> Option<f64>,
) -> Vec<(f64, f64)> {
    let mut points: Vec<(f64, f64)> = (run.layers.iter())
        .filter_map(|layer| {
            let (block, path) = place(&layer.layer.0)?;
            let value = value(layer.loss.as_ref()?)?;
            (path == module.path && value.is_finite()).then_some((block as f64, value))
        })
        .collect();
    points.sort_by(|one, other| one.0.total_cmp(&other.0));
    points
}

/// Error over that of rounding to nearest; where rounding is exact there is nothing to compare.
pub(super) fn against_rtn(loss: &LayerLoss) -> Option<f64> {
    (loss.rtn_error > 0.0).then(|| loss.error / loss.rtn_error)
}

/// Relative error of the layer's output, in percent.
pub(super) fn relative_output(loss: &LayerLoss) -> Option<f64> {
    (loss.signal > 0.0).then(|| 100.0 * (loss.error / loss.signal).sqrt())
}

/// Error of a module in all blocks over that of rounding.
pub(super) fn module_against_rtn(run: &RunRecord, module: &Module) -> Option<f64> {
    let sum = |value: fn(&LayerLoss) -> f64| -> f64 {
        let points = by_depth(run, module, |loss| Some(value(loss)));
        points.iter().map(|(_, value)| value).sum()
    };
    let rtn = sum(|loss| loss.rtn_error);
    (rtn > 0.0).then(|| sum(|loss| loss.error) / rtn)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_lie_in_blocks() {
        let q = "model.layers.11.self_attn.q_proj";
        assert_eq!(place(q), Some((11, "self_attn.q_proj")));
        assert_eq!(place("lm_head"), None);
        let module = |path: &str| Module { path: path.into() };
        assert_eq!(module("mlp.down_proj").title(), "down");
        assert_eq!(module("fc").title(), "fc");
    }
}
