//! Measures the throughput of prefill and decode.

use std::time::Instant;

use gptq_types::Speed;

use crate::{RunError, Runner};

/// Runs of each measurement; the fastest counts, since whatever else the machine does only slows.
const RUNS: usize = 3;

/// Prefills a prompt of `prompt_tokens` as one sequence, then decodes `new_tokens` for each of `batch`
/// sequences that hold it. The values of the tokens do not affect the time.
///
/// `device` is its name in the record.
pub fn measure_speed(
    runner: &mut dyn Runner,
    device: &str,
    prompt_tokens: usize,
    new_tokens: usize,
    batch: usize,
) -> Result<Speed, RunError> {
    let vocab = runner.spec().vocab_size;
    let (prompt_tokens, new_tokens, batch) =
        (prompt_tokens.max(1), new_tokens.max(1), batch.max(1));
    let capacity = prompt_tokens.saturating_add(new_tokens);
    // Before the prompt is made: this is where sizes that do not fit are refused.
    runner.reset(batch, capacity)?;
    let prompt: Vec<u32> = (0..prompt_tokens)
        .map(|at| (at * 7919 % vocab) as u32)
        .collect();
    let (mut prefill, mut decode) = (f64::INFINITY, f64::INFINITY);
    for _ in 0..RUNS {
        runner.reset(batch, capacity)?;
        for sequence in 0..batch {
            let start = Instant::now();
            runner.prefill(sequence, &prompt)?;
            prefill = prefill.min(start.elapsed().as_secs_f64());
        }
        let start = Instant::now();
        for step in 0..new_tokens {
            let token = (step * 104_729 % vocab) as u32;
            runner.step(&vec![token; batch])?;
        }
        decode = decode.min(start.elapsed().as_secs_f64());
    }
    Ok(Speed {
        device: device.to_string(),
        prompt_tokens: prompt.len(),
        prefill_tokens_per_second: prompt.len() as f64 / prefill,
        batch,
        decode_tokens_per_second: (new_tokens * batch) as f64 / decode,
        peak_memory: runner.peak_memory(),
    })
}
