//! Keys of `config.json` whose meaning nobody here knows: named once, or refused.

use gptq_model::ModelSpec;

use crate::args::StrictArgs;
use crate::failure::Failure;

/// Names the keys on stderr; with `--strict` they are an error.
pub fn heed(args: &StrictArgs, model: &str, spec: &ModelSpec) -> Result<(), Failure> {
    refuse(args, model, spec)?;
    if let Some(text) = told(model, spec) {
        eprintln!("warning: {text}");
    }
    Ok(())
}

/// With `--strict`, the error alone: who makes a run record has the warning there.
pub fn refuse(args: &StrictArgs, model: &str, spec: &ModelSpec) -> Result<(), Failure> {
    match told(model, spec).filter(|_| args.strict) {
        None => Ok(()),
        Some(text) => Err(Failure::with_hint(
            text,
            "leave out --strict if they do not change the model, or remove them from config.json",
        )),
    }
}

fn told(model: &str, spec: &ModelSpec) -> Option<String> {
    let keys = &spec.unread_keys;
    (!keys.is_empty()).then(|| {
        let keys = keys.join(", ");
        format!("{model}: config.json has keys that are not read, whatever they mean: {keys}")
    })
}
