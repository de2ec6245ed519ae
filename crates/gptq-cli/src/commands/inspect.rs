//! `gptq inspect`.

use gptq_packer::{QuantizeConfig, ZeroConvention, packed_layers, read_layer, zero_convention};
use gptq_types::{LayerName, TensorSource};
use serde::Serialize;

use crate::Verdict;
use crate::args::InspectArgs;
use crate::failure::Failure;
use crate::models::find;

/// What a checkpoint holds, found in its data where the data can say.
#[derive(Serialize)]
struct Inspection {
    architecture: String,
    parameters: usize,
    weight_bytes: u64,
    quantization: Option<Quantization>,
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
    let opened = model.open()?;
    let source = model.checkpoint.as_ref();
    let quantization = opened
        .quantization
        .as_ref()
        .map(|config| inspect(source, config))
        .transpose()?;
    let config = &opened.config;
    let block: usize = config.block_linears(0).iter().map(|(_, k, n)| k * n).sum();
    let tables = if config.tie_word_embeddings { 1 } else { 2 };
    let inspection = Inspection {
        architecture: config.architecture.clone(),
        parameters: block * config.num_hidden_layers
            + tables * config.vocab_size * config.hidden_size,
        weight_bytes: model.checkpoint.weight_bytes(),
        quantization,
    };
    match args.json {
        true => println!("{}", serde_json::to_string_pretty(&inspection)?),
        false => print(&inspection, args.layers),
    }
    let agrees = inspection.quantization.is_none_or(|q| q.agrees);
    Ok(if agrees { Verdict::Yes } else { Verdict::No })
}

fn inspect(source: &dyn TensorSource, config: &QuantizeConfig) -> Result<Quantization, Failure> {
    let names = packed_layers(source);
    let mut layers = Vec::new();
    for name in &names {
        let solved = read_layer(source, name, config)?;
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
    let found = zero_convention(source, &names, config.bits)?;
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

/// What the stored zeros look like, and whether that fits the declared format.
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

fn print(inspection: &Inspection, with_layers: bool) {
    println!("architecture     {}", inspection.architecture);
    println!("parameters       {}", inspection.parameters);
    println!("weight bytes     {}", inspection.weight_bytes);
    let Some(quantization) = &inspection.quantization else {
        println!("quantization     none");
        return;
    };
    let q = quantization;
    println!("packed linears   {}", q.packed_layers);
    println!("bits             {}", q.bits);
    println!("group size       {}", q.group_size);
    println!("sym              {}", q.sym);
    println!(
        "act-order        {} linears with a permuted g_idx",
        q.act_order_layers
    );
    println!("bits per weight  {:.3}", q.bits_per_weight);
    println!("format declared  {}", q.declared_format);
    println!("format found     {}", q.zero_points_found);
    if !q.agrees {
        println!("the stored zeros contradict the declared format");
    }
    for note in &q.notes {
        println!("note             {note}");
    }
    if with_layers {
        for l in &q.layers {
            let order = if l.act_order { "act-order" } else { "trivial" };
            println!(
                "{}  {} x {}  {} groups  g_idx {order}",
                l.name, l.in_features, l.out_features, l.groups
            );
        }
    }
}
