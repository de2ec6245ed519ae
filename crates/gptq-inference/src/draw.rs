//! Random draws of tokens.

/// A random stream (SplitMix64, Steele et al. 2014).
pub struct Draw(u64);

impl Draw {
    /// The stream of a seed for one window.
    pub fn new(seed: u64, window: u64) -> Self {
        let mut draw = Draw(seed ^ window.wrapping_mul(0xD1B5_4A32_D192_ED03));
        draw.next();
        draw
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// In `[0, 1)`, 53 bits.
    pub fn uniform(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// A token by its probability.
    pub fn token(&mut self, logits: &[f32], temperature: f32) -> u32 {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let weight = |&logit: &f32| f64::from((logit - max) / temperature).exp();
        let total: f64 = logits.iter().map(weight).sum();
        let mut left = self.uniform() * total;
        for (token, logit) in logits.iter().enumerate() {
            left -= weight(logit);
            if left < 0.0 {
                return token as u32;
            }
        }
        (logits.len() - 1) as u32
    }
}
