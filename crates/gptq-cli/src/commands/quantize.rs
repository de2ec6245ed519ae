//! `gptq quantize`.

use std::path::Path;

use gptq_model::{DeviceContext, ModelSpec, WindowRun};
use gptq_packer::{ClaimedPlace, StageError};
use gptq_pipeline::{
    Compare, Job, PipelineError, WeightCheck, check_beside, check_gpu_memory, check_shapes,
    check_unquantized, forecast, may_be_finished,
};
use gptq_report::quoted;
use gptq_types::{Method, RunRecord, TensorSource};

use crate::Verdict;
use crate::args::{QuantizeArgs, shard_bytes};
use crate::calibrate::calibrate_and_hold_out;
use crate::datasets::public_name;
use crate::device;
use crate::divergence::Texts;
use crate::failure::Failure;
use crate::models::{find, public_folder_name, public_model_name};
use crate::output::{print, print_json};
use crate::unread_keys;
use crate::watch::{TOOL, View, try_watch};

pub fn run(args: &QuantizeArgs) -> Result<Verdict, Failure> {
    let spec = args.spec()?;
    check_target(&args.out, args.resume)?;
    let max_shard_bytes = shard_bytes(&args.max_shard_size)?;
    let model = find(&args.model, &args.hub)?
        .with_tokenizer(args.tokenizer.folder.as_deref())
        .with_rebuilt_tokenizer()?;
    let config = ModelSpec::read(&model.config_json, &model.checkpoint.names())
        .map_err(|error| Failure::new(format!("{}: {error}", model.dir().display())))?;
    unread_keys::refuse(&args.strict, &args.model, &config)?;
    check_unquantized(model.checkpoint.as_ref(), &model.config_json)?;
    check_shapes(&config, &spec)?;
    // Rounding to nearest looks at no activations: there is nothing for a GPU to do but to compare.
    let solves = spec.method == Method::Gptq;
    let comparing = match solves || args.checks() {
        true => device::resolve(&args.device)?,
        false => DeviceContext::Cpu,
    };
    let device = match solves {
        true => comparing.clone(),
        false => DeviceContext::Cpu,
    };
    let request = args.calibration();
    if let Some(memory) = device::gpu_memory(device.device()) {
        let asked = [WindowRun {
            windows: request.samples,
            tokens: request.seq_len,
        }];
        check_gpu_memory(&config, &spec, &asked, memory).map_err(PipelineError::from)?;
    }
    // Before the check of the weights, which would slow what is measured.
    let machine = device::machine(&device)?;
    let mut job = Job {
        source: model.checkpoint.clone(),
        config_json: model.config_json.clone(),
        model_name: public_model_name(&args.model),
        tokenizer: (args.tokenizer.folder.as_deref()).map(public_folder_name),
        spec,
        windows: Vec::new(),
        calibration: None,
        companions: model.companions(),
        out_dir: args.out.clone(),
        max_shard_bytes,
        device: device.clone(),
        resume: args.resume,
        // Beside the choice of windows, which reads little.
        check: WeightCheck::begin(model.checkpoint.clone(), device.device()),
        tool: TOOL.to_string(),
    };
    check_beside(&job)?;
    let mut texts = Texts::read(args, &model, &config)?;
    // Rounding to nearest is compared on the windows that GPTQ would have held out.
    if solves || args.check_windows > 0 {
        let (mut windows, beside) = calibrate_and_hold_out(
            &request,
            args.check_windows,
            args.temperature,
            &model,
            &config,
            device.device(),
            &args.hub,
        )?;
        if let Some(beside) = beside {
            texts.put_first(&args.dataset, beside, windows.record.window_bos);
        }
        if solves {
            windows.record.dataset = public_name(&windows.record.dataset);
            job.windows = windows.ids;
            job.calibration = Some(windows.record);
        }
    }
    let mut compare = |folder: &Path| texts.compare(&model, &comparing, folder);
    let compare: Option<&mut Compare<'_>> = match texts.is_empty() {
        true => None,
        false => Some(&mut compare),
    };
    let windows = WindowRun::of(&job.windows);
    let forecast = forecast(&config, &job.spec, &windows, &machine).map_err(PipelineError::from)?;
    let view = View {
        forecast: Some(&forecast),
        ..View::ALONE
    };
    let record = try_watch(&job, compare, view).map_err(|error| with_command(*error))?;
    texts.warn_of_missing(&record);
    report(args, &record, &device)
}

/// Refuses at once what could not be published, or what another process writes.
fn check_target(out: &Path, resume: bool) -> Result<(), Failure> {
    match ClaimedPlace::claim(out) {
        Err(StageError::Occupied(_)) if may_be_finished(out, resume) => Ok(()),
        Err(error) => Err(PipelineError::from(error).into()),
        Ok(place) if !resume && place.partial_dir().exists() => {
            let partial = place.partial_dir().to_path_buf();
            Err(PipelineError::from(StageError::PartialExists(partial)).into())
        }
        Ok(_) => Ok(()),
    }
}

/// Says how to go on where something is kept.
fn with_command(error: PipelineError) -> Failure {
    let is_kept = matches!(error, PipelineError::Kept { .. });
    let mut failure = Failure::from(error);
    if let Some(hint) = failure.hint.as_mut().filter(|_| is_kept) {
        let mut words: Vec<String> = std::env::args().map(|word| quoted(&word)).collect();
        if !words.iter().any(|word| word == "--resume") {
            words.push("--resume".to_string());
        }
        *hint += &format!(": {}", words.join(" "));
    }
    failure
}

fn report(
    args: &QuantizeArgs,
    record: &RunRecord,
    device: &DeviceContext,
) -> Result<Verdict, Failure> {
    eprint!("{}", gptq_report::summary(record));
    eprintln!("wrote {}", args.out.display());
    if args.json {
        print_json(record)?;
    }
    if args.profile {
        let text = gptq_report::profile(record, &device::rates(device)?);
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
