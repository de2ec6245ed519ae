//! `gptq quantize`.

use std::sync::Arc;

use gptq_calibration::{Source, Tokenizer, WindowSpec, Windows, windows};
use gptq_model::{DecoderConfig, Device, FloatWeights, SampleSpec, sample_windows};
use gptq_pipeline::{Job, Progress, check_shapes, check_unquantised, quantize};
use gptq_types::{Method, RunRecord};

use crate::Verdict;
use crate::args::QuantizeArgs;
use crate::datasets::HubFiles;
use crate::device;
use crate::failure::Failure;
use crate::models::{Model, find};
use crate::output::{print, print_json};
use crate::progress::Steps;

/// A file of 1 MB: smaller limits come from a wrong unit.
const MIN_SHARD_GB: f64 = 1e-3;

pub fn run(args: &QuantizeArgs) -> Result<Verdict, Failure> {
    let spec = args.spec()?;
    check_output(args)?;
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
    let windows = match spec.method {
        Method::Gptq => Some(calibrate(args, &model, &config, device)?),
        Method::Rtn => None,
    };
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
        max_shard_bytes: (args.max_shard_size * 1e9) as u64,
        device,
        resume: args.resume,
        tool: concat!("gptq-rs:", env!("CARGO_PKG_VERSION")).to_string(),
    };
    let record = watch(&job)?;
    report(args, &record)
}

/// Refuses an output that could not be published, before any work.
fn check_output(args: &QuantizeArgs) -> Result<(), Failure> {
    let occupied = match std::fs::read_dir(&args.out) {
        Ok(mut entries) => entries.next().is_some(),
        Err(_) => args.out.exists(),
    };
    if occupied {
        let text = format!("`{}` exists and is not an empty folder", args.out.display());
        return Err(Failure::with_hint(
            text,
            "name a folder that does not exist yet",
        ));
    }
    if args.max_shard_size.is_nan() || args.max_shard_size < MIN_SHARD_GB {
        let text = format!(
            "--max-shard-size {} is not {MIN_SHARD_GB} GB or more",
            args.max_shard_size
        );
        return Err(Failure::new(text));
    }
    Ok(())
}

fn calibrate(
    args: &QuantizeArgs,
    model: &Model,
    config: &DecoderConfig,
    device: Device,
) -> Result<Windows, Failure> {
    let source = Source::parse(&args.dataset)?;
    if args.seq_len > config.max_position_embeddings {
        eprintln!(
            "warning: windows of {} tokens exceed the model's {} positions",
            args.seq_len, config.max_position_embeddings
        );
    }
    let windows = if source.is_generated() {
        write_own(args, model, config, device)?
    } else {
        let tokenizer = Tokenizer::open(model.dir())?;
        tokenizer.check_vocabulary(config.vocab_size)?;
        let files = HubFiles::new(&args.hub);
        windows(&source, &window_spec(args), &tokenizer, &files)?
    };
    windows.check_vocabulary(config.vocab_size)?;
    Ok(windows)
}

fn window_spec(args: &QuantizeArgs) -> WindowSpec {
    WindowSpec {
        samples: args.samples,
        seq_len: args.seq_len,
        seed: args.seed,
    }
}

/// Windows that the model writes itself.
fn write_own(
    args: &QuantizeArgs,
    model: &Model,
    config: &DecoderConfig,
    device: Device,
) -> Result<Windows, Failure> {
    let spec = window_spec(args);
    spec.check()?;
    let cold = args.temperature.is_nan() || args.temperature <= 0.0;
    if args.seq_len < 2 || cold {
        let text = format!(
            "cannot sample {} windows of {} tokens at temperature {}",
            args.samples, args.seq_len, args.temperature
        );
        return Err(Failure::with_hint(
            text,
            "windows need 2 tokens and a temperature above 0",
        ));
    }
    let all = args.samples * args.seq_len;
    let mut steps = Steps::new("sampling tokens", 0, all);
    let ids = sample_windows(
        Arc::new(FloatWeights::new(model.checkpoint.clone())),
        config.clone(),
        device,
        SampleSpec {
            samples: args.samples,
            seq_len: args.seq_len,
            temperature: args.temperature,
            seed: args.seed,
        },
        &mut |done, _| steps.set(done),
    )?;
    steps.end();
    let rule = format!("sampled from the model at temperature {}", args.temperature);
    Ok(Windows::from_ids(ids, "self", &rule, args.seed))
}

/// Runs the job and shows how far it is.
fn watch(job: &Job) -> Result<RunRecord, Failure> {
    let mut steps: Option<Steps> = None;
    let record = quantize(job, &mut |progress| match progress {
        Progress::Begin { blocks, resumed } => {
            if resumed > 0 {
                eprintln!("{resumed} of {blocks} blocks are done already");
            }
            steps = Some(Steps::new("blocks", 0, blocks));
        }
        Progress::Layer { record } => {
            if let Some(steps) = &steps {
                steps.say(&record.layer.0);
            }
        }
        Progress::Block { done, .. } => {
            if let Some(steps) = &mut steps {
                steps.set(done);
            }
        }
        Progress::Published => {}
    })?;
    if let Some(steps) = steps {
        steps.end();
    }
    Ok(record)
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
