//! Where the time of a run went.

use gptq_types::RunRecord;

/// A Markdown table of phases; `sgemm` is the machine's own f32 product rate in FLOP/s, measured
/// in the same run.
pub fn profile(record: &RunRecord, sgemm: f64) -> String {
    let mut out = format!("sgemm of this machine: {:.1} GFLOP/s\n\n", sgemm / 1e9);
    out += "| phase | seconds | share | GFLOP/s | of sgemm |\n|---|---|---|---|---|\n";
    let all: f64 = record.phases.seconds.values().sum();
    for (phase, seconds) in &record.phases.seconds {
        let rate = record.phases.flop.get(phase).map(|flop| flop / seconds);
        let name = serde_json::to_value(phase).unwrap_or_default();
        out += &format!(
            "| {} | {seconds:.2} | {:.1} % | {} | {} |\n",
            name.as_str().unwrap_or_default(),
            100.0 * seconds / all,
            rate.map_or(String::new(), |rate| format!("{:.1}", rate / 1e9)),
            rate.map_or(String::new(), |rate| format!(
                "{:.0} %",
                100.0 * rate / sgemm
            )),
        );
    }
    let counted = record.phases.flop.keys();
    let seconds: f64 = counted
        .filter_map(|phase| record.phases.seconds.get(phase))
        .sum();
    let flop: f64 = record.phases.flop.values().sum();
    if seconds > 0.0 {
        out += &format!(
            "\nforward + Hessian: {:.1} GFLOP/s, {:.0} % of sgemm\n",
            flop / seconds / 1e9,
            100.0 * flop / seconds / sgemm
        );
    }
    out
}
