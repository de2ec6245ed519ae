//! How fast a checkpoint runs, for `eval --speed`.

use gptq_inference::measure_speed;
use gptq_model::Device;
use gptq_types::Speed;

use crate::device::describe;
use crate::failure::Failure;
use crate::models::Model;

/// Tokens of the prompt, where the model takes so many.
const PROMPT_TOKENS: usize = 512;
/// Tokens that are written after it.
const NEW_TOKENS: usize = 64;

/// Reads a prompt and writes on, one sequence, with all blocks resident.
pub fn measure(model: &Model, device: Device) -> Result<Speed, Failure> {
    let opened = model.open()?;
    let context = (opened.config.sliding_window)
        .unwrap_or(usize::MAX)
        .min(opened.config.max_position_embeddings);
    let new_tokens = NEW_TOKENS.min(context / 4).max(1);
    let prompt_tokens = PROMPT_TOKENS.min(context.saturating_sub(new_tokens)).max(1);
    let mut runner = opened.runner(device)?;
    let device = describe(device);
    let speed = measure_speed(runner.as_mut(), &device, prompt_tokens, new_tokens, 1)?;
    eprintln!(
        "{}: {:.0} tokens/s of a prompt of {prompt_tokens}, {:.1} new tokens/s, {:.2} GB",
        model.dir().display(),
        speed.prefill_tokens_per_second,
        speed.decode_tokens_per_second,
        speed.peak_memory as f64 / 1e9
    );
    Ok(speed)
}
