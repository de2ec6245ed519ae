//! CPython's `random`: MT19937, seeded as `random.seed(int)` does.
//!
//! A general generator crate would draw other windows than the papers did: Python seeds through
//! `init_by_array` and rejects instead of multiplying, and both decide every start.

const N: usize = 624;
const M: usize = 397;
const UPPER_BIT: u32 = 0x8000_0000;
const LOWER_BITS: u32 = 0x7fff_ffff;
const MATRIX_A: u32 = 0x9908_b0df;

/// The stream of `random.Random(seed)` of CPython 3 (`Modules/_randommodule.c`, `Lib/random.py`).
///
/// ```
/// let mut random = gptq_calibration::PythonRandom::new(0);
/// // >>> random.seed(0); random.randint(0, 99)
/// assert_eq!(random.below(100), 49);
/// ```
#[derive(Clone)]
pub struct PythonRandom {
    state: [u32; N],
    next: usize,
}

impl PythonRandom {
    /// `random.seed(seed)` for a non-negative integer of at most 64 bits.
    pub fn new(seed: u64) -> Self {
        let (low, high) = (seed as u32, (seed >> 32) as u32);
        let key = [low, high];
        // CPython cuts the key after the highest word that is not zero, and keeps at least one
        Self::from_key(if high == 0 { &key[..1] } else { &key })
    }

    /// `init_by_array` of the reference implementation (Matsumoto and Nishimura 2002).
    fn from_key(key: &[u32]) -> Self {
        let mut state = knuth_state(19_650_218);
        let mut i = 1;
        for step in 0..N.max(key.len()) {
            let j = step % key.len();
            let mixed = (state[i - 1] ^ (state[i - 1] >> 30)).wrapping_mul(1_664_525);
            state[i] = (state[i] ^ mixed)
                .wrapping_add(key[j])
                .wrapping_add(j as u32);
            i = following(&mut state, i);
        }
        for _ in 0..N - 1 {
            let mixed = (state[i - 1] ^ (state[i - 1] >> 30)).wrapping_mul(1_566_083_941);
            state[i] = (state[i] ^ mixed).wrapping_sub(i as u32);
            i = following(&mut state, i);
        }
        state[0] = UPPER_BIT;
        Self { state, next: N }
    }

    /// `random.getrandbits(32)`.
    pub fn next_u32(&mut self) -> u32 {
        if self.next == N {
            self.twist();
        }
        let mut y = self.state[self.next];
        self.next += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    /// `random.randint(0, width - 1)`, evenly in `0..width`; 0 without a draw when `width` is 0.
    pub fn below(&mut self, width: u64) -> u64 {
        if width == 0 {
            return 0;
        }
        // `width.bit_length()`, not that of `width - 1`: a width of 1 also costs draws
        let bits = u64::BITS - width.leading_zeros();
        loop {
            let drawn = self.bits(bits);
            if drawn < width {
                return drawn;
            }
        }
    }

    /// `random.getrandbits(bits)` for 1 to 64 bits: low word first, the last one cut at its top.
    fn bits(&mut self, bits: u32) -> u64 {
        if bits <= 32 {
            return u64::from(self.next_u32() >> (32 - bits));
        }
        let low = u64::from(self.next_u32());
        let high = u64::from(self.next_u32() >> (64 - bits));
        high << 32 | low
    }

    fn twist(&mut self) {
        for i in 0..N {
            let y = (self.state[i] & UPPER_BIT) | (self.state[(i + 1) % N] & LOWER_BITS);
            let odd = if y & 1 == 1 { MATRIX_A } else { 0 };
            self.state[i] = self.state[(i + M) % N] ^ (y >> 1) ^ odd;
        }
        self.next = 0;
    }
}

fn knuth_state(seed: u32) -> [u32; N] {
    let mut state = [seed; N];
    for i in 1..N {
        let previous = state[i - 1];
        state[i] = (previous ^ (previous >> 30))
            .wrapping_mul(1_812_433_253)
            .wrapping_add(i as u32);
    }
    state
}

fn following(state: &mut [u32; N], i: usize) -> usize {
    if i + 1 < N {
        return i + 1;
    }
    state[0] = state[N - 1];
    1
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `random.seed(seed); [random.getrandbits(32) for _ in range(5)]` of CPython 3.11.
    #[test]
    fn words_are_those_of_cpython_for_one_and_two_word_seeds() {
        let goldens: [(u64, [u32; 5]); 7] = [
            (
                0,
                [3626764237, 1654615998, 3255389356, 3823568514, 1806341205],
            ),
            (
                1,
                [577090037, 2444712010, 3639700191, 3445702192, 3280387012],
            ),
            (
                42,
                [2746317213, 478163327, 107420369, 3184935163, 1181241943],
            ),
            (
                u64::from(u32::MAX),
                [2728839433, 2661025012, 872737089, 924893097, 2608619700],
            ),
            (
                1 << 32,
                [485306839, 1508871100, 1794561286, 4014597330, 71624475],
            ),
            (
                (1 << 40) + 7,
                [2635837658, 3209733218, 3500038837, 4028389051, 4058793509],
            ),
            (
                u64::MAX,
                [93740670, 1068495656, 1452108352, 2657516307, 910393425],
            ),
        ];
        for (seed, words) in goldens {
            let mut random = PythonRandom::new(seed);
            assert_eq!(words.map(|_| random.next_u32()), words, "seed {seed}");
        }
    }

    /// Words 620 to 629 after `random.seed(0)`: the state is renewed between 623 and 624.
    #[test]
    fn words_go_on_after_the_state_is_used_up() {
        let mut random = PythonRandom::new(0);
        let words: Vec<u32> = (0..630).map(|_| random.next_u32()).collect();
        let golden = [
            33719836, 421235423, 1691392275, 2390040247, 2229104038, 1244770883, 1926483037,
            3952025686, 2098601769, 3385674489,
        ];
        assert_eq!(words[620..], golden);
    }

    /// `[random.randint(0, high) for high in highs]` of CPython 3.11.
    #[test]
    fn randint_is_that_of_cpython_for_every_width() {
        let highs: [u64; 12] = [
            0,
            1,
            2,
            9,
            99,
            1 << 31,
            (1 << 32) - 1,
            1 << 32,
            1 << 40,
            1 << 63,
            339420,
            7,
        ];
        let goldens: [(u64, [u64; 12]); 3] = [
            (
                0,
                [
                    0,
                    1,
                    0,
                    4,
                    65,
                    2087043557,
                    2046968324,
                    3900315155,
                    307110291574,
                    2577854692418029171,
                    49718,
                    4,
                ],
            ),
            (
                42,
                [
                    0,
                    0,
                    2,
                    4,
                    31,
                    958682846,
                    2342331444,
                    2536146025,
                    64561015027,
                    4033158781666617690,
                    121981,
                    0,
                ],
            ),
            (
                (1 << 40) + 7,
                [
                    0,
                    1,
                    2,
                    2,
                    66,
                    1611772094,
                    1559734921,
                    1902582600,
                    495520441769,
                    3317005190873792410,
                    71959,
                    2,
                ],
            ),
        ];
        for (seed, golden) in goldens {
            let mut random = PythonRandom::new(seed);
            assert_eq!(
                highs.map(|high| random.below(high + 1)),
                golden,
                "seed {seed}"
            );
        }
        assert_eq!(PythonRandom::new(0).below(0), 0);
    }
}
