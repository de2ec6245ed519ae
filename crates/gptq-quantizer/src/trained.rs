//! A rounded linear whose latents and scales are trained.
//!
//! The sweep leaves a latent behind each code: the value of the weight when it was rounded, which carries the
//! errors of the channels before it. Latents round to the codes, so training starts where GPTQ ends
//! (auto-round, Cheng et al. 2023, arXiv:2309.05516, starts from rounding to nearest). Zeros and `g_idx` stay.
//! The rule of the gradients is that of [`TrainedGrids`].

use std::ops::Range;

use gptq_kernels::{
    Activations, Adam, LearningRates, TrainedGrids, Weight, product_weight_backward,
};
use gptq_types::{Bits, SolvedLayer};
use half::f16;

use crate::QuantizeError;

/// Latents and scales of a linear while its block is trained.
pub trait TrainedLinear {
    /// The scales as they are trained, `[groups, out_features]`.
    fn scales(&self) -> Result<Vec<f32>, QuantizeError>;

    /// The rounded weight. On a GPU it is written over `weight`, on a processor it is returned,
    /// `[in_features, out_features]`.
    fn rounded(&self, weight: &Weight<'_>) -> Result<Option<Vec<f32>>, QuantizeError>;

    /// Begins a step of Adam.
    fn begin_step(&mut self, rates: LearningRates);

    /// Shows `rows` rows of the linear's inputs `x` and the gradients `dy` at its outputs `outputs`. Within a
    /// step each row is shown each output once.
    fn gradient(
        &mut self,
        outputs: Range<usize>,
        x: Activations<'_>,
        dy: Activations<'_>,
        rows: usize,
    );

    /// Takes the step against the gradients since it began.
    fn end_step(&mut self) -> Result<(), QuantizeError>;

    /// Keeps latents and scales as they are now, in the place of what was kept before.
    fn keep(&mut self) -> Result<(), QuantizeError>;

    /// Takes latents and scales back to what was kept.
    fn restore(&mut self) -> Result<(), QuantizeError>;

    /// Codes and grids.
    fn finish(self: Box<Self>) -> Result<SolvedLayer, QuantizeError>;
}

/// The layer, unless training took a scale beyond f16.
pub(crate) fn finite(layer: SolvedLayer) -> Result<SolvedLayer, QuantizeError> {
    match (layer.scales.iter()).position(|scale| !scale.is_finite()) {
        None => Ok(layer),
        Some(at) => Err(QuantizeError::ScaleOverflow {
            group: at / layer.out_features,
            scale: layer.scales[at].to_f32(),
        }),
    }
}

/// Stops a scale that stepped over 0: where scales are unsigned they stay so.
fn keep_signs(scales: &mut [f32], before: &[f32]) {
    for (scale, before) in scales.iter_mut().zip(before) {
        if scale.is_sign_negative() != before.is_sign_negative() {
            *scale = f16::MIN_POSITIVE.to_f32().copysign(*before);
        }
    }
}

/// On the processor.
pub(crate) struct HostTrained {
    bits: Bits,
    out_features: usize,
    latents: Vec<f32>, // [K, N]
    scales: Vec<f32>,  // [G, N]
    zeros: Vec<f32>,   // [G, N]
    g_idx: Vec<u32>,   // [K]
    rates: LearningRates,
    gradient: Vec<f32>, // [K, N], of the weight, then of the latents
    adam: [Adam<f32>; 2],
    kept: Option<[Vec<f32>; 2]>,
}

impl HostTrained {
    /// Of a layer and the latents that its sweep left, which follow codes and scales that a descent changed.
    pub fn new(layer: &SolvedLayer, latents: Vec<f32>) -> Self {
        let scales: Vec<f32> = layer.scales.iter().map(|scale| scale.to_f32()).collect();
        let mut trained = HostTrained {
            bits: layer.bits,
            out_features: layer.out_features,
            adam: [Adam::new(latents.len()), Adam::new(scales.len())],
            zeros: layer.zeros.iter().map(|&zero| f32::from(zero)).collect(),
            g_idx: layer.g_idx.clone(),
            rates: LearningRates {
                latents: 0.0,
                scales: 0.0,
            },
            gradient: Vec::new(),
            latents,
            scales,
            kept: None,
        };
        let mut latents = std::mem::take(&mut trained.latents);
        (trained.grids()).move_to_codes(&mut latents, &layer.codes);
        trained.latents = latents;
        trained
    }

