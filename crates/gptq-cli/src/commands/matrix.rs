//! `gptq matrix`.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;
use std::thread;

use gptq_calibration::{EvaluationWindows, Windows};
use gptq_model::{Device, DeviceContext, ModelSpec};
use gptq_pipeline::{
    Preset, check_permutations, check_unquantized, check_weights, plan_matrix, read_plan,
};
use gptq_repository::{Repository, check_branch_names, check_signature};
use gptq_types::{
    CalibrationRequest, ColumnOrder, Effort, Method, Permutation, PlannedBranch, TensorSource,
};

use crate::Verdict;
use crate::args::{MatrixArgs, PresetArg, shard_bytes};
use crate::calibrate::{calibrate, check_request};
use crate::datasets::public_name;
use crate::device;
use crate::failure::Failure;
use crate::forecast::forecast_branches;
use crate::matrix::{
    Evaluation, Shared, State, card_info, make_all, make_together, read_branches, read_text,
    render, tidy,
};
use crate::models::{Model, find, public_folder_name};
use crate::output::{print, print_json};
use crate::scoring::ScoringText;
use crate::unread_keys;
use crate::watch::TOOL;

/// Temperature of a model's own text; `quantize` has a flag for it.
const TEMPERATURE: f32 = 1.0;
const CARD_FILE: &str = "README.md";

pub fn run(args: &MatrixArgs) -> Result<Verdict, Failure> {
    let max_shard_bytes = shard_bytes(&args.max_shard_size)?;
    let asked = permutations(args)?;
    let model = find(&args.model, &args.hub)?
        .with_tokenizer(args.tokenizer.folder.as_deref())
        .with_rebuilt_tokenizer()?;
    let config = ModelSpec::read(&model.config_json, &model.checkpoint.names())
        .map_err(|error| Failure::new(format!("{}: {error}", model.dir().display())))?;
    unread_keys::heed(&args.strict, &args.model, &config)?;
    check_unquantized(model.checkpoint.as_ref(), &model.config_json)?;
    let companions = model.companions();
    let source = model.checkpoint.as_ref();
    let mut planned = plan_matrix(source, &config, asked, max_shard_bytes)?;
    if args.shared_hessian {
        check_shared(&planned)?;
    }
    if args.dry_run {
        let all: Vec<&PlannedBranch> = planned.iter().collect();
        check_texts(args, &all, &model, &config)?;
        let device = DeviceContext::open(devices(args)?[0])?;
        if !args.shared_hessian {
            forecast_branches(&mut planned, &config, &device::machine(&device)?);
        }
        return dry_run(args, &planned);
    }
    let planned = possible(planned, args.skip_impossible)?;
    let wanted = selected(&planned, &args.only)?;
    if !args.assemble {
        check_texts(args, &wanted, &model, &config)?;
    }
    let path = (args.out.as_deref()).ok_or_else(|| Failure::new("--out is missing"))?;
    let info = card_info(args.card.as_deref(), model.dir(), &args.model)?;
    let model_name = info.base_model.clone().unwrap_or(info.model_name.clone());
    let mut state = State {
        model: model_name.clone(),
        weights_sha256: None,
        files: State::hash_files(&model)?,
        tool: TOOL.to_string(),
        model_type: model_type(&model.config_json),
        branches: planned
            .iter()
            .map(|branch| branch.permutation.clone())
            .collect(),
        evaluation: evaluation(args),
        shared_hessian: args.shared_hessian,
        card: info,
    };
    let head = planned
        .first()
        .map_or("main", |branch| &branch.permutation.branch);
    state.refuse_other(path)?;
    check_signature()?;
    let repository = Repository::open_or_create(path, head)?;
    let there = repository.branches()?;
    let all: BTreeSet<&str> = (there.iter().map(String::as_str))
        .chain(state.branches.iter().map(|b| b.branch.as_str()))
        .collect();
    check_branch_names(all)?;

    tidy(&wanted, &repository)?;
    let missing: Vec<&PlannedBranch> = match args.assemble {
        true => Vec::new(),
        false => (wanted.into_iter())
            .filter(|branch| !repository.has(&branch.permutation.branch))
            .collect(),
    };
    let failed = match missing.is_empty() {
        true => {
            // No branch is missing, but a matrix still belongs to a single model.
            if !args.assemble {
                state.weights_sha256 = Some(check_weights(source)?.identity);
            }
            state.keep(path)?;
            0
        }
        false => {
            // Reading all weights once takes seconds; so does what else must be there first.
            let devices = devices(args)?;
            let missing = forecast_missing(args, &missing, &config, devices[0])?;
            let missing: Vec<&PlannedBranch> = missing.iter().collect();
            let (checked, _open, prepared) = thread::scope(|scope| {
                let check = scope.spawn(|| check_weights(source));
                let open = scope.spawn(|| device::open_all(&devices));
                let prepared = prepare(args, &missing, &model, &config, devices[0]);
                (check.join(), open.join(), prepared)
            });
            let (text, windows) = prepared?;
            let checked = checked
                .map_err(|_| Failure::new("the check of the weights ended in a panic"))??;
            state.weights_sha256 = Some(checked.identity.clone());
            state.keep(path)?;
            let shared = Shared {
                windows,
                model: &model,
                checked,
                model_name: &model_name,
                tokenizer: (args.tokenizer.folder.as_deref()).map(public_folder_name),
                text,
                max_shard_bytes,
                companions,
                repository: path,
                side_by_side: devices.len() > 1,
            };
            match args.shared_hessian {
                true => make_together(&missing, &shared, &devices)?,
                false => make_all(&missing, Vec::new(), &shared, &devices)?,
            }
        }
    };
    if !args.only.is_empty() {
        return Ok(verdict(failed));
    }
    assemble(args, &repository, &state)?;
    let absent = (state.branches.iter())
        .filter(|b| !repository.has(&b.branch))
        .count();
    if absent > 0 {
        eprintln!("{absent} of {} branches are absent", state.branches.len());
    }
    Ok(verdict(absent))
}

