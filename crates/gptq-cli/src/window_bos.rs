//! Whether windows begin with the beginning-of-sequence token, and with which.

use std::sync::Once;

use gptq_calibration::Source;
use gptq_model::ModelSpec;

use crate::failure::Failure;
use crate::models::Model;

/// What windows of `source` begin with. `choice` is what was asked for; without one, the model's family
/// says whether it needs BOS. Stored windows are taken as they are.
///
/// Fails where BOS was asked for and nobody names one. Where the family needs it alone, that is a
/// warning, told once: all texts of a run lack it then.
pub fn window_bos(
    choice: Option<bool>,
    source: &Source,
    model: &Model,
    spec: &ModelSpec,
) -> Result<Option<u32>, Failure> {
    static STORED: Once = Once::new();
    static UNKNOWN: Once = Once::new();
    if source.is_stored() {
        if choice == Some(true) {
            STORED.call_once(|| {
                eprintln!(
                    "warning: --window-bos has no effect on stored windows: they are taken as they are"
                );
            });
        }
        return Ok(None);
    }
    if !choice.unwrap_or(spec.begins_with_bos) {
        return Ok(None);
    }
    let found = gptq_calibration::window_bos(model.tokenizer_dir(), model.dir())?;
    match found {
        Some(bos) if bos as usize >= spec.vocab_size => Err(Failure::with_hint(
            format!(
                "BOS is token {bos}, but the model's vocabulary ends before {}",
                spec.vocab_size
            ),
            "--no-window-bos leaves windows without one",
        )),
        Some(bos) => Ok(Some(bos)),
        None if choice == Some(true) => Err(Failure::with_hint(
            "--window-bos: neither the tokenizer nor config.json names a beginning-of-sequence token",
            "`bos_token` in tokenizer_config.json or `bos_token_id` in config.json names it",
        )),
        None => {
            UNKNOWN.call_once(|| {
                eprintln!(
                    "warning: this model computes nonsense on windows without BOS at their start, and \
                     neither the tokenizer nor config.json names one"
                );
            });
            Ok(None)
        }
    }
}

/// What a record says of it: nothing where windows are as those of any model.
pub fn recorded(choice: Option<bool>, bos: Option<u32>, spec: &ModelSpec) -> Option<bool> {
    let is_refused = choice == Some(false) && spec.begins_with_bos;
    match bos {
        Some(_) => Some(true),
        None => is_refused.then_some(false),
    }
}
