//! Gradients of whole blocks in f64, against differences of the squared error of their outputs.
//!
//! The order of operations, the tape and the gradients are those of training; the forward operations are plain
//! loops ([`Double`]). In f32, where `gptq-pipeline/tests/training.rs` holds the same blocks, differences of
//! two passes have three digits of a derivative.

#[path = "../../../../tests/support/data.rs"]
mod data;

use std::ops::{Range, RangeInclusive};
use std::path::Path;

use gptq_kernels::{Activations, product_weight_backward};
use gptq_packer::SafetensorsFile;
use gptq_types::{GroupSize, TensorSource};

use super::*;
use crate::backend::host::double::{Double, tensor, values};
use crate::weights::FloatWeights;

/// Of a directional derivative, relative.
const TOLERANCE: f64 = 1e-6;
/// Steps are parts of the largest element of each weight: these powers of a half.
const STEPS: RangeInclusive<i32> = 6..=12;
/// Of a window: more than fixtures attend to, and than some were first trained on.
const TOKENS: u32 = 40;

/// Folders of `golden-arch`, beside the project, of the dense families that are computed.
const DENSE: [&str; 21] = [
    "cohere2",
    "exaone4",
    "gemma2",
    "gemma3_text",
    "gemma4_e_text",
    "gemma4_text",
    "glm4",
    "granite",
    "hunyuan_v1_dense",
    "llama3",
    "ministral3",
    "mistral_small",
    "olmo2",
    "olmo3",
    "phi3",
    "phi3_longrope",
    "phi3_partial",
    "qwen3",
    "seed_oss",
    "smollm3",
    "starcoder2",
];

/// Of weights, their directions or gradients, `[in_features, out_features]`.
type Values = BTreeMap<LayerName, Vec<f64>>;

fn decoder(folder: &Path) -> Engine<Double> {
    let config = std::fs::read_to_string(folder.join("config.json")).unwrap();
    let source = Arc::new(SafetensorsFile::open(&folder.join("model.safetensors")).unwrap());
    let spec = ModelSpec::read(&config, &source.names()).unwrap();
    let vocab = spec.vocab_size as u32;
    let weights = Arc::new(FloatWeights::new(source));
    spec.check_tensors(weights.as_ref()).unwrap();
    let mut decoder = Engine::for_training(DeviceContext::Cpu, (), weights, spec, GroupSize::None);
    let window = |first: u32| (0..TOKENS).map(|at| (first + 5 * at) % vocab).collect();
    decoder.embed(&[window(3), window(20)]).unwrap();
    decoder
}

impl Engine<Double> {
    fn resident(&mut self) -> &mut Block<OnBackend<Double>> {
        &mut self.block.as_mut().expect("a block is resident").block
    }

    fn values(&mut self) -> Values {
        let linears = self.resident().linears();
        linears
            .map(|linear| (linear.spec.name.clone(), values(&linear.weight)))
            .collect()
    }

    fn put(&mut self, weights: &Values) {
        for linear in self.resident().linears_mut() {
            let values = weights[&linear.spec.name].clone();
            linear.weight = tensor(values, linear.spec.out_features);
        }
    }

    fn error(&mut self) -> f64 {
        self.output_error(0).unwrap()
    }

    /// The gradients of all linears of the block. No output is shown twice, and in no family is one unused.
    fn gradients(&mut self, factor: f32) -> Values {
        let linears = self.resident().linears();
        let gradients = linears.map(|linear| {
            let spec = &linear.spec;
            let sum = vec![0.0; spec.in_features * spec.out_features];
            (spec.name.clone(), (spec.out_features, Vec::new(), sum))
        });
        let mut found = Gradients(gradients.collect());
        self.train(0, factor, &mut found).unwrap();
        let whole = |(layer, (outputs, mut shown, sum)): (_, OfLinear)| {
            shown.sort_by_key(|range| range.start);
            let mut end = 0;
            for range in &shown {
                assert_eq!(range.start, end, "{layer:?} shows {shown:?} of {outputs}");
                end = range.end;
            }
            assert_eq!(end, outputs, "{layer:?} shows {shown:?} of {outputs}");
            (layer, sum)
        };
        found.0.into_iter().map(whole).collect()
    }
}

/// Outputs of a linear, the ranges of them that were shown, the gradient of its weight.
type OfLinear = (usize, Vec<Range<usize>>, Vec<f64>);

struct Gradients(BTreeMap<LayerName, OfLinear>);

impl GradientSink for Gradients {
    fn gradient(
        &mut self,
        layer: &LayerName,
        outputs: Range<usize>,
        x: Activations<'_>,
        dy: Activations<'_>,
        rows: usize,
    ) {
        let [x, dy]: [&[f64]; 2] = [x, dy].map(|rows| match rows {
            Activations::Host(bits) => bytemuck::cast_slice(bits),
            Activations::Device(_) => unreachable!("the decoder is on the processor"),
        });
        let (n, shown, sum) = self.0.get_mut(layer).expect("a linear of the block");
        let (k, width) = (x.len() / rows, outputs.len());
        let mut d_weight = vec![0.0; k * width];
        product_weight_backward(&mut d_weight, dy, x, rows, k, width);
        for (sum, d_weight) in sum.chunks_mut(*n).zip(d_weight.chunks(width)) {
            sum[outputs.clone()].copy_from_slice(d_weight);
        }
        shown.push(outputs);
    }
}

