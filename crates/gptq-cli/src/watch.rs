//! A quantization run and how far it is.

use gptq_pipeline::{Job, Progress, quantize};
use gptq_types::RunRecord;

use crate::failure::Failure;
use crate::progress::Steps;

/// Name and version, as records and configs have it.
pub const TOOL: &str = concat!("gptq-rs:", env!("CARGO_PKG_VERSION"));

/// Runs the job under the name `what`; with `plain`, beside others, in lines instead of a bar.
pub fn watch(job: &Job, what: &str, plain: bool) -> Result<RunRecord, Failure> {
    let mut steps: Option<Steps> = None;
    let record = quantize(job, &mut |progress| match progress {
        Progress::Begin { blocks, resumed } => {
            if resumed > 0 {
                eprintln!("{resumed} of {blocks} blocks are done already");
            }
            steps = Some(Steps::beside(what, blocks, plain));
        }
        Progress::Layer { record } => {
            if let Some(steps) = &steps {
                steps.say(&record.layer.0);
            }
        }
        Progress::Block { done, .. } => {
            if let Some(steps) = &mut steps {
                steps.set(done);
            }
        }
        Progress::Published => {}
    })?;
    if let Some(steps) = steps {
        steps.end();
    }
    Ok(record)
}
