//! A quantization run and how far it is.

use gptq_pipeline::{
    Compare, Job, PipelineError, Progress, quantize_and_compare, quantize_together,
};
use gptq_types::{Forecast, RunRecord};

use crate::failure::Failure;
use crate::forecast::words;
use crate::progress::Steps;

/// Name and version, as records and configs have it.
pub const TOOL: &str = concat!("gptq-rs:", env!("CARGO_PKG_VERSION"));

/// How a run is shown.
#[derive(Clone, Copy)]
pub struct View<'a> {
    /// The branch, where there are several.
    pub branch: Option<&'a str>,
    /// Lines instead of a bar, for concurrent jobs.
    pub plain: bool,
    /// Told before the first block.
    pub forecast: Option<&'a Forecast>,
}

impl View<'_> {
    /// Of the only run, of which nothing is forecast.
    pub const ALONE: Self = View {
        branch: None,
        plain: false,
        forecast: None,
    };
}

/// Runs the job.
pub fn watch(job: &Job, view: View<'_>) -> Result<RunRecord, Failure> {
    try_watch(job, None, view).map_err(|error| Failure::from(*error))
}

/// Like [`watch`], with an optional comparison at the end; returns the error for callers that match on it.
pub fn try_watch(
    job: &Job,
    compare: Option<&mut Compare<'_>>,
    view: View<'_>,
) -> Result<RunRecord, Box<PipelineError>> {
    let of = view
        .branch
        .map_or(String::new(), |branch| format!("{branch}: "));
    let (what, forecast) = (format!("{of}blocks"), format!("{of}forecast"));
    let mut shown = Shown {
        forecast: view.forecast.map(|found| (forecast.as_str(), found)),
        ..Shown::new(&what, view.plain)
    };
    let record = quantize_and_compare(job, compare, &mut |progress| shown.hear(progress))?;
    shown.end();
    Ok(record)
}

/// Runs several jobs in one pass.
pub fn watch_together(jobs: &[Job], what: &str) -> Result<Vec<RunRecord>, Failure> {
    let mut shown = Shown::new(what, false);
    let records = quantize_together(jobs, &mut |progress| shown.hear(progress))?;
    shown.end();
    Ok(records)
}

struct Shown<'a> {
    what: &'a str,
    plain: bool,
    /// Under its name.
    forecast: Option<(&'a str, &'a Forecast)>,
    steps: Option<Steps>,
}

impl<'a> Shown<'a> {
    fn new(what: &'a str, plain: bool) -> Self {
        Shown {
            what,
            plain,
            forecast: None,
            steps: None,
        }
    }

    fn hear(&mut self, progress: Progress<'_>) {
        match progress {
            Progress::Begin { blocks, resumed } => {
                if resumed > 0 {
                    eprintln!("{resumed} of {blocks} blocks are done already");
                }
                if let Some((name, forecast)) = self.forecast.filter(|_| resumed < blocks) {
                    let left = (blocks - resumed) as f64 / blocks as f64;
                    eprintln!("{name}: {}", words(forecast, left));
                }
                self.steps = Some(Steps::beside(self.what, blocks, self.plain));
            }
            Progress::Layer { record } => {
                if let Some(steps) = &self.steps {
                    steps.say(&record.layer.0);
                }
            }
            Progress::Epoch { done, epochs } => {
                if let Some(steps) = &self.steps {
                    steps.say(&format!("training, epoch {done} of {epochs}"));
                }
            }
            Progress::Block { done, .. } => {
                if let Some(steps) = &mut self.steps {
                    steps.set(done);
                }
            }
            Progress::AlreadyDone => eprintln!(
                "done before: the folder holds the result of this run, every file as it was written"
            ),
            Progress::NothingToResume => {
                eprintln!("there is no interrupted run to go on with: one begins");
            }
            Progress::Warning(text) => eprintln!("warning: {text}"),
            // The comparison has its own bar.
            Progress::Comparing => self.steps.take().into_iter().for_each(Steps::end),
            Progress::Published => {}
        }
    }

    fn end(self) {
        if let Some(steps) = self.steps {
            steps.end();
        }
    }
}
