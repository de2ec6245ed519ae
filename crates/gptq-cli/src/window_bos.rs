//! The beginning-of-sequence token of windows, if they have one.

use std::sync::Once;

use gptq_calibration::Source;
use gptq_model::ModelSpec;

use crate::failure::Failure;
use crate::models::Model;

/// The token that windows of `source` begin with, if any. `choice` is the user's; without one, the model's
/// family decides. Stored windows are taken as they are.
///
/// Fails if BOS was requested and no file names the token. If only the family needs it, a warning is
/// printed once, since all texts of a run lack it then.
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

/// The value for a record: `None` where windows have no BOS and the model needs none.
pub fn recorded(choice: Option<bool>, bos: Option<u32>, spec: &ModelSpec) -> Option<bool> {
    let is_refused = choice == Some(false) && spec.begins_with_bos;
    match bos {
        Some(_) => Some(true),
        None => is_refused.then_some(false),
    }
}