struct Random(u64);

impl Random {
    /// From -1 to 1.
    fn next(&mut self) -> f64 {
        self.0 = (self.0.wrapping_mul(6_364_136_223_846_793_005)).wrapping_add(1);
        (self.0 >> 40) as f64 / f64::from(1 << 23) - 1.0
    }

    /// A direction for every weight, of the size of its largest element.
    fn direction(&mut self, weights: &Values) -> Values {
        let mut one = |(name, values): (&LayerName, &Vec<f64>)| {
            let size = values.iter().fold(0.0f64, |size, x| size.max(x.abs()));
            let direction = values.iter().map(|_| size * self.next());
            (name.clone(), direction.collect())
        };
        weights.iter().map(&mut one).collect()
    }
}

/// Weights moved by `step` times a direction; those without one stay.
fn moved(weights: &Values, direction: &Values, step: f64) -> Values {
    let mut moved = weights.clone();
    for (name, direction) in direction {
        let values = moved.get_mut(name).expect("a weight for each direction");
        let pairs = values.iter_mut().zip(direction);
        pairs.for_each(|(value, direction)| *value += step * direction);
    }
    moved
}

/// The derivative from central differences of ever smaller steps, out of which the terms of higher order are
/// taken one after the other (Richardson). Large steps bend, small ones drown in the rounding of f64: the
/// estimate is taken that differs least from the two that it is made of (Ridders 1982).
fn derivative(mut difference: impl FnMut(f64) -> f64) -> f64 {
    let (mut best, mut least) = (f64::NAN, f64::INFINITY);
    let mut above: Vec<f64> = Vec::new(); // estimates of the step before, by order
    for power in STEPS {
        let mut estimates = vec![difference(0.5f64.powi(power))];
        for (order, coarse) in above.iter().enumerate() {
            let (fine, weight) = (estimates[order], 4f64.powi(order as i32 + 1));
            let estimate = (weight * fine - coarse) / (weight - 1.0);
            let spread = (estimate - fine).abs().max((estimate - coarse).abs());
            if spread < least {
                (best, least) = (estimate, spread);
            }
            estimates.push(estimate);
        }
        above = estimates;
    }
    best
}

/// Holds the gradients of every block against differences along directions, of each linear alone and of all
/// together; tells how many.
fn check(folder: &Path) -> usize {
    let mut decoder = decoder(folder);
    let mut random = Random(7);
    let mut checked = 0;
    for block in 0..decoder.spec().blocks.len() {
        decoder.load_block(block).unwrap();
        decoder.finish_float().unwrap();
        // Somewhere beside the float weights, where the gradient is not zero.
        let float = decoder.values();
        let here = moved(&float, &random.direction(&float), 0.1);
        decoder.put(&here);
        let factor = 0.5;
        let gradients = decoder.gradients(factor);
        let all = random.direction(&here);
        let alone = (all.iter()).map(|(name, one)| Values::from([(name.clone(), one.clone())]));
        for direction in alone.chain([all.clone()]) {
            let inner = |(name, direction): (&LayerName, &Vec<f64>)| {
                let pairs = gradients[name].iter().zip(direction);
                pairs.map(|(gradient, d)| gradient * d).sum::<f64>()
            };
            let got: f64 = direction.iter().map(inner).sum();
            let want = derivative(|step| {
                let mut error = |step| {
                    decoder.put(&moved(&here, &direction, step));
                    decoder.error()
                };
                f64::from(factor) / 2.0 * (error(step) - error(-step)) / (2.0 * step)
            });
            let off = (got - want).abs() / want.abs();
            let names: Vec<_> = direction.keys().collect();
            assert!(
                off <= TOLERANCE,
                "{}, block {block}, {names:?}: {got} of the gradient, {want} of differences",
                folder.display()
            );
            checked += 1;
        }
        decoder.put(&here);
        decoder.restart_block().unwrap();
        decoder.finish_block().unwrap();
    }
    checked
}

#[test]
fn gradients_in_f64_are_those_of_differences_for_every_block_of_every_fixture() {
    let mut folders: Vec<_> = (std::fs::read_dir(data::fixture("arch")).unwrap())
        .map(|folder| folder.unwrap().path())
        .collect();
    folders.push(data::fixture("verne"));
    let checked: usize = folders.iter().map(|folder| check(folder)).sum();
    assert!(checked > 400, "only {checked} directions");
}

#[test]
fn gradients_in_f64_are_those_of_differences_for_every_block_of_every_dense_golden() {
    for name in DENSE {
        if let Some(folder) = data::shared(&format!("golden-arch/{name}")) {
            assert!(check(&folder) > 0, "no direction in {name}");
        }
    }
}
