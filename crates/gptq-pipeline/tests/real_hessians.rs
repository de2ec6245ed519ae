//! The solver on weights and inputs of a true model, against the plain f64 reference and against
//! rounding to nearest.
#![allow(clippy::print_stderr)]

#[path = "../../../tests/support/data.rs"]
mod data;

use std::path::Path;
use std::sync::Arc;

use data::fixture;
use gptq_calibration::Tokenizer;
use gptq_model::{DeviceContext, FloatWeights, LinearSpec, ModelSpec, Streams, Weight};
use gptq_packer::SafetensorsFile;
use gptq_quantizer::{
    Factor, Hessian, HessianSum, output_error, reference, round_to_nearest, solve,
};
use gptq_types::{Bits, ColumnOrder, GroupSize, LayerName, QuantSpec};

/// The reference follows the solver where two codes or two grids are equally good.
const RELATIVE_ERROR_TOLERANCE: f64 = 1e-3;

const ORDERS: [ColumnOrder; 4] = [
    ColumnOrder::Natural,
    ColumnOrder::ActOrder,
    ColumnOrder::ActOrderStaticGroups,
    ColumnOrder::GroupAware,
];

/// A linear, its weight `[K, N]` and the Hessian of its inputs.
struct Case {
    layer: LayerName,
    out_features: usize,
    weight: Vec<f32>,
    hessian: Hessian,
}

/// The first linear of each stage of the first two blocks.
fn cases(model: &Path, text: &Path) -> Vec<Case> {
    let tokenizer = Tokenizer::open(model).unwrap();
    let text: String = std::fs::read_to_string(text)
        .unwrap()
        .chars()
        .take(30_000)
        .collect();
    let ids = tokenizer.encode(&text).unwrap();
    let windows: Vec<Vec<u32>> = ids
        .chunks_exact(256)
        .take(16)
        .map(<[u32]>::to_vec)
        .collect();
    let config = std::fs::read_to_string(model.join("config.json")).unwrap();
    let spec = ModelSpec::parse(&config).unwrap();
    let source = Arc::new(SafetensorsFile::open(&model.join("model.safetensors")).unwrap());
    let weights = Arc::new(FloatWeights::new(source));
    let mut decoder =
        gptq_model::open(weights, spec.clone(), &DeviceContext::Cpu, Streams::One).unwrap();
    decoder.embed(&windows).unwrap();
    let mut cases = Vec::new();
    for index in 0..2 {
        decoder.load_block(index).unwrap();
        for group in spec.blocks[index].groups() {
            let LinearSpec {
                name: layer,
                out_features,
                ..
            } = group.linears[0].clone();
            let mut sum = HessianSum::new(group.in_features());
            decoder.capture(group.tap, &mut sum).unwrap();
            cases.push(Case {
                weight: match decoder.weight(&layer).unwrap() {
                    Weight::Host(values) => values,
                    Weight::Device(_) => unreachable!("the decoder is on the processor"),
                },
                layer,
                out_features,
                hessian: sum.finish().unwrap(),
            });
        }
        decoder.finish_block().unwrap();
    }
    cases
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

#[test]
fn errors_match_the_f64_reference_and_stay_below_rounding() {
    let (model, text) = (fixture("verne"), fixture("verne-calibration.txt"));
    let [mut plain, mut searched] = [0.0f64; 2];
    for case in cases(&model, &text) {
        let (weight, hessian) = (wide(&case.weight), wide(case.hessian.values()));
        for bits in Bits::ALL {
            for group_size in [
                GroupSize::Channels(16),
                GroupSize::Channels(64),
                GroupSize::None,
            ] {
                for order in ORDERS {
                    let both = [true, false];
                    for (sym, scale_search) in
                        both.into_iter().flat_map(|sym| both.map(|s| (sym, s)))
                    {
                        let spec = QuantSpec {
                            scale_search,
                            bits,
                            group_size,
                            order,
                            sym,
                            ..QuantSpec::published()
                        };
                        let n = case.out_features;
                        let factor = Factor::new(&case.hessian, &spec).unwrap();
                        let ours = solve(&case.weight, n, &factor, &spec).unwrap().layer;
                        let want =
                            reference::gptq(&weight, &hessian, n, &spec, Some(&ours)).unwrap();
                        let got = output_error(&case.hessian, &case.weight, &ours);
                        let expected = output_error(&case.hessian, &case.weight, &want);
                        let relative = (got / expected - 1.0).abs();
                        let worst = if scale_search {
                            &mut searched
                        } else {
                            &mut plain
                        };
                        *worst = worst.max(relative);
                        let what = format!("{} with {spec:?}", case.layer);
                        assert!(relative < RELATIVE_ERROR_TOLERANCE, "{relative:e}: {what}");

                        let rounded = round_to_nearest(&case.weight, n, &spec).unwrap();
                        let rtn = output_error(&case.hessian, &case.weight, &rounded);
                        assert!(got <= rtn, "{got} above {rtn}: {what}");
                    }
                }
            }
        }
    }
    eprintln!(
        "largest relative difference to the f64 reference: {plain:e}, with the search {searched:e}"
    );
}