    fn grids(&self) -> TrainedGrids<'_, f32> {
        TrainedGrids {
            bits: self.bits,
            out_features: self.out_features,
            scales: &self.scales,
            zeros: &self.zeros,
            g_idx: &self.g_idx,
        }
    }
}

fn host<'a>(x: Activations<'a>) -> &'a [f32] {
    let Activations::Host(x) = x else {
        unreachable!("a decoder on the processor shows rows in host memory");
    };
    x
}

impl TrainedLinear for HostTrained {
    fn scales(&self) -> Result<Vec<f32>, QuantizeError> {
        Ok(self.scales.clone())
    }

    fn rounded(&self, _: &Weight<'_>) -> Result<Option<Vec<f32>>, QuantizeError> {
        let mut weight = vec![0.0; self.latents.len()];
        self.grids().round(&mut weight, &self.latents);
        Ok(Some(weight))
    }

    fn begin_step(&mut self, rates: LearningRates) {
        self.rates = rates;
        self.gradient.clear();
        self.gradient.resize(self.latents.len(), 0.0);
    }

    fn gradient(
        &mut self,
        outputs: Range<usize>,
        x: Activations<'_>,
        dy: Activations<'_>,
        rows: usize,
    ) {
        let (x, dy, n) = (host(x), host(dy), self.out_features);
        let (k, columns) = (self.g_idx.len(), outputs.len());
        if columns == n {
            product_weight_backward(&mut self.gradient, dy, x, rows, k, n);
            return;
        }
        let mut part = vec![0.0; k * columns];
        product_weight_backward(&mut part, dy, x, rows, k, columns);
        let rows = self.gradient.chunks_exact_mut(n);
        for (row, part) in rows.zip(part.chunks_exact(columns)) {
            for (sum, d) in row[outputs.clone()].iter_mut().zip(part) {
                *sum += d;
            }
        }
    }

    fn end_step(&mut self) -> Result<(), QuantizeError> {
        let mut d_latents = std::mem::take(&mut self.gradient);
        let mut d_scales = vec![0.0; self.scales.len()];
        (self.grids()).backward(&mut d_latents, &self.latents, &mut d_scales);
        let [latents, scales] = &mut self.adam;
        latents.step(&mut self.latents, &d_latents, self.rates.latents);
        let before = self.scales.clone();
        scales.step(&mut self.scales, &d_scales, self.rates.scales);
        keep_signs(&mut self.scales, &before);
        self.gradient = d_latents;
        Ok(())
    }

    fn keep(&mut self) -> Result<(), QuantizeError> {
        self.kept = Some([self.latents.clone(), self.scales.clone()]);
        Ok(())
    }

    fn restore(&mut self) -> Result<(), QuantizeError> {
        let [latents, scales] = self.kept.as_ref().expect("something was kept");
        self.latents.clone_from(latents);
        self.scales.clone_from(scales);
        Ok(())
    }

    fn finish(self: Box<Self>) -> Result<SolvedLayer, QuantizeError> {
        let codes = self.grids().codes(&self.latents);
        let stored = |&scale: &f32| f16::from_f32(gptq_kernels::stored_scale(scale));
        finite(SolvedLayer {
            bits: self.bits,
            in_features: self.g_idx.len(),
            out_features: self.out_features,
            codes,
            scales: self.scales.iter().map(stored).collect(),
            zeros: self.zeros.iter().map(|&zero| zero as u16).collect(),
            g_idx: self.g_idx,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One input channel, two outputs, gradients that push both scales over 0 in one step.
    #[test]
    fn a_scale_keeps_its_sign() {
        let layer = SolvedLayer {
            bits: Bits::Four,
            in_features: 1,
            out_features: 2,
            codes: vec![15, 15],
            scales: vec![f16::from_f32(0.01), f16::from_f32(-0.01)],
            zeros: vec![8, 8],
            g_idx: vec![0],
        };
        let mut trained = HostTrained::new(&layer, vec![0.09, -0.09]);
        trained.begin_step(LearningRates {
            latents: 0.0,
            scales: 1.0,
        });
        let (x, dy) = ([1.0f32], [1.0f32, -1.0]);
        trained.gradient(0..2, Activations::Host(&x), Activations::Host(&dy), 1);
        trained.end_step().unwrap();
        let least = f16::MIN_POSITIVE.to_f32();
        assert_eq!(trained.scales().unwrap(), [least, -least]);
        let finished = Box::new(trained).finish().unwrap();
        assert_eq!(finished.scales, [f16::MIN_POSITIVE, -f16::MIN_POSITIVE]);
    }
}
