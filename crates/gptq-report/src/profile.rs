//! Time profile of a run.

use std::collections::BTreeMap;

use gptq_types::{Phase, RunRecord};

/// FLOP/s of the machine's libraries on large products, measured in the same run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rates {
    /// In the type of the forward pass and the Hessian.
    pub products: f64,
    /// In f32, which the sweep passes errors on in.
    pub f32: f64,
    /// In f64, which Hessians are factored in.
    pub f64: f64,
}

impl Rates {
    fn of(&self, phase: Phase) -> f64 {
        match phase {
            Phase::Factor => self.f64,
            Phase::Sweep | Phase::Measure => self.f32,
            _ => self.products,
        }
    }
}

/// Phases that run on a CPU thread concurrently with GPU work.
const BESIDE: [Phase; 3] = [Phase::Pack, Phase::Write, Phase::Verify];

/// A Markdown table of phases: the floor of a phase is the time that its products alone would take
/// at the machine's own rate.
pub fn profile(record: &RunRecord, rates: &Rates) -> String {
    let mut out = format!(
        "products of this machine: {:.1} GFLOP/s; in f32 {:.1}, in f64 {:.1}\n\n",
        rates.products / 1e9,
        rates.f32 / 1e9,
        rates.f64 / 1e9
    );
    out += "| phase | seconds | share | GFLOP/s | floor, s | of its rate |\n|---|---|---|---|---|---|\n";
    for (phase, seconds) in &record.phases.seconds {
        let name = serde_json::to_value(phase).unwrap_or_default();
        let share = match record.device != "cpu" && BESIDE.contains(phase) {
            true => "beside".to_string(),
            false => format!("{:.1} %", 100.0 * seconds / record.seconds),
        };
        let products = match record.phases.flop.get(phase) {
            None => " |  | ".to_string(),
            Some(flop) => format!(
                "{:.1} | {:.2} | {:.0} %",
                flop / seconds / 1e9,
                flop / rates.of(*phase),
                100.0 * flop / seconds / rates.of(*phase)
            ),
        };
        let name = name.as_str().unwrap_or_default();
        out += &format!("| {name} | {seconds:.2} | {share} | {products} |\n");
    }
    let both = [Phase::Forward, Phase::Hessian];
    let sum =
        |values: &BTreeMap<Phase, f64>| both.iter().filter_map(|p| values.get(p)).sum::<f64>();
    let (seconds, flop) = (sum(&record.phases.seconds), sum(&record.phases.flop));
    if seconds > 0.0 {
        out += &format!(
            "\nforward + Hessian: {:.1} GFLOP/s, {:.0} % of the product rate; all: {:.1} s\n",
            flop / seconds / 1e9,
            100.0 * flop / seconds / rates.products,
            record.seconds
        );
    }
    out
}
