//! Small files that go with the weights. They are read and built before any work, so that a missing one
//! is an error in the first seconds and not after the last block.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use gptq_model::ModelSpec;
use gptq_packer::{
    DeclaredType, StagedCheckpoint, config_json_with_quantization, exclusions, quantize_config_json,
};
use gptq_types::{Dtype, FileRecord, TensorSource, outside_name};
use serde_json::Map;

use crate::run::read_model;
use crate::{Job, PipelineError};

/// A tokenizer of 256 thousand entries has 35 MB.
const MAX_BYTES: u64 = 64 << 20;

/// Name and content of each.
pub struct SmallFiles(Vec<(String, Vec<u8>)>);

impl SmallFiles {
    /// Both configs, and what the job brings along.
    pub fn prepare(job: &Job, model: &ModelSpec) -> Result<Self, PipelineError> {
        let (meta, left_out) = (Map::new(), left_out(job, model));
        let declared = declared_type(job.source.as_ref(), model);
        let (text, spec, tool) = (&job.config_json, &job.spec, &job.tool);
        let config = config_json_with_quantization(text, spec, tool, &meta, &left_out, declared);
        let config = config.map_err(|source| PipelineError::QuantizationConfig {
            place: job.source.place(),
            source,
        })?;
        let mut files = vec![
            ("config.json".to_string(), config.into_bytes()),
            (
                "quantize_config.json".to_string(),
                settings_text(job, model).into_bytes(),
            ),
        ];
        for path in &job.companions {
            files.push(read(path)?);
        }
        Ok(SmallFiles(files))
    }

    /// Bytes of all of them.
    pub fn bytes(&self) -> u64 {
        self.0.iter().map(|(_, bytes)| bytes.len() as u64).sum()
    }

    /// Adds them to the checkpoint.
    pub fn add_to(&self, staged: &StagedCheckpoint) -> Result<(), PipelineError> {
        for (name, bytes) in &self.0 {
            staged.add_file(name, bytes)?;
        }
        Ok(())
    }

    /// Whether `files` lists each of them with the same content.
    pub fn are_among(&self, files: &std::collections::BTreeMap<String, FileRecord>) -> bool {
        (self.0.iter()).all(|(name, bytes)| files.get(name) == Some(&FileRecord::of(bytes)))
    }
}

/// Refuses configs that cannot be written and companion files that cannot be read, before any work.
pub fn check_beside(job: &Job) -> Result<(), PipelineError> {
    SmallFiles::prepare(job, &read_model(job)?).map(drop)
}

/// Patterns of the modules that stay in float.
fn left_out(job: &Job, model: &ModelSpec) -> Vec<String> {
    let linears = (0..model.blocks.len()).flat_map(|index| model.block_linears(index));
    let quantized: Vec<String> = linears.map(|linear| linear.name.0).collect();
    exclusions(job.source.as_ref(), &quantized)
}

/// The type that `config.json` declares, in which readers compute.
pub fn declared_type(source: &dyn TensorSource, model: &ModelSpec) -> DeclaredType {
    let embedding = source.info(&model.embedding.name).map(|info| info.dtype);
    match model.overflows_f16 && embedding == Some(Dtype::BF16) {
        true => DeclaredType::Bf16,
        false => DeclaredType::F16,
    }
}

/// The text of `quantize_config.json`.
pub fn settings_text(job: &Job, model: &ModelSpec) -> String {
    let left_out = left_out(job, model);
    quantize_config_json(
        &job.spec,
        &job.tool,
        &job.model_name,
        &Map::new(),
        &left_out,
    )
}

fn read(path: &Path) -> Result<(String, Vec<u8>), PipelineError> {
    let refused = |reason: String| PipelineError::Companion {
        path: path.to_path_buf(),
        reason,
    };
    let failed = |error: std::io::Error| refused(error.to_string());
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    outside_name::file_name(&name).map_err(|error| refused(error.to_string()))?;
    // Before it is opened: a pipe would wait for a writer.
    let found = std::fs::metadata(path).map_err(failed)?;
    if !found.is_file() {
        return Err(refused("it is not a file".to_string()));
    }
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(failed)?;
    (file.take(MAX_BYTES + 1).read_to_end(&mut bytes)).map_err(failed)?;
    match bytes.len() as u64 > MAX_BYTES {
        true => Err(refused(format!("it has more than {MAX_BYTES} bytes"))),
        false => Ok((name.into_owned(), bytes)),
    }
}
