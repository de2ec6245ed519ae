use half::f16;
use proptest::prelude::*;

use super::*;
use crate::backward::definition::{SINGLE, assert_near, on_threads, random, single};

const IN: usize = 96;
const OUT: usize = OUTPUTS + 70;
const GROUPS: usize = 3;

/// A linear with groups scattered over its channels: scales of both signs, zeros anywhere, latents that
/// reach beyond the codes on both sides.
struct Linear<R> {
    bits: Bits,
    scales: Vec<R>,
    zeros: Vec<R>,
    g_idx: Vec<u32>,
    latents: Vec<R>,
    d_weights: Vec<R>,
}

impl Linear<f64> {
    fn new(bits: Bits) -> Self {
        let max_code = f64::from(bits.max_code());
        let grids = GROUPS * OUT;
        let scales: Vec<f64> = (random(grids, 1).iter())
            .map(|x| (0.02 + 0.03 * x.abs()).copysign(*x))
            .collect();
        let zeros = random(grids, 2)
            .into_iter()
            .map(|x| ((x + 1.0) / 2.0 * max_code).round());
        let g_idx: Vec<u32> = (0..IN).map(|k| (k * 7 % GROUPS) as u32).collect();
        let latents = random(IN * OUT, 3).into_iter().map(|x| x * 0.03 * max_code);
        Linear {
            bits,
            scales,
            zeros: zeros.collect(),
            latents: latents.collect(),
            g_idx,
            d_weights: random(IN * OUT, 4),
        }
    }

    fn single(&self) -> Linear<f32> {
        Linear {
            bits: self.bits,
            scales: single(&self.scales),
            zeros: single(&self.zeros),
            g_idx: self.g_idx.clone(),
            latents: single(&self.latents),
            d_weights: single(&self.d_weights),
        }
    }
}

impl<R: Real> Linear<R> {
    fn grids(&self) -> TrainedGrids<'_, R> {
        TrainedGrids {
            bits: self.bits,
            out_features: OUT,
            scales: &self.scales,
            zeros: &self.zeros,
            g_idx: &self.g_idx,
        }
    }

    fn weights(&self) -> Vec<R> {
        let mut weights = vec![R::ZERO; IN * OUT];
        self.grids().round(&mut weights, &self.latents);
        weights
    }

    /// Gradients of latents and scales.
    fn backward(&self) -> [Vec<R>; 2] {
        let (mut d_latents, mut d_scales) = (self.d_weights.clone(), vec![R::ZERO; GROUPS * OUT]);
        (self.grids()).backward(&mut d_latents, &self.latents, &mut d_scales);
        [d_latents, d_scales]
    }
}

/// `gptq_quantizer::grid::nearest`, which this crate does not see: clamped first, rounded then.
fn nearest(w: f32, scale: f32, zero: f32, max_code: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0;
    let (low, high) = (-zero, max_code - zero);
    let x = w / scale;
    let x = if x < low { low } else { x };
    let x = if x > high { high } else { x };
    (x + ROUND) - ROUND
}

#[test]
fn codes_are_those_of_the_quantizer() {
    for bits in Bits::ALL {
        let linear = Linear::new(bits).single();
        let max_code = bits.max_code() as f32;
        let (weights, codes) = (linear.weights(), linear.grids().codes(&linear.latents));
        for (at, &latent) in linear.latents.iter().enumerate() {
            let grid = linear.g_idx[at / OUT] as usize * OUT + at % OUT;
            let scale = f16::from_f32(linear.scales[grid]).to_f32();
            let zero = linear.zeros[grid];
            let steps = nearest(latent, scale, zero, max_code);
            assert_eq!(f32::from(codes[at]), steps + zero);
            let dequantized = scale * (f32::from(codes[at]) - zero); // `SolvedLayer`
            assert_eq!(weights[at].to_bits(), dequantized.to_bits());
        }
        for code in [0, bits.max_code() as u8] {
            assert!(codes.contains(&code), "{bits:?} reaches both ends");
        }
    }
}

