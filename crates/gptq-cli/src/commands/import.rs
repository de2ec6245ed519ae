//! `gptq import`.

use gptq_hub::import_gguf;

use crate::Verdict;
use crate::args::ImportArgs;
use crate::failure::Failure;
use crate::progress::Steps;

pub fn run(args: &ImportArgs) -> Result<Verdict, Failure> {
    let mut steps: Option<Steps> = None;
    let report = import_gguf(&args.file, &args.out, &mut |name, done, all| {
        let steps = steps.get_or_insert_with(|| Steps::new("bytes", 0, all as usize));
        steps.say(name);
        steps.set(done as usize);
    })?;
    if let Some(steps) = steps {
        steps.end();
    }
    let types: Vec<String> = (report.source_types.iter())
        .map(|(kind, count)| format!("{count} {kind}"))
        .collect();
    eprintln!(
        "{}: {} tensors ({}), {} parameters, {} bytes",
        report.architecture,
        report.tensors,
        types.join(", "),
        report.parameters,
        report.weight_bytes
    );
    for (kind, narrowing) in report.narrowed.iter().filter(|(_, n)| n.changed > 0) {
        eprintln!(
            "warning: {} of {} {kind} values change when rounded to {}; {} of them become 0",
            narrowing.changed,
            narrowing.values,
            report.dtype.name(),
            narrowing.zeroed
        );
    }
    for note in &report.notes {
        eprintln!("note: {note}");
    }
    eprintln!("wrote {}", report.folder.display());
    Ok(Verdict::Yes)
}
