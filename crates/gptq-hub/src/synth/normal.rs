//! Normal numbers in half precision as fast as memory takes them.
//!
//! A weight is one of the 65536 quantiles of the normal distribution, chosen by 16 random bits: a
//! table look-up in place of logarithms and roots, and no weight beyond 4.4 deviations.
//!
//! Word `k` of a tensor is a function of seed, name and `k` alone (SplitMix64 by its counter), so
//! parts are made in any order by any number of threads.

use crate::HalfType;

/// Weights that one random word gives.
const PER_WORD: usize = 4;

/// Step of SplitMix64: 2^64 over the golden ratio.
const STEP: u64 = 0x9E37_79B9_7F4A_7C15;

/// Normal numbers around 0.
pub(super) struct Normal {
    /// Bit patterns of all quantiles `(i + 1/2) / 65536`.
    quantiles: Box<[u16; 1 << 16]>,
}

impl Normal {
    pub(super) fn new(deviation: f64, dtype: HalfType) -> Self {
        let mut quantiles = Box::new([0; 1 << 16]);
        for (index, bits) in quantiles.iter_mut().enumerate() {
            let share = (index as f64 + 0.5) / 65536.0;
            *bits = dtype.bits(quantile(share) * deviation);
        }
        Normal { quantiles }
    }

    /// Elements from number `start` of the tensor on; `start` is a multiple of four.
    pub(super) fn fill(&self, stream: Stream, start: usize, elements: &mut [u16]) {
        debug_assert_eq!(start % PER_WORD, 0);
        let first = (start / PER_WORD) as u64;
        for (number, quad) in (first..).zip(elements.chunks_mut(PER_WORD)) {
            let word = stream.word(number);
            for (index, element) in quad.iter_mut().enumerate() {
                *element = self.quantiles[usize::from((word >> (16 * index)) as u16)];
            }
        }
    }
}

/// The random words of one tensor.
#[derive(Clone, Copy)]
pub(super) struct Stream(u64);

impl Stream {
    pub(super) fn new(seed: u64, name: &str) -> Self {
        Stream(mix(mix(seed) ^ fnv(name)))
    }

    /// Word number `number`.
    pub(super) fn word(self, number: u64) -> u64 {
        mix(self.0.wrapping_add(STEP.wrapping_mul(number)))
    }

    /// Word number `number` as a number below `limit`.
    pub(super) fn below(self, number: u64, limit: u32) -> u32 {
        ((u128::from(self.word(number)) * u128::from(limit)) >> 64) as u32
    }
}

/// SplitMix64's output function (Steele, Lea and Flood 2014).
fn mix(word: u64) -> u64 {
    let word = word.wrapping_add(STEP);
    let word = (word ^ (word >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    word ^ (word >> 31)
}

/// FNV-1a.
fn fnv(text: &str) -> u64 {
    text.bytes().fold(0xCBF2_9CE4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01B3)
    })
}

/// The normal quantile of `share`, to seven digits: Wichura's AS 241, PPND7. Its third branch, for
/// shares below 1e-11, is beyond any table here.
fn quantile(share: f64) -> f64 {
    let centred = share - 0.5;
    if centred.abs() <= 0.425 {
        let r = 0.180625 - centred * centred;
        let above = ((59.109374720 * r + 159.29113202) * r + 50.434271938) * r + 3.3871327179;
        let below = ((67.187563600 * r + 78.757757664) * r + 17.895169469) * r + 1.0;
        return centred * above / below;
    }
    let r = (-share.min(1.0 - share).ln()).sqrt() - 1.6;
    let above = ((0.17023821103 * r + 1.3067284816) * r + 2.7568153900) * r + 1.4234372777;
    let below = (0.12021132975 * r + 0.73700164250) * r + 1.0;
    (above / below).copysign(centred)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_those_of_the_tables() {
        for (share, expected) in [
            (0.5, 0.0),
            (0.9, 1.281551566),
            (0.95, 1.644853627),
            (0.975, 1.959963985),
            (0.999, 3.090232306),
            (0.99999, 4.264890794),
        ] {
            // seven digits
            assert!((quantile(share) - expected).abs() < 1e-6, "{share}");
            assert!((quantile(1.0 - share) + expected).abs() < 1e-6, "{share}");
        }
    }

    #[test]
    fn any_part_is_the_same_as_in_the_whole() {
        let normal = Normal::new(1.0, HalfType::F16);
        let stream = Stream::new(7, "a");
        let mut whole = [0; 103];
        normal.fill(stream, 0, &mut whole);
        let mut part = [0; 51];
        normal.fill(stream, 52, &mut part);
        assert_eq!(whole[52..], part);
        let mut other = [0; 103];
        normal.fill(Stream::new(7, "b"), 0, &mut other);
        assert_ne!(whole, other);
        normal.fill(Stream::new(8, "a"), 0, &mut other);
        assert_ne!(whole, other);
    }

    #[test]
    fn words_are_those_of_splitmix64() {
        // the published sequence of seed 0
        let words = [0, 1, 2].map(|number| Stream(0).word(number));
        assert_eq!(
            words,
            [
                0xE220_A839_7B1D_CDAF,
                0x6E78_9E6A_A1B9_65F4,
                0x06C4_5D18_8009_454F
            ]
        );
        assert!((0..1000).all(|number| Stream(0).below(number, 5) < 5));
    }
}