/// The branches with what each will take. One that does not fit fails when its turn comes, as any other; another
/// GPU may be larger. One pass for all of them is not forecast.
fn forecast_missing(
    args: &MatrixArgs,
    missing: &[&PlannedBranch],
    model: &ModelSpec,
    device: Device,
) -> Result<Vec<PlannedBranch>, Failure> {
    let mut missing: Vec<PlannedBranch> = missing.iter().map(|&branch| branch.clone()).collect();
    if args.shared_hessian {
        return Ok(missing);
    }
    let machine = device::machine(&DeviceContext::open(device)?)?;
    forecast_branches(&mut missing, model, &machine);
    for branch in &mut missing {
        if let Some(reason) = branch.refusal.take() {
            eprintln!("warning: branch `{}`: {reason}", branch.permutation.branch);
        }
    }
    Ok(missing)
}

/// Refuses at once, before a repository is made, what would fail when texts are read.
fn check_texts(
    args: &MatrixArgs,
    branches: &[&PlannedBranch],
    model: &Model,
    config: &ModelSpec,
) -> Result<(), Failure> {
    if let Some(text) = scoring_text(args) {
        text.check(model, config)?;
    }
    let mut checked: Vec<&CalibrationRequest> = Vec::new();
    for branch in branches {
        let permutation = &branch.permutation;
        let request = &permutation.calibration;
        let is_read = permutation.spec.method != Method::Rtn && branch.refusal.is_none();
        if is_read && !checked.contains(&request) {
            check_request(request, model, config)?;
            checked.push(request);
        }
    }
    Ok(())
}

/// The text that branches are scored on.
fn scoring_text(args: &MatrixArgs) -> Option<ScoringText> {
    evaluation(args).map(|text| ScoringText {
        dataset: text.dataset,
        column: None,
        seq_len: text.seq_len,
        max_windows: text.max_windows,
        window_bos: text.window_bos,
    })
}

