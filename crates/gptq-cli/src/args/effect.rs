//! Flags that were typed and do nothing beside the others: each is told in a line, since whoever typed
//! one expects something of it.
//!
//! Where a flag never makes sense without another one, the arguments themselves refuse it; here is
//! what depends on values, and what scripts pass along with every method.

use clap::parser::ValueSource;
use clap::{ArgMatches, CommandFactory};

use super::quantize::MethodArg;
use super::{Cli, Command, DeviceArg, EvalArgs, MatrixArgs, QuantizeArgs, VerifyArgs};
use crate::device;
use crate::failure::Failure;

/// Flags by their identifiers, idle where the first value holds, and why.
type Rule = (bool, &'static [&'static str], &'static str);

/// Settings of the environment that are read as `0` or `1`, and the numbers.
const SWITCHES: [&str; 1] = ["HF_HUB_OFFLINE"];
const NUMBERS: [&str; 2] = ["RAYON_NUM_THREADS", "SOURCE_DATE_EPOCH"];

/// A line for every flag that does nothing.
pub fn idle_flags(cli: &Cli, matches: &ArgMatches) -> Vec<String> {
    let Some((name, typed)) = matches.subcommand() else {
        return Vec::new();
    };
    let rules = match &cli.command {
        Command::Quantize(args) => quantize(args),
        Command::Matrix(args) => matrix(args),
        Command::Eval(args) => eval(args),
        Command::Verify(args) => verify(args),
        _ => Vec::new(),
    };
    let all = Cli::command();
    let flag = |id: &str| {
        let mut defined = all.find_subcommand(name)?.get_arguments();
        defined.find(|flag| flag.get_id() == id)?.get_long()
    };
    let mut lines = Vec::new();
    for (holds, ids, because) in rules {
        let was_typed = |id: &&&str| typed.value_source(id) == Some(ValueSource::CommandLine);
        for id in ids.iter().filter(|_| holds).filter(was_typed) {
            lines.push(format!(
                "--{} has no effect: {because}",
                flag(id).unwrap_or(id)
            ));
        }
    }
    lines
}

/// Refuses a GPU that this program cannot use, whether the command needs one or not, and settings of
/// the environment that are none.
pub fn check(cli: &Cli) -> Result<(), Failure> {
    let devices: Vec<DeviceArg> = match &cli.command {
        Command::Quantize(args) => vec![args.device.device],
        Command::Eval(args) => vec![args.device.device],
        Command::Matrix(args) => args.device.clone(),
        Command::Generate(args) => vec![args.device.device],
        Command::Chat(args) => vec![args.device.device],
        Command::Verify(args) => vec![args.device],
        _ => Vec::new(),
    };
    devices.into_iter().try_for_each(device::check_built)?;
    let wrong = |name: &str, value: &str, expected: &str| {
        let value = gptq_types::outside_name::shown(value, 40);
        Failure::new(format!("{name} `{value}` is not {expected}"))
    };
    for (name, value) in given(&SWITCHES) {
        let known = ["0", "1", "true", "false", "yes", "no", "on", "off"];
        if !known.contains(&value.to_ascii_lowercase().as_str()) {
            return Err(wrong(name, &value, "0 or 1"));
        }
    }
    for (name, value) in given(&NUMBERS) {
        if value.parse::<u64>().is_err() {
            return Err(wrong(name, &value, "a whole number"));
        }
    }
    Ok(())
}

/// Those of the settings that are there and not empty.
fn given(names: &[&'static str]) -> Vec<(&'static str, String)> {
    let value = |name: &&'static str| Some((*name, std::env::var_os(name)?));
    (names.iter().filter_map(value))
        .map(|(name, value)| (name, value.to_string_lossy().into_owned()))
        .filter(|(_, value)| !value.is_empty())
        .collect()
}

fn quantize(args: &QuantizeArgs) -> Vec<Rule> {
    let rounds = matches!(args.method, MethodArg::Rtn);
    let data = "--method rtn looks at no data";
    let on_gpu = matches!(args.device.device, DeviceArg::Cuda(_));
    vec![
        (
            rounds && args.check_windows == 0,
            &["dataset", "samples", "tokens", "seed"],
            data,
        ),
        (
            rounds && !args.checks(),
            &["seq_len", "window_bos", "no_window_bos"],
            data,
        ),
        (rounds, &["temperature"], data),
        (
            rounds,
            &[
                "damp_percent",
                "no_scale_search",
                "unsigned_scales",
                "effort",
                "input_mismatch",
                "descent_passes",
                "training_epochs",
            ],
            data,
        ),
        (
            rounds,
            &["max_degraded"],
            "--method rtn is what layers are compared with",
        ),
        (
            rounds && !args.checks(),
            &["gpu_memory"],
            "--method rtn runs on the processor",
        ),
        (
            rounds && on_gpu && !args.checks(),
            &["device"],
            "--method rtn runs on the processor",
        ),
        (
            !rounds && args.dataset != "self",
            &["temperature"],
            "it is for --dataset self",
        ),
        (
            (!rounds || args.checks()) && is_on_processor(&[args.device.device]),
            &["gpu_memory"],
            "the run is on the processor",
        ),
    ]
}

fn matrix(args: &MatrixArgs) -> Vec<Rule> {
    let making = "--assemble makes no branch";
    let dry = "--dry-run writes nothing";
    vec![
        (
            args.evaluate == "none",
            &["eval_seq_len", "eval_windows"],
            "--evaluate none scores nothing",
        ),
        (
            args.assemble,
            &["device", "gpu_memory", "shared_hessian", "max_shard_size"],
            making,
        ),
        (
            !args.only.is_empty() && !args.dry_run,
            &["template"],
            "--only makes no cards",
        ),
        (
            args.dry_run,
            &["only", "assemble", "card", "template", "max_shard_size"],
            dry,
        ),
        (
            !args.assemble && is_on_processor(&args.device),
            &["gpu_memory"],
            "all devices are the processor",
        ),
    ]
}

fn eval(args: &EvalArgs) -> Vec<Rule> {
    vec![(
        is_on_processor(&[args.device.device]),
        &["gpu_memory"],
        "the run is on the processor",
    )]
}

fn verify(args: &VerifyArgs) -> Vec<Rule> {
    vec![(
        args.write.is_some(),
        &["tolerance"],
        "--write compares nothing",
    )]
}

fn is_on_processor(devices: &[DeviceArg]) -> bool {
    devices.iter().all(|device| match device {
        DeviceArg::Cpu => true,
        DeviceArg::Auto => !device::has_gpu(),
        DeviceArg::Cuda(_) => false,
    })
}
