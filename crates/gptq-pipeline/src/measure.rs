//! Measures the output error of each linear from the files of a finished checkpoint.
//!
//! The loss in a run record is the solver's own, of codes in memory. Here the codes come from the files,
//! and their inputs from a forward pass through the files' weights, which are the inputs that the solver
//! saw. A file that holds the solver's codes therefore reproduces its loss, and a wrongly packed one does
//! not. The cost is a forward pass and the Hessians, without a factorization.

use std::sync::Arc;

use gptq_model::{DeviceContext, FloatWeights, ModelSpec, Streams, Weight};
use gptq_packer::{QuantizeConfig, read_layer};
use gptq_quantizer::{Hessian, HessianSum, output_error};
use gptq_types::{LayerName, LayerRecord, LossMeasure, QuantSpec, SolvedLayer, TensorSource};

use crate::PipelineError;
use crate::fold::Folded;

/// A packed checkpoint, the float model that it was made from, and tokens.
pub struct FilesToMeasure<'a> {
    /// The float checkpoint.
    pub source: Arc<dyn TensorSource>,
    /// Text of its `config.json`.
    pub config_json: &'a str,
    /// The packed one.
    pub packed: &'a dyn TensorSource,
    /// The packing of the files.
    pub settings: &'a QuantizeConfig,
    /// The calibration windows.
    pub windows: &'a [Vec<u32>],
    /// The reference of the errors: as in the record that they are compared with.
    pub measure: LossMeasure,
    /// The settings that the files were made with.
    pub spec: &'a QuantSpec,
    /// The record's layers, with the permutations of channels in the files.
    pub layers: &'a [LayerRecord],
}

/// One linear as the files have it.
#[derive(Clone, Copy, Debug)]
pub struct MeasuredLayer<'a> {
    /// Module name.
    pub layer: &'a LayerName,
    /// The linear as read from the files.
    pub solved: &'a SolvedLayer,
    /// `tr(E H E^T)`, in the measure of [`gptq_types::LayerLoss`].
    pub error: f64,
}

/// Measures every linear in the order of the data, on the processor.
///
/// # Errors
/// A linear that is not packed, cannot be read or has another shape than in the float model.
pub fn measure_files(
    files: &FilesToMeasure<'_>,
    each: &mut dyn FnMut(MeasuredLayer<'_>),
) -> Result<(), PipelineError> {
    let model = ModelSpec::read(files.config_json, &files.source.names());
    let model = model.map_err(|source| PipelineError::Config {
        place: files.source.place(),
        source,
    })?;
    if files.windows.is_empty() {
        return Err(PipelineError::NoWindows);
    }
    let streams = match files.measure {
        LossMeasure::QuantizedInputs => Streams::One,
        LossMeasure::FloatOutputs => Streams::BesideFloat,
    };
    let weights = Arc::new(FloatWeights::new(files.source.clone()));
    let mut decoder = gptq_model::open(weights, model.clone(), &DeviceContext::Cpu, streams)?;
    decoder.embed(files.windows)?;
    for index in 0..model.blocks.len() {
        decoder.load_block(index)?;
        let folded = Folded::of(&model, index, files.spec, files.layers)?;
        for group in model.blocks[index].groups() {
            let mut sum = match streams {
                Streams::One => HessianSum::new(group.in_features()),
                Streams::BesideFloat => HessianSum::beside_float(group.in_features()),
            };
            decoder.capture(group.tap, &mut sum)?;
            let hessian = sum.finish().map_err(|source| PipelineError::Quantize {
                layer: group.linears[0].name.clone(),
                source,
            })?;
            for linear in &group.linears {
                let layer = &linear.name;
                let solved = read_layer(files.packed, layer, linear.shape(), files.settings)?;
                let unfolded = folded.unfolded(layer, solved.clone());
                let error = error_of(&hessian, decoder.weight(layer)?, &unfolded);
                each(MeasuredLayer {
                    layer,
                    solved: &solved,
                    error,
                });
                decoder.replace_weight(layer, unfolded.dequantize())?;
            }
        }
        decoder.finish_block()?;
    }
    Ok(())
}

fn error_of(hessian: &Hessian, weight: Weight<'_>, solved: &SolvedLayer) -> f64 {
    let Weight::Host(weight) = weight else {
        unreachable!("a decoder on the processor has its weights in host memory");
    };
    output_error(hessian, &weight, solved)
}