/// Halves of a step, on both sides of both ends, are rounded to even there too.
#[test]
fn halves_and_ends_are_rounded_as_by_the_quantizer() {
    for zero in [0.0f32, 1.0, 7.0, 8.0, 15.0] {
        for scale in [0.25f32, -0.25] {
            for halves in -80..80 {
                let latent = halves as f32 * 0.5 * scale;
                let (got, is_inside) = rounded(latent / scale, zero, 15.0);
                assert_eq!(got, nearest(latent, scale, zero, 15.0));
                let code = (latent / scale).round_ties_even() + zero;
                assert_eq!(is_inside, (0.0..=15.0).contains(&code));
            }
        }
    }
    for far in [1e30f32, f32::INFINITY] {
        assert_eq!(rounded(far, 8.0, 15.0), (7.0, false));
        assert_eq!(rounded(-far, 8.0, 15.0), (-8.0, false));
    }
}

#[test]
fn gradients_agree_with_the_formula_element_by_element() {
    for bits in Bits::ALL {
        let linear = Linear::new(bits);
        let max_code = f64::from(bits.max_code());
        let [d_latents, d_scales] = linear.backward();
        let mut want_scales = vec![0.0; GROUPS * OUT];
        let mut clamped = 0;
        for (at, &latent) in linear.latents.iter().enumerate() {
            let grid = linear.g_idx[at / OUT] as usize * OUT + at % OUT;
            let scale = f16::from_f64(linear.scales[grid]).to_f64();
            let (zero, dw) = (linear.zeros[grid], linear.d_weights[at]);
            let free = (latent / scale).round_ties_even() + zero;
            let steps = free.clamp(0.0, max_code) - zero;
            if (0.0..=max_code).contains(&free) {
                assert_eq!(d_latents[at], dw);
                want_scales[grid] += dw * (steps - latent / scale);
            } else {
                clamped += 1;
                assert_eq!(d_latents[at], 0.0);
                want_scales[grid] += dw * steps;
            }
        }
        assert!(
            clamped > IN * OUT / 10 && clamped < IN * OUT / 10 * 9,
            "{clamped}"
        );
        assert_eq!(d_scales, want_scales);
    }
}

#[test]
fn gradients_in_f32_are_those_in_f64_and_the_same_for_any_thread_count() {
    for bits in Bits::ALL {
        let linear = Linear::new(bits);
        let narrow = linear.single();
        let one = on_threads(1, || (narrow.weights(), narrow.backward()));
        assert_eq!(one, on_threads(2, || (narrow.weights(), narrow.backward())));
        assert_eq!(one, on_threads(3, || (narrow.weights(), narrow.backward())));
        // A latent may be rounded the other way only where it lies on the border of two codes.
        let (codes, narrow_codes) = (
            linear.grids().codes(&linear.latents),
            narrow.grids().codes(&narrow.latents),
        );
        let other = codes
            .iter()
            .zip(&narrow_codes)
            .filter(|(a, b)| a != b)
            .count();
        assert!(other <= 2, "{other} codes differ");
        if other == 0 {
            let [d_latents, d_scales] = linear.backward();
            assert_near(&one.1[0], &d_latents, SINGLE, "latents");
            assert_near(&one.1[1], &d_scales, SINGLE, "scales");
        }
    }
}

#[test]
fn gradients_of_scales_are_added_to() {
    let linear = Linear::new(Bits::Four);
    let [_, once] = linear.backward();
    let mut twice = once.clone();
    (linear.grids()).backward(&mut linear.d_weights.clone(), &linear.latents, &mut twice);
    let want: Vec<f64> = once.iter().map(|x| 2.0 * x).collect();
    assert_near(&twice, &want, 1e-12, "after two batches");
}

