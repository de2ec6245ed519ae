//! Numbers that are the same on every machine.

/// SplitMix64 (Steele, Lea, Flood 2014).
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Random(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Nearly normal, standard deviation 1: four 16-bit uniforms, each of variance 1/12.
    pub fn normal(&mut self) -> f32 {
        let word = self.next();
        let sum: u32 = (0..4)
            .map(|part| (word >> (16 * part)) as u32 & 0xffff)
            .sum();
        (sum as f32 / 65_536.0 - 2.0) * 3.0f32.sqrt()
    }
}
