//! `gptq inspect`.

use std::collections::BTreeSet;

use gptq_inference::{OpenError, OpenedModel};
use gptq_model::ModelSpec;
use gptq_packer::{QuantizeConfig, ZeroConvention, packed_layers, read_layer, zero_convention};
use gptq_types::outside_name::shown;
use gptq_types::{LayerName, TensorSource};
use serde::Serialize;

use crate::Verdict;
use crate::args::InspectArgs;
use crate::failure::Failure;
use crate::models::{Model, find};
use crate::output::{print, print_json};

/// The contents of a checkpoint, taken from its data where possible rather than from its configs.
#[derive(Serialize)]
struct Inspection {
    architecture: String,
    parameters: Option<usize>,
    weight_bytes: u64,
    quantization: Option<Quantization>,
    /// Keys of config.json that nobody here knows.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    unread_keys: Vec<String>,
    /// Why `eval` does not take the files, though they are sound.
    #[serde(skip_serializing_if = "Option::is_none")]
    refused: Option<String>,
}

#[derive(Serialize)]
struct Quantization {
    bits: u8,
    group_size: i64,
    sym: bool,
    declared_format: String,
    zero_points_found: &'static str,
    agrees: bool,
    /// Linears whose g_idx is a permutation.
    act_order_layers: usize,
    packed_layers: usize,
    /// Bits in files per weight of the packed linears, scales, zeros and indices counted.
    bits_per_weight: f64,
    layers: Vec<Layer>,
    notes: Vec<String>,
}

#[derive(Serialize)]
struct Layer {
    name: LayerName,
    in_features: usize,
    out_features: usize,
    groups: usize,
    act_order: bool,
    bytes: usize,
}

pub fn run(args: &InspectArgs) -> Result<Verdict, Failure> {
    let model = find(&args.model, &args.hub)?;
    let inspection = match model.try_open()? {
        Ok(opened) => whole(&model, &opened)?,
        // The files are sound, but the architecture is not supported: report what needs no architecture.
        Err(error) if error.is_unsupported() => refused(&model, &error)?,
        Err(error) => return Err(error.into()),
    };
    match args.json {
        true => print_json(&inspection)?,
        false => print(&table(&inspection, args.layers))?,
    }
    let agrees = inspection.quantization.is_none_or(|q| q.agrees);
    Ok(match agrees && inspection.refused.is_none() {
        true => Verdict::Yes,
        false => Verdict::No,
    })
}

fn whole(model: &Model, opened: &OpenedModel) -> Result<Inspection, Failure> {
    let source = model.checkpoint.as_ref();
    let quantization = (opened.quantization.as_ref())
        .map(|settings| inspect(source, &opened.spec, settings))
        .transpose()?;
    let spec = &opened.spec;
    let tables = if spec.head.tied { 1 } else { 2 };
    let by_token = spec.embedding.per_block.as_ref();
    let by_token = by_token.map_or(0, |inputs| inputs.vocab * inputs.width * spec.blocks.len());
    Ok(Inspection {
        architecture: spec.architecture.clone(),
        parameters: Some(spec.elements() + by_token + tables * spec.vocab_size * spec.hidden_size),
        weight_bytes: model.checkpoint.weight_bytes(),
        quantization,
        unread_keys: spec.unread_keys.clone(),
        refused: None,
    })
}

fn refused(model: &Model, error: &OpenError) -> Result<Inspection, Failure> {
    let config: serde_json::Value = serde_json::from_str(&model.config_json)?;
    let named = config["model_type"].as_str().unwrap_or_default();
    Ok(Inspection {
        architecture: shown(named, 80),
        parameters: None,
        weight_bytes: model.checkpoint.weight_bytes(),
        quantization: None,
        unread_keys: Vec::new(),
        refused: Some(error.to_string()),
    })
}