#[test]
fn stored_scales_are_normal_f16_values_of_the_same_sign() {
    for scale in [0.1234f32, -0.1234, 1.0, 6e4, 6.103e-5] {
        assert_eq!(stored_scale(scale), f16::from_f32(scale).to_f32());
        assert_eq!(
            stored_scale(f64::from(scale)),
            f64::from(stored_scale(scale))
        );
    }
    let least = f16::MIN_POSITIVE.to_f32();
    for scale in [0.0f32, 1e-30, 5e-8, 3e-5] {
        assert_eq!(stored_scale(scale), least);
        assert_eq!(stored_scale(-scale), -least);
    }
    assert_eq!(stored_scale(1e6f32), f32::INFINITY);
}

#[test]
fn all_latents_move_to_their_codes() {
    for bits in Bits::ALL {
        let linear = Linear::new(bits).single();
        let mut codes = linear.grids().codes(&linear.latents);
        let mut same = linear.latents.clone();
        linear.grids().move_to_codes(&mut same, &codes);
        assert_eq!(same, linear.latents, "nothing moves where codes stay");
        for (at, code) in codes.iter_mut().enumerate() {
            *code = (at * 31 % (bits.max_code() as usize + 1)) as u8;
        }
        let mut moved = linear.latents.clone();
        linear.grids().move_to_codes(&mut moved, &codes);
        assert_eq!(linear.grids().codes(&moved), codes);
    }
}

/// Positive and negative f16, all magnitudes, subnormal ones among them.
fn scales() -> impl Strategy<Value = f16> {
    let magnitude = prop_oneof![
        1u16..0x400,      // subnormal
        0x400u16..0x7c00, // normal
        Just(1),
        Just(0x3ff),
        Just(0x400),
        Just(0x7bff), // least and largest of both
    ];
    (magnitude, any::<bool>())
        .prop_map(|(bits, is_negative)| f16::from_bits(bits | if is_negative { 0x8000 } else { 0 }))
}

fn grids() -> impl Strategy<Value = (Bits, f16, u8, u8)> {
    (prop::sample::select(&Bits::ALL[..]), scales()).prop_flat_map(|(bits, scale)| {
        let max = bits.max_code() as u8;
        let code = prop_oneof![Just(0), Just(max), 0..=max];
        (Just(bits), Just(scale), 0..=max, code)
    })
}

/// What `nearest_latent` promises: the code, and no nearer number that has it.
fn check<R: Real + Into<f64>>(latent: R, code: u8, scale: f16, zero: u8, bits: Bits) {
    let (scale, zero) = (R::from(scale.to_f32()), R::from(f32::from(zero)));
    let max_code = R::of(f64::from(bits.max_code()));
    let code_of = |latent: R| (rounded(latent / scale, zero, max_code).0 + zero).to_code();
    let moved = nearest_latent(latent, code, scale, zero, bits);
    assert_eq!(code_of(moved), code, "{latent:?} moved to {moved:?}");
    if code_of(latent) == code {
        assert_eq!(moved, latent);
        return;
    }
    let nearer = if moved < latent {
        moved.next_up()
    } else {
        moved.next_down()
    };
    assert_ne!(
        code_of(nearer),
        code,
        "{nearer:?} is nearer to {latent:?} than {moved:?}"
    );
    // And it is at the border: half a step from the weight.
    let steps: f64 = (moved / scale).into() - f64::from(code) + zero.into();
    assert!((steps.abs() - 0.5).abs() < 1e-4, "{steps}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20_000))]

    #[test]
    fn a_moved_latent_rounds_to_its_code_and_is_the_nearest(
        (bits, scale, zero, code) in grids(),
        steps in prop_oneof![-300.0f32..300.0, -2.0f32..2.0, Just(f32::INFINITY), Just(-1e30f32)],
        is_half in any::<bool>(),
    ) {
        let steps = if is_half { (steps * 2.0).round() / 2.0 } else { steps };
        check(steps * scale.to_f32(), code, scale, zero, bits);
        check(f64::from(steps) * f64::from(scale.to_f32()), code, scale, zero, bits);
    }
}

/// A scale that overflowed has no borders to look for.
#[test]
#[should_panic = "no number rounds to code 3 with scale inf"]
fn a_code_that_nothing_rounds_to_is_named() {
    nearest_latent(0.5f32, 3, f32::INFINITY, 8.0, Bits::Four);
}
