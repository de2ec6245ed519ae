//! The table of a matrix before it is made.

use gptq_types::{Forecast, GroupSize, Method, PlannedBranch};

use crate::markup::plain;
use crate::size;

/// Markdown of what each branch will be, with its forecast where there is one.
pub fn matrix_table(branches: &[PlannedBranch]) -> String {
    let mut out = String::from(
        "| branch | bits | group | order | damp | dataset | windows | size | bits per weight | time | memory | not read by |\n\
         |---|---|---|---|---|---|---|---|---|---|---|---|\n",
    );
    for branch in branches {
        let (permutation, spec) = (&branch.permutation, &branch.permutation.spec);
        let order = serde_json::to_value(spec.order).unwrap_or_default();
        let group = match spec.group_size {
            GroupSize::None => "none".to_string(),
            GroupSize::Channels(size) => size.to_string(),
        };
        let calibration = &permutation.calibration;
        let (dataset, windows) = match spec.method {
            Method::Rtn => ("none".to_string(), String::new()),
            Method::Gptq => (
                plain(&calibration.dataset),
                format!("{} x {}", calibration.samples, calibration.seq_len),
            ),
        };
        out += &format!(
            "| {} | {} | {group} | {} | {} | {dataset} | {windows} | ",
            plain(&permutation.branch),
            spec.bits,
            order.as_str().unwrap_or_default(),
            spec.damp_percent,
        );
        out += &match &branch.refusal {
            Some(reason) => format!("impossible: {} | | | | |\n", plain(reason)),
            None => format!(
                "{} | {:.2} | {} | {} | {} |\n",
                size(branch.weight_bytes),
                branch.bits_per_weight,
                branch
                    .forecast
                    .map_or(String::new(), |forecast| about(forecast.seconds)),
                memory(branch),
                refusing(branch)
            ),
        };
    }
    out + &were_run(branches)
}

/// A sentence on the runtimes that were run, as opposed to those judged by their source alone.
fn were_run(branches: &[PlannedBranch]) -> String {
    let Some(readings) = (branches.iter().map(|branch| &branch.readings)).find(|r| !r.is_empty())
    else {
        return String::new();
    };
    let run: Vec<&str> = readings
        .iter()
        .filter_map(|reading| reading.run.as_deref())
        .collect();
    format!(
        "\n{} were run on files of this tool. What the others read is known from their source alone.\n",
        run.join(" and ")
    )
}

fn refusing(branch: &PlannedBranch) -> String {
    let refused = branch.readings.iter();
    let names: Vec<String> = refused
        .filter_map(|reading| {
            Some(format!(
                "{} ({})",
                reading.reader,
                reading.refusal.as_ref()?
            ))
        })
        .collect();
    names.join(", ")
}

/// On the GPU, where there is one, and in host memory.
fn memory(branch: &PlannedBranch) -> String {
    match branch.forecast {
        None => size(branch.memory),
        Some(Forecast {
            gpu_memory: None,
            host_memory,
            ..
        }) => size(host_memory),
        Some(Forecast {
            gpu_memory: Some(there),
            host_memory,
            ..
        }) => format!(
            "{} on the GPU, {} of the host",
            size(there),
            size(host_memory)
        ),
    }
}

fn about(seconds: f64) -> String {
    match seconds {
        s if s < 90.0 => format!("{s:.0} s"),
        s if s < 5400.0 => format!("{:.0} min", s / 60.0),
        s => format!("{:.1} h", s / 3600.0),
    }
}
