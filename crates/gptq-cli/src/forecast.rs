//! What a run will take, in words, and the branches of a matrix with it.

use gptq_model::ModelSpec;
use gptq_pipeline::{Machine, forecast, windows_of};
use gptq_types::{Forecast, PlannedBranch};

/// `about 2 min 30 s, 31 GB of GPU memory, 6.1 GB of host memory`; `left` is the share of the blocks that are not
/// done yet.
pub fn words(forecast: &Forecast, left: f64) -> String {
    let mut words = format!("about {}", duration(left * forecast.seconds));
    if let Some(bytes) = forecast.gpu_memory {
        words += &format!(", {} of GPU memory", memory(bytes));
    }
    words + &format!(", {} of host memory", memory(forecast.host_memory))
}

/// Two units, as many digits as a forecast is worth.
fn duration(seconds: f64) -> String {
    let tens = (seconds / 10.0).round() as u64 * 10;
    let minutes = (seconds / 60.0).round() as u64;
    match seconds {
        s if s < 90.0 => format!("{:.0} s", s.max(1.0)),
        s if s < 600.0 => match (tens / 60, tens % 60) {
            (minutes, 0) => format!("{minutes} min"),
            (minutes, seconds) => format!("{minutes} min {seconds} s"),
        },
        s if s < 5400.0 => format!("{minutes} min"),
        _ => format!("{} h {} min", minutes / 60, minutes % 60),
    }
}

fn memory(bytes: u64) -> String {
    match bytes as f64 / 1e9 {
        gb if gb < 1.0 => format!("{:.0} MB", gb * 1e3),
        gb if gb < 9.95 => format!("{gb:.1} GB"),
        gb => format!("{gb:.0} GB"),
    }
}

/// Adds to each branch what it will take on a machine, or that it does not fit there.
pub fn forecast_branches(branches: &mut [PlannedBranch], model: &ModelSpec, machine: &Machine) {
    for branch in branches
        .iter_mut()
        .filter(|branch| branch.refusal.is_none())
    {
        let permutation = &branch.permutation;
        let windows = [windows_of(permutation)];
        match forecast(model, &permutation.spec, &windows, machine) {
            Ok(forecast) => branch.forecast = Some(forecast),
            Err(error) => branch.refusal = Some(error.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_forecast_has_as_many_digits_as_it_is_worth() {
        let of = |seconds, gpu_memory| Forecast {
            seconds,
            gpu_memory,
            host_memory: 6_120_000_000,
        };
        let told = words(&of(152.0, Some(31_200_000_000)), 1.0);
        assert_eq!(
            told,
            "about 2 min 30 s, 31 GB of GPU memory, 6.1 GB of host memory"
        );
        let told = words(&of(152.0, None), 0.25);
        assert_eq!(told, "about 38 s, 6.1 GB of host memory");
        for (seconds, told) in [
            (0.01, "1 s"),
            (89.7, "90 s"),
            (118.0, "2 min"),
            (598.0, "10 min"),
            (5300.0, "88 min"),
            (9000.0, "2 h 30 min"),
        ] {
            assert_eq!(duration(seconds), told);
        }
        assert_eq!(memory(151_000_000), "151 MB");
    }
}