type Prepared = (Option<EvaluationWindows>, HashMap<String, Windows>);

/// The text to score on, and the calibration windows.
fn prepare(
    args: &MatrixArgs,
    missing: &[&PlannedBranch],
    model: &Model,
    config: &ModelSpec,
    device: Device,
) -> Result<Prepared, Failure> {
    let text = scoring_text(args).map(|text| text.read(model, config, &args.hub));
    let mut text = text.transpose()?;
    if let Some(text) = &mut text {
        text.protocol = text
            .protocol
            .replace(&args.evaluate, &public_name(&args.evaluate));
    }
    let windows = windows(args, missing, model, config, device)?;
    Ok((text, windows))
}

fn verdict(failed: usize) -> Verdict {
    match failed {
        0 => Verdict::Yes,
        _ => Verdict::No,
    }
}

/// The requested permutations: a preset or a plan, whose calibration settings are overridden by flags.
fn permutations(args: &MatrixArgs) -> Result<Vec<Permutation>, Failure> {
    let mut permutations = match (&args.plan, args.preset) {
        (Some(path), _) => {
            // A shared Hessian is that of the float model: there is no second stream to aim by.
            let effort = match args.shared_hessian {
                true => Effort::Fast,
                false => Effort::default(),
            };
            read_plan(&read_text(path)?, args.seq_len, effort)
                .map_err(|error| Failure::new(format!("`{}`: {error}", path.display())))?
        }
        (None, Some(PresetArg::LongContext)) => Preset::LongContext.permutations(),
        (None, _) => Preset::Llama2.permutations(),
    };
    for CalibrationRequest {
        dataset,
        column,
        samples,
        seq_len,
        seed,
        window_bos,
    } in permutations
        .iter_mut()
        .map(|permutation| &mut permutation.calibration)
    {
        if let Some(given) = &args.dataset {
            dataset.clone_from(given);
            column.clone_from(&args.column); // the plan's is of the plan's data
        }
        if args.column.is_some() {
            column.clone_from(&args.column);
        }
        *samples = args.samples.unwrap_or(*samples);
        *seq_len = args.seq_len.unwrap_or(*seq_len);
        *seed = args.seed.unwrap_or(*seed);
        *window_bos = args.window_bos.choice().or(*window_bos);
    }
    check_permutations(&permutations)?;
    check_branch_names(permutations.iter().map(|p| p.branch.as_str()))?;
    Ok(permutations)
}

/// Branches that share a Hessian have no quantized stream, whose inputs could differ from the float ones.
fn check_shared(planned: &[PlannedBranch]) -> Result<(), Failure> {
    let open = |branch: &&PlannedBranch| branch.permutation.spec.order == ColumnOrder::Auto;
    if let Some(branch) = planned.iter().find(open) {
        return Err(Failure::with_hint(
            format!(
                "--shared-hessian: branch `{}` has order auto, which holds tokens out of its Hessian",
                branch.permutation.branch
            ),
            "leave out --shared-hessian, or give the branch another order",
        ));
    }
    let aimed = |branch: &&PlannedBranch| branch.permutation.spec.input_mismatch != 0.0;
    match planned.iter().find(aimed) {
        None => Ok(()),
        Some(branch) => Err(Failure::with_hint(
            format!(
                "--shared-hessian: branch `{}` has an input mismatch of {}, and no inputs are quantized here",
                branch.permutation.branch, branch.permutation.spec.input_mismatch
            ),
            "leave out --shared-hessian, or give the branch effort = \"fast\"",
        )),
    }
}

fn dry_run(args: &MatrixArgs, planned: &[PlannedBranch]) -> Result<Verdict, Failure> {
    match args.json {
        true => print_json(&planned)?,
        false => print(&gptq_report::matrix_table(planned))?,
    }
    let impossible = planned.iter().filter(|branch| branch.refusal.is_some());
    Ok(verdict(match args.skip_impossible {
        true => 0,
        false => impossible.count(),
    }))
}