fn inspect(
    source: &dyn TensorSource,
    model: &ModelSpec,
    config: &QuantizeConfig,
) -> Result<Quantization, Failure> {
    let packed: BTreeSet<LayerName> = packed_layers(source).into_iter().collect();
    let known: Vec<(LayerName, [usize; 2])> = (0..model.blocks.len())
        .flat_map(|index| model.block_linears(index))
        .filter(|linear| packed.contains(&linear.name))
        .map(|linear| (linear.name.clone(), linear.shape()))
        .collect();
    let mut layers = Vec::new();
    for (name, shape) in &known {
        let solved = read_layer(source, name, *shape, config)?;
        let group_size = config.group_size.resolve(solved.in_features);
        let suffixes = ["qweight", "qzeros", "scales", "g_idx"];
        layers.push(Layer {
            name: name.clone(),
            in_features: solved.in_features,
            out_features: solved.out_features,
            groups: solved.groups(),
            act_order: !solved.has_trivial_g_idx(group_size),
            bytes: suffixes
                .iter()
                .filter_map(|suffix| source.info(&name.tensor(suffix)))
                .map(|info| info.bytes())
                .sum(),
        });
    }
    let found = zero_convention(source, &known, config)?;
    let (zero_points_found, agrees) = judge(found, config);
    let bytes: usize = layers.iter().map(|layer| layer.bytes).sum();
    let weights: usize = layers.iter().map(|l| l.in_features * l.out_features).sum();
    Ok(Quantization {
        bits: config.bits.into(),
        group_size: config.group_size.into(),
        sym: config.sym,
        declared_format: config.format.to_string(),
        zero_points_found,
        agrees,
        act_order_layers: layers.iter().filter(|layer| layer.act_order).count(),
        packed_layers: layers.len(),
        bits_per_weight: 8.0 * bytes as f64 / weights.max(1) as f64,
        layers,
        notes: config.notes.clone(),
    })
}

/// Names the convention of the stored zeros, and whether it fits the declared format.
fn judge(found: ZeroConvention, config: &QuantizeConfig) -> (&'static str, bool) {
    let declared_v1 = config.format.to_string() == "gptq";
    match found {
        ZeroConvention::V1 => ("gptq (v1)", declared_v1 || !config.sym),
        ZeroConvention::V2 => ("gptq_v2", !declared_v1 || !config.sym),
        ZeroConvention::Asymmetric => ("asymmetric: either", true),
        ZeroConvention::Mixed => ("mixed: layers disagree", false),
        ZeroConvention::Unknown => ("none", true),
    }
}

fn table(inspection: &Inspection, with_layers: bool) -> String {
    let mut lines = vec![format!("architecture     {}", inspection.architecture)];
    lines.extend((inspection.parameters).map(|count| format!("parameters       {count}")));
    lines.push(format!("weight bytes     {}", inspection.weight_bytes));
    if !inspection.unread_keys.is_empty() {
        let keys = inspection.unread_keys.join(", ");
        lines.push(format!("unknown keys     {keys}"));
    }
    if let Some(reason) = &inspection.refused {
        lines.push(format!("eval refuses     {reason}"));
        return lines.join("\n") + "\n";
    }
    match &inspection.quantization {
        None => lines.push("quantization     none".to_string()),
        Some(quantization) => lines.extend(quantization.lines(with_layers)),
    }
    lines.join("\n") + "\n"
}

impl Quantization {
    fn lines(&self, with_layers: bool) -> Vec<String> {
        let mut lines = vec![
            format!("packed linears   {}", self.packed_layers),
            format!("bits             {}", self.bits),
            format!("group size       {}", self.group_size),
            format!("sym              {}", self.sym),
            format!(
                "act-order        {} linears with a permuted g_idx",
                self.act_order_layers
            ),
            format!("bits per weight  {:.3}", self.bits_per_weight),
            format!("format declared  {}", self.declared_format),
            format!("format found     {}", self.zero_points_found),
        ];
        if !self.agrees {
            lines.push("the stored zeros contradict the declared format".to_string());
        }
        lines.extend(
            self.notes
                .iter()
                .map(|note| format!("note             {note}")),
        );
        if with_layers {
            lines.extend(self.layers.iter().map(Layer::line));
        }
        lines
    }
}

impl Layer {
    fn line(&self) -> String {
        let order = if self.act_order {
            "act-order"
        } else {
            "trivial"
        };
        format!(
            "{}  {} x {}  {} groups  g_idx {order}",
            self.name, self.in_features, self.out_features, self.groups
        )
    }
}
