//! Speed of a checkpoint, for `eval --speed`.

use gptq_inference::measure_speed;
use gptq_model::DeviceContext;
use gptq_types::Speed;

use crate::args::SpeedArgs;
use crate::device::describe;
use crate::failure::Failure;
use crate::models::Model;

/// Reads a prompt and writes on, with all blocks resident.
pub fn measure(model: &Model, device: &DeviceContext, args: &SpeedArgs) -> Result<Speed, Failure> {
    let opened = model.open()?;
    let context = opened.spec.max_position_embeddings;
    let new_tokens = args.speed_tokens.get().min((context / 4).max(1));
    let prompt_tokens = args.speed_prompt.get();
    let prompt_tokens = prompt_tokens.min(context.saturating_sub(new_tokens)).max(1);
    let batch = args.speed_batch.get();
    let mut runner = opened.runner(device)?;
    let device = describe(device.whole().device());
    let speed = measure_speed(runner.as_mut(), &device, prompt_tokens, new_tokens, batch)?;
    eprintln!(
        "{}: {:.0} tokens/s of a prompt of {prompt_tokens}, {:.1} new tokens/s of {batch} side by side, {:.2} GB",
        model.dir().display(),
        speed.prefill_tokens_per_second,
        speed.decode_tokens_per_second,
        speed.peak_memory as f64 / 1e9
    );
    Ok(speed)
}
