//! Calibration windows of a request.

use std::sync::Arc;

use gptq_calibration::{
    EvaluationWindows, Means, Source, Tokenizer, WindowSpec, Windows, windows_and_held_out,
};
use gptq_inference::{SampleSpec, sample_windows};
use gptq_model::{Device, DeviceContext, FloatWeights, ModelSpec};
use gptq_types::CalibrationRequest;

use crate::args::HubArgs;
use crate::datasets::{HubFiles, ModelTemplate, local_copy};
use crate::failure::Failure;
use crate::models::Model;
use crate::progress::Steps;
use crate::window_bos::{recorded, window_bos};

/// Refuses what is known to fail before a text is read: a text that nobody knows, windows that cannot begin
/// as they were asked to.
pub fn check_request(
    request: &CalibrationRequest,
    model: &Model,
    spec: &ModelSpec,
) -> Result<(), Failure> {
    let source = Source::parse(&request.dataset)?.with_column(request.column.clone())?;
    window_bos(request.window_bos, &source, model, spec).map(drop)
}

/// Reads or draws the windows; `temperature` and `device` are for text of the model's own.
pub fn calibrate(
    request: &CalibrationRequest,
    temperature: f32,
    model: &Model,
    spec: &ModelSpec,
    device: Device,
    hub: &HubArgs,
) -> Result<Windows, Failure> {
    let found = calibrate_and_hold_out(request, 0, temperature, model, spec, device, hub);
    found.map(|(windows, _)| windows)
}

/// Reads or draws the calibration windows, and holds out `held_out` further windows of the text; `None` for
/// 0. Text that the model generates has none to hold out.
pub fn calibrate_and_hold_out(
    request: &CalibrationRequest,
    held_out: usize,
    temperature: f32,
    model: &Model,
    spec: &ModelSpec,
    device: Device,
    hub: &HubArgs,
) -> Result<(Windows, Option<EvaluationWindows>), Failure> {
    let source = Source::parse(&request.dataset)?.with_column(request.column.clone())?;
    if request.seq_len > spec.max_position_embeddings {
        eprintln!(
            "warning: windows of {} tokens exceed the model's {} positions",
            request.seq_len, spec.max_position_embeddings
        );
    }
    if source.is_generated() && held_out > 0 {
        return Err(Failure::with_hint(
            format!(
                "`self` holds no text beside the windows of calibration, and {held_out} are to be held out"
            ),
            "leave out --check-windows; --check-dataset TEXT compares on a text of its own",
        ));
    }
    let bos = window_bos(request.window_bos, &source, model, spec)?;
    let (mut windows, beside) = if source.is_generated() {
        let own = write_own(request, temperature, bos, model, spec, device)?;
        (own, None)
    } else {
        let tokenizer = Tokenizer::open(model.tokenizer_dir())?;
        tokenizer.check_vocabulary(spec.vocab_size)?;
        let means = Means {
            tokenizer: &tokenizer,
            files: &HubFiles::new(hub),
            chat: &ModelTemplate::of(model),
            bos,
        };
        windows_and_held_out(&source, &window_spec(request), held_out, &means)?
    };
    windows.check_vocabulary(spec.vocab_size)?;
    if let Some(beside) = &beside {
        beside.check_vocabulary(spec.vocab_size)?;
    }
    windows.record.widest_input = widest_input(spec);
    windows.record.window_bos = recorded(request.window_bos, bos, spec);
    windows.record.column.clone_from(&request.column);
    windows.record.file = local_copy(&source);
    let is_warm = source.is_generated() && temperature != 1.0;
    windows.record.temperature = is_warm.then_some(temperature);
    if let Some(doubt) = windows.record.doubt() {
        eprintln!("warning: {doubt}");
    }
    Ok((windows, beside))
}

fn widest_input(spec: &ModelSpec) -> Option<usize> {
    let linears = (0..spec.blocks.len()).flat_map(|index| spec.block_linears(index));
    linears.map(|linear| linear.in_features).max()
}

fn window_spec(request: &CalibrationRequest) -> WindowSpec {
    WindowSpec {
        samples: request.samples,
        seq_len: request.seq_len,
        seed: request.seed,
    }
}

/// Windows that the model writes itself.
fn write_own(
    request: &CalibrationRequest,
    temperature: f32,
    bos: Option<u32>,
    model: &Model,
    spec: &ModelSpec,
    device: Device,
) -> Result<Windows, Failure> {
    window_spec(request).check()?;
    let cold = temperature.is_nan() || temperature <= 0.0;
    if request.seq_len < 2 || cold {
        let text = format!(
            "cannot sample {} windows of {} tokens at temperature {temperature}",
            request.samples, request.seq_len
        );
        return Err(Failure::with_hint(
            text,
            "windows need 2 tokens and a temperature above 0",
        ));
    }
    let all = request.samples * request.seq_len;
    let mut steps = Steps::new("sampling tokens", 0, all);
    let mut ids = sample_windows(
        Arc::new(FloatWeights::new(model.checkpoint.clone())),
        spec.clone(),
        &DeviceContext::open(device)?,
        SampleSpec {
            samples: request.samples,
            seq_len: request.seq_len,
            temperature,
            seed: request.seed,
            bos,
        },
        &mut |done, _| steps.set(done),
    )?;
    steps.end();
    let rule = format!("sampled from the model at temperature {temperature}");
    for window in ids.iter_mut().filter(|_| bos.is_some()) {
        window.remove(0); // what is counted is the text
    }
    let own = Windows::from_ids(ids, "self", &rule, request.seed);
    Ok(own.behind_bos(bos))
}
