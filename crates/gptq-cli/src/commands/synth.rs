//! `gptq synth`.

use gptq_hub::{SynthSpec, SynthWindows, synth};

use crate::Verdict;
use crate::args::SynthArgs;
use crate::failure::Failure;
use crate::progress::Steps;

pub fn run(args: &SynthArgs) -> Result<Verdict, Failure> {
    let spec = SynthSpec {
        shape: args.shape.clone(),
        layers: args.layers,
        seed: args.seed,
        dtype: args.dtype.resolve(),
        windows: args.calibration.clone().map(|path| SynthWindows {
            path,
            samples: args.samples,
            seq_len: args.seq_len,
        }),
    };
    let mut steps: Option<Steps> = None;
    let report = synth(&spec, &args.out, &mut |done, all| {
        let steps = steps.get_or_insert_with(|| Steps::new("bytes", 0, all as usize));
        steps.set(done as usize);
    })?;
    if let Some(steps) = steps {
        steps.end();
    }
    eprintln!(
        "{}: {} tensors, {} parameters, {} bytes",
        spec.shape.name, report.tensors, report.parameters, report.weight_bytes
    );
    if let Some(windows) = &spec.windows {
        eprintln!(
            "wrote {}: {} windows of {} tokens",
            windows.path.display(),
            windows.samples,
            windows.seq_len
        );
    }
    eprintln!("wrote {}", report.folder.display());
    Ok(Verdict::Yes)
}
