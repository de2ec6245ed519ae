//! Errors of all crates as one line and, apart from it, advice.

use gptq_calibration::CalibrationError;
use gptq_hub::HubError;
use gptq_inference::{
    EvaluationError, GenerateError, JournalError, OpenError, RunError, SamplingError, TemplateError,
};
use gptq_model::{ConfigError, ModelError};
use gptq_packer::{ReadError, SafetensorsError};
use gptq_pipeline::{PipelineError, PlanError};
use gptq_report::{CardError, ReportError};
use gptq_repository::RepositoryError;
use gptq_types::{SourceError, SpecError};

/// Ends the program with exit code 2.
#[derive(Debug)]
pub struct Failure {
    /// The cause: what failed, where, and the offending value.
    pub text: String,
    /// Advice to the user.
    pub hint: Option<String>,
}

impl Failure {
    /// Without advice.
    pub fn new(text: impl Into<String>) -> Self {
        Failure {
            text: text.into(),
            hint: None,
        }
    }

    /// With advice.
    pub fn with_hint(text: impl Into<String>, hint: impl Into<String>) -> Self {
        Failure {
            text: text.into(),
            hint: Some(hint.into()),
        }
    }
}

macro_rules! plain {
    ($($error:ty),*) => {$(
        impl From<$error> for Failure {
            fn from(error: $error) -> Self {
                Failure::new(error.to_string())
            }
        }
    )*};
}

macro_rules! hinted {
    ($($error:ty),*) => {$(
        impl From<$error> for Failure {
            fn from(error: $error) -> Self {
                Failure {
                    text: error.to_string(),
                    hint: error.hint().map(|hint| hint.to_string()),
                }
            }
        }
    )*};
}

plain!(
    SpecError,
    SourceError,
    ConfigError,
    ReadError,
    SafetensorsError,
    PlanError,
    CardError,
    SamplingError,
    TemplateError,
    serde_json::Error
);
hinted!(
    PipelineError,
    HubError,
    CalibrationError,
    EvaluationError,
    JournalError,
    ModelError,
    OpenError,
    ReportError,
    RepositoryError,
    RunError,
    GenerateError
);
#[cfg(feature = "cuda")]
hinted!(gptq_kernels::cuda::CudaError);
