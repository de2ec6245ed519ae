//! Gradients of a whole block: of every block of a tiny checkpoint of each family, against differences of the
//! squared error of its output; and a few steps against them make the error smaller.

#[path = "../../../tests/support/data.rs"]
mod data;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use gptq_model::{
    Activations, Decoder, DeviceContext, FloatWeights, GradientSink, ModelSpec, Trainer, Weight,
};
use gptq_packer::SafetensorsFile;
use gptq_types::{GroupSize, LayerName, TensorSource};

/// Of a directional derivative, from differences of f32 passes.
const TOLERANCE: f64 = 3e-3;
/// Steps, as parts of the largest element of each weight.
const STEPS: [f32; 6] = [1.6e-2, 8e-3, 4e-3, 2e-3, 1e-3, 5e-4];

fn decoder(folder: &Path) -> Box<dyn Trainer> {
    let config = std::fs::read_to_string(folder.join("config.json")).unwrap();
    let source = Arc::new(SafetensorsFile::open(&folder.join("model.safetensors")).unwrap());
    let spec = ModelSpec::read(&config, &source.names()).unwrap();
    let vocab = spec.vocab_size as u32;
    let weights = Arc::new(FloatWeights::new(source));
    let mut decoder =
        gptq_model::open_trainer(weights, spec, &DeviceContext::Cpu, GroupSize::None).unwrap();
    let window = |first: u32| {
        (0..12)
            .map(|at| (first + 5 * at) % vocab)
            .collect::<Vec<u32>>()
    };
    decoder.embed(&[window(3), window(20)]).unwrap();
    decoder
}

struct Random(u64);

impl Random {
    /// From -1 to 1.
    fn next(&mut self) -> f32 {
        self.0 = (self.0.wrapping_mul(6_364_136_223_846_793_005)).wrapping_add(1);
        (self.0 >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
}

/// Gradients of weights `[in_features, out_features]`.
#[derive(Default)]
struct Gradients {
    widths: BTreeMap<LayerName, usize>,
    sums: BTreeMap<LayerName, Vec<f64>>,
}

fn host<'a>(x: Activations<'a>) -> &'a [f32] {
    match x {
        Activations::Host(x) => x,
        Activations::Device(_) => unreachable!("the decoder is on the processor"),
    }
}

impl GradientSink for Gradients {
    fn gradient(
        &mut self,
        layer: &LayerName,
        outputs: Range<usize>,
        x: Activations<'_>,
        dy: Activations<'_>,
        rows: usize,
    ) {
        let (x, dy, n) = (host(x), host(dy), self.widths[layer]);
        let k = x.len() / rows;
        let sum = (self.sums.entry(layer.clone())).or_insert_with(|| vec![0.0; k * n]);
        for (x, dy) in x.chunks(k).zip(dy.chunks(outputs.len())) {
            for (channel, x) in x.iter().enumerate() {
                let row = &mut sum[channel * n..][outputs.clone()];
                for (sum, dy) in row.iter_mut().zip(dy) {
                    *sum += f64::from(*x) * f64::from(*dy);
                }
            }
        }
    }
}

/// Weights of a block, as they are.
fn weights(decoder: &dyn Decoder, block: usize) -> BTreeMap<LayerName, Vec<f32>> {
    let linears = decoder.spec().blocks[block].linears().cloned();
    let names: Vec<LayerName> = linears.map(|linear| linear.name).collect();
    let shown = |name: LayerName| {
        let Weight::Host(values) = decoder.weight(&name).unwrap() else {
            unreachable!("the decoder is on the processor");
        };
        (name, values)
    };
    names.into_iter().map(shown).collect()
}

fn put(decoder: &mut dyn Decoder, weights: &BTreeMap<LayerName, Vec<f32>>) {
    for (name, values) in weights {
        decoder.replace_weight(name, values.clone()).unwrap();
    }
}

fn error(decoder: &mut dyn Trainer) -> f64 {
    let batches = 0..decoder.batches();
    batches
        .map(|batch| decoder.output_error(batch).unwrap())
        .sum()
}

fn gradients(decoder: &mut dyn Trainer, block: usize, factor: f32) -> (f64, Gradients) {
    let linears = decoder.spec().blocks[block].linears();
    let widths = linears.map(|linear| (linear.name.clone(), linear.out_features));
    let mut found = Gradients {
        widths: widths.collect(),
        ..Gradients::default()
    };
    for batch in 0..decoder.batches() {
        decoder.train(batch, factor, &mut found).unwrap();
    }
    (error(decoder), found)
}

/// Weights moved by `step` times a direction that has the size of each weight's largest.
fn moved(
    weights: &BTreeMap<LayerName, Vec<f32>>,
    directions: &BTreeMap<LayerName, Vec<f32>>,
    step: f32,
) -> BTreeMap<LayerName, Vec<f32>> {
    let one = |(name, values): (&LayerName, &Vec<f32>)| {
        let pairs = values.iter().zip(&directions[name]);
        let moved = pairs.map(|(value, direction)| value + step * direction);
        (name.clone(), moved.collect())
    };
    weights.iter().map(one).collect()
}

