//! The float stream shows the same rows as a decoder whose weights were never replaced, whatever was
//! replaced in the calibration stream.

#[path = "../../../tests/support/data.rs"]
mod data;

use std::sync::Arc;

use gptq_model::{
    ActivationSink, Activations, CaptureGroup, Decoder, DeviceContext, FloatWeights, ModelSpec,
    Streams, Weight,
};
use gptq_packer::SafetensorsFile;

fn decoder(streams: Streams) -> Box<dyn Decoder> {
    let model = data::fixture("verne");
    let config = std::fs::read_to_string(model.join("config.json")).unwrap();
    let spec = ModelSpec::parse(&config).unwrap();
    let source = Arc::new(SafetensorsFile::open(&model.join("model.safetensors")).unwrap());
    let weights = Arc::new(FloatWeights::new(source));
    let mut decoder = gptq_model::open(weights, spec, &DeviceContext::Cpu, streams).unwrap();
    let window = |first: u32| (first..first + 48).collect::<Vec<u32>>();
    decoder.embed(&[window(3), window(20)]).unwrap();
    decoder
}

/// Rows of both streams, one batch after the other.
#[derive(Default)]
struct Rows {
    own: Vec<f32>,
    float: Vec<f32>,
}

fn host<'a>(x: Activations<'a>) -> &'a [f32] {
    match x {
        Activations::Host(x) => x,
        Activations::Device(_) => unreachable!("the decoder is on the processor"),
    }
}

impl ActivationSink for Rows {
    fn observe(&mut self, x: Activations<'_>, _: usize, _: usize) {
        self.own.extend(host(x));
    }

    fn observe_pair(&mut self, x: Activations<'_>, float: Activations<'_>, _: usize, _: usize) {
        self.own.extend(host(x));
        self.float.extend(host(float));
    }
}

fn rows(decoder: &mut dyn Decoder, group: &CaptureGroup) -> Rows {
    let mut rows = Rows::default();
    decoder.capture(group.tap, &mut rows).unwrap();
    rows
}

fn groups(decoder: &dyn Decoder, index: usize) -> Vec<CaptureGroup> {
    decoder.spec().blocks[index].groups()
}

/// Doubles every linear of a group.
fn change(decoder: &mut dyn Decoder, group: &CaptureGroup) {
    for linear in &group.linears {
        let layer = &linear.name;
        let Weight::Host(mut values) = decoder.weight(layer).unwrap() else {
            unreachable!("the decoder is on the processor");
        };
        values.iter_mut().for_each(|value| *value *= 2.0);
        decoder.replace_weight(layer, values).unwrap();
    }
}

#[test]
fn it_is_that_of_weights_that_were_never_replaced() {
    let mut both = decoder(Streams::BesideFloat);
    let mut float = decoder(Streams::One);
    let mut replaced = decoder(Streams::One);
    for index in 0..3 {
        for decoder in [&mut both, &mut float, &mut replaced] {
            decoder.load_block(index).unwrap();
        }
        for (at, group) in groups(both.as_ref(), index).iter().enumerate() {
            let seen = rows(both.as_mut(), group);
            assert_eq!(
                seen.float,
                rows(float.as_mut(), group).own,
                "{index} {group:?}"
            );
            assert_eq!(
                seen.own,
                rows(replaced.as_mut(), group).own,
                "{index} {group:?}"
            );
            let first = index == 0 && at == 0;
            assert_eq!(seen.own == seen.float, first, "{index} {group:?}");
            change(both.as_mut(), group);
            change(replaced.as_mut(), group);
        }
        for decoder in [&mut both, &mut float, &mut replaced] {
            decoder.finish_block().unwrap();
        }
    }
}

/// A resumed run passes through finished blocks without looking.
#[test]
fn nobody_has_to_look() {
    let (mut both, mut float) = (decoder(Streams::BesideFloat), decoder(Streams::One));
    both.load_block(0).unwrap();
    for group in groups(both.as_ref(), 0) {
        change(both.as_mut(), &group);
    }
    both.forward_block().unwrap();
    float.load_block(0).unwrap();
    float.forward_block().unwrap();
    both.load_block(1).unwrap();
    float.load_block(1).unwrap();
    let first = &groups(both.as_ref(), 1)[0];
    let seen = rows(both.as_mut(), first);
    assert_eq!(seen.float, rows(float.as_mut(), first).own);
    assert_ne!(seen.own, seen.float);
}
