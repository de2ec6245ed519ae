//! `gptq quantize`.

use std::thread;

use gptq_model::{DecoderConfig, Device};
use gptq_pipeline::{CheckedWeights, Job, check_shapes, check_unquantised, check_weights};
use gptq_types::{Method, RunRecord};

use crate::Verdict;
use crate::args::{QuantizeArgs, shard_bytes};
use crate::calibrate::calibrate;
use crate::device;
use crate::failure::Failure;
use crate::models::{Model, find};
use crate::output::{check_vacant, print, print_json};
use crate::watch::{TOOL, watch};

pub fn run(args: &QuantizeArgs) -> Result<Verdict, Failure> {
    let spec = args.spec()?;
    check_vacant(&args.out)?;
    let max_shard_bytes = shard_bytes(args.max_shard_size)?;
    let model = find(&args.model, &args.hub)?;
    let config = DecoderConfig::parse(&model.config_json)
        .map_err(|error| Failure::new(format!("{}: {error}", model.dir().display())))?;
    check_unquantised(model.checkpoint.as_ref(), &model.config_json)?;
    check_shapes(&config, &spec)?;
    // Rounding to nearest looks at no activations: there is nothing for a GPU to do.
    let device = match spec.method {
        Method::Gptq => device::resolve(&args.device)?,
        Method::Rtn => Device::Cpu,
    };
    let windows = || match spec.method {
        Method::Gptq => {
            let request = args.calibration();
            let temperature = args.temperature;
            calibrate(&request, temperature, &model, &config, device, &args.hub).map(Some)
        }
        Method::Rtn => Ok(None),
    };
    let (windows, checked) = beside_the_check(&model, windows)?;
    let (windows, calibration) = match windows {
        Some(windows) => (windows.ids, Some(windows.record)),
        None => (Vec::new(), None),
    };
    let job = Job {
        source: model.checkpoint.clone(),
        config_json: model.config_json.clone(),
        model_name: args.model.clone(),
        spec,
        windows,
        calibration,
        companions: model.companions(),
        out_dir: args.out.clone(),
        max_shard_bytes,
        device,
        resume: args.resume,
        checked: Some(checked),
        tool: TOOL.to_string(),
    };
    let record = watch(&job, "blocks", false)?;
    report(args, &record)
}

/// All weights are read once while `work` is done, which reads little.
pub fn beside_the_check<R>(
    model: &Model,
    work: impl FnOnce() -> Result<R, Failure>,
) -> Result<(R, CheckedWeights), Failure> {
    let source = model.checkpoint.as_ref();
    let (checked, done) = thread::scope(|scope| {
        let check = scope.spawn(|| check_weights(source));
        let done = work();
        (check.join(), done)
    });
    let done = done?;
    let checked = checked.map_err(|_| Failure::new("the check of the weights ended in a panic"))?;
    Ok((done, checked?))
}

fn report(args: &QuantizeArgs, record: &RunRecord) -> Result<Verdict, Failure> {
    eprint!("{}", gptq_report::summary(record));
    eprintln!("wrote {}", args.out.display());
    if args.json {
        print_json(record)?;
    }
    if args.profile {
        let text = gptq_report::profile(record, &device::rates()?);
        match args.json {
            true => eprint!("{text}"),
            false => print(&text)?,
        }
    }
    let degraded = record
        .layers
        .iter()
        .filter(|l| l.is_worse_than_rtn())
        .count();
    match args.max_degraded {
        Some(limit) if degraded > limit => {
            eprintln!("{degraded} degraded layers are more than {limit}");
            Ok(Verdict::No)
        }
        _ => Ok(Verdict::Yes),
    }
}