/// The branches that can be made; all of them, or those that are left.
fn possible(planned: Vec<PlannedBranch>, skip: bool) -> Result<Vec<PlannedBranch>, Failure> {
    let (can, cannot): (Vec<_>, Vec<_>) =
        (planned.into_iter()).partition(|branch| branch.refusal.is_none());
    let reasons: Vec<String> = (cannot.iter())
        .map(|branch| {
            let reason = branch.refusal.as_deref().unwrap_or_default();
            format!("branch `{}`: {reason}", branch.permutation.branch)
        })
        .collect();
    if !reasons.is_empty() && (!skip || can.is_empty()) {
        return Err(Failure::with_hint(
            reasons.join("; "),
            "--skip-impossible makes the others; --dataset, --samples and --seq-len change a preset",
        ));
    }
    for reason in reasons {
        eprintln!("warning: left out: {reason}");
    }
    Ok(can)
}

fn selected<'a>(
    planned: &'a [PlannedBranch],
    only: &[String],
) -> Result<Vec<&'a PlannedBranch>, Failure> {
    for name in only {
        if planned
            .iter()
            .all(|branch| branch.permutation.branch != *name)
        {
            return Err(Failure::new(format!(
                "--only {name}: no such branch in the matrix"
            )));
        }
    }
    let wanted =
        |branch: &&PlannedBranch| only.is_empty() || only.contains(&branch.permutation.branch);
    Ok(planned.iter().filter(wanted).collect())
}

fn evaluation(args: &MatrixArgs) -> Option<Evaluation> {
    (args.evaluate != "none").then(|| Evaluation {
        dataset: args.evaluate.clone(),
        seq_len: args.eval_seq_len,
        max_windows: args.eval_windows,
        window_bos: args.window_bos.choice(),
    })
}

fn model_type(config_json: &str) -> String {
    let config: serde_json::Value = serde_json::from_str(config_json).unwrap_or_default();
    config["model_type"]
        .as_str()
        .unwrap_or_default()
        .to_string()
}

fn devices(args: &MatrixArgs) -> Result<Vec<Device>, Failure> {
    (args.device.iter())
        .map(|&device| device::pick(device, args.gpu_memory))
        .collect()
}

/// The tokens of all branches; those with the same request share them.
fn windows(
    args: &MatrixArgs,
    missing: &[&PlannedBranch],
    model: &Model,
    config: &ModelSpec,
    device: Device,
) -> Result<HashMap<String, Windows>, Failure> {
    let mut found = HashMap::new();
    for branch in missing {
        let permutation = &branch.permutation;
        let key = Shared::key(permutation);
        if permutation.spec.method == Method::Rtn || found.contains_key(&key) {
            continue;
        }
        let request = &permutation.calibration;
        let mut windows = calibrate(request, TEMPERATURE, model, config, device, &args.hub)?;
        windows.record.dataset = public_name(&windows.record.dataset);
        found.insert(key, windows);
    }
    Ok(found)
}

/// Writes the same card to every existing branch, with a commit where it changed.
fn assemble(args: &MatrixArgs, repository: &Repository, state: &State) -> Result<(), Failure> {
    let wanted: Vec<String> = state.branches.iter().map(|b| b.branch.clone()).collect();
    let branches = read_branches(repository, &wanted)?;
    if branches.is_empty() {
        return Ok(());
    }
    let template: Option<&Path> = args.template.as_deref();
    let card = render(&state.card, &state.model_type, &branches, template)?;
    for branch in &branches {
        let name = &branch.record.permutation.branch;
        repository.replace(name, CARD_FILE, card.as_bytes(), "Model card")?;
    }
    eprintln!(
        "{} branches in `{}`",
        branches.len(),
        repository.path().display()
    );
    if args.json {
        print_json(&branches)?;
    }
    Ok(())
}