/// The derivative from central differences: of two of them the term of third order is taken out (Richardson),
/// and of five such estimates the one is taken that differs least from its neighbour. Large steps bend, small
/// ones drown in the rounding of f32.
fn derivative(difference: &mut dyn FnMut(f32) -> f64) -> f64 {
    let differences = STEPS.map(difference);
    let estimates: Vec<f64> = (differences.windows(2))
        .map(|pair| (4.0 * pair[1] - pair[0]) / 3.0)
        .collect();
    let spread = |pair: &&[f64]| (pair[0] - pair[1]).abs();
    let closest = (estimates.windows(2)).min_by(|a, b| spread(a).total_cmp(&spread(b)));
    closest.expect("five estimates")[1]
}

/// Directions for all linears together, and for each alone.
fn directions(
    weights: &BTreeMap<LayerName, Vec<f32>>,
    random: &mut Random,
) -> Vec<BTreeMap<LayerName, Vec<f32>>> {
    let all: BTreeMap<LayerName, Vec<f32>> = (weights.iter())
        .map(|(name, values)| {
            let size = values
                .iter()
                .fold(0.0f32, |size, value| size.max(value.abs()));
            (
                name.clone(),
                values.iter().map(|_| size * random.next()).collect(),
            )
        })
        .collect();
    let alone = |name: &LayerName| {
        let mut one: BTreeMap<LayerName, Vec<f32>> = (all.iter())
            .map(|(name, values)| (name.clone(), vec![0.0; values.len()]))
            .collect();
        one.insert(name.clone(), all[name].clone());
        one
    };
    let mut directions: Vec<_> = all.keys().map(alone).collect();
    directions.push(all);
    directions
}

#[test]
fn gradients_of_every_block_of_every_family_are_those_of_differences() {
    let mut folders: Vec<_> = (std::fs::read_dir(data::fixture("arch")).unwrap())
        .map(|folder| folder.unwrap().path())
        .collect();
    folders.push(data::fixture("verne"));
    folders.sort();
    let mut checked = 0;
    for folder in folders {
        let mut decoder = decoder(&folder);
        let decoder = decoder.as_mut();
        let mut random = Random(7);
        for block in 0..decoder.spec().blocks.len() {
            decoder.load_block(block).unwrap();
            decoder.finish_float().unwrap();
            // Somewhere beside the float weights, where the gradient is not zero.
            let float = weights(decoder, block);
            let noise = directions(&float, &mut random).pop().unwrap();
            let here = moved(&float, &noise, 0.1);
            put(decoder, &here);
            let factor = 0.5;
            let (told, found) = gradients(decoder, block, factor);
            for direction in directions(&here, &mut random) {
                let want: f64 = (found.sums.iter())
                    .map(|(name, sum)| {
                        let pairs = sum.iter().zip(&direction[name]);
                        pairs.map(|(sum, d)| sum * f64::from(*d)).sum::<f64>()
                    })
                    .sum();
                let mut difference = |step: f32| {
                    put(decoder, &moved(&here, &direction, step));
                    let above = error(decoder);
                    put(decoder, &moved(&here, &direction, -step));
                    f64::from(factor) / 2.0 * (above - error(decoder)) / (2.0 * f64::from(step))
                };
                let got = derivative(&mut difference);
                // The differences of two f32 passes tell no derivative that is small beside the error.
                let size = want.abs().max(2e-2 * told);
                let off = (want - got).abs() / size;
                assert!(
                    off < TOLERANCE,
                    "{}, block {block}: {want} of the gradient, {got} of differences, error {told}",
                    folder.display()
                );
                checked += 1;
            }
            decoder.restart_block().unwrap();
            decoder.finish_block().unwrap();
        }
    }
    assert!(checked > 400, "only {checked} directions");
}

/// What passes on to the next block is what the trained weights make of the inputs that were kept.
#[test]
fn steps_against_the_gradient_bring_the_output_to_that_of_the_float_block() {
    let mut decoder = decoder(&data::fixture("verne"));
    let decoder = decoder.as_mut();
    decoder.load_block(0).unwrap();
    decoder.finish_float().unwrap();
    let float = weights(decoder, 0);
    let noise = directions(&float, &mut Random(3)).pop().unwrap();
    let mut here = moved(&float, &noise, 0.1);
    put(decoder, &here);
    let (before, first) = gradients(decoder, 0, 1.0);
    let square: f64 = first.sums.values().flatten().map(|d| d * d).sum();
    // A tenth of the step that would take a linear error to zero.
    let rate = 0.05 * before / square;
    for _ in 0..40 {
        let (_, found) = gradients(decoder, 0, 1.0);
        for (name, sum) in &found.sums {
            let values = here.get_mut(name).unwrap();
            for (value, d) in values.iter_mut().zip(sum) {
                *value -= (rate * d) as f32;
            }
        }
        put(decoder, &here);
    }
    let after = error(decoder);
    assert!(after < 0.7 * before, "{before} to {after}");
    decoder.restart_block().unwrap();
    decoder.finish_block().unwrap();
    // The next block is trained towards its own target, from these hidden states.
    decoder.load_block(1).unwrap();
    decoder.finish_float().unwrap();
    assert!(error(decoder) > 0.0);
}
