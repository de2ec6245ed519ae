//! A token from logits, as `transformers.generation.logits_process` defines the settings.

use crate::draw::Draw;

/// Candidates that top-p looks at first; four times as many until they hold the mass.
const FIRST_CANDIDATES: usize = 256;

/// Sampling settings, applied in the order of the fields.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Logits of tokens that occurred, in the prompt too, are divided by it where positive and
    /// multiplied where negative (Keskar et al. 2019, section 4.1); 1 changes nothing.
    pub repetition_penalty: f32,
    /// Divides the logits; 0 takes the likeliest token and draws nothing.
    pub temperature: f32,
    /// Only so many likeliest tokens remain, and those as likely as the last of them; 0 keeps all.
    pub top_k: usize,
    /// Nucleus sampling: only the likeliest tokens that together reach this probability (Holtzman et al. 2020);
    /// 1 keeps all.
    pub top_p: f32,
    /// Seed of the random stream.
    pub seed: u64,
}

impl Default for Sampling {
    /// The likeliest token.
    fn default() -> Self {
        Sampling {
            repetition_penalty: 1.0,
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            seed: 0,
        }
    }
}

/// A setting outside its range.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{setting} {value} is not {expected}")]
pub struct SamplingError {
    setting: &'static str,
    value: f32,
    expected: &'static str,
}

impl Sampling {
    /// Refuses values outside their range.
    pub fn validate(&self) -> Result<(), SamplingError> {
        let within = |ok: bool, setting, value, expected| match ok {
            true => Ok(()),
            false => Err(SamplingError {
                setting,
                value,
                expected,
            }),
        };
        let (t, p, penalty) = (self.temperature, self.top_p, self.repetition_penalty);
        within(t >= 0.0 && t.is_finite(), "temperature", t, "0 or more")?;
        within(p > 0.0 && p <= 1.0, "top-p", p, "above 0 and at most 1")?;
        let ok = penalty > 0.0 && penalty.is_finite();
        within(ok, "repetition penalty", penalty, "above 0")
    }
}

/// A random stream, and which tokens occurred.
pub(super) struct Sampler {
    sampling: Sampling,
    draw: Draw,
    seen: Vec<bool>, // [vocab]
}

impl Sampler {
    pub fn new(sampling: Sampling, vocab: usize) -> Self {
        Sampler {
            draw: Draw::new(sampling.seed, 0),
            sampling,
            seen: vec![false; vocab],
        }
    }

    /// Tokens that the repetition penalty counts.
    pub fn note(&mut self, tokens: &[u32]) {
        for &token in tokens {
            self.seen[token as usize] = true;
        }
    }

    pub fn forget(&mut self) {
        self.seen.fill(false);
    }

    /// The next token; nothing where no logit is finite.
    pub fn pick(&mut self, logits: &[f32]) -> Option<u32> {
        let mut logits = logits.to_vec();
        self.penalize(&mut logits);
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        if !max.is_finite() {
            return None;
        }
        if self.sampling.temperature == 0.0 {
            return logits.iter().position(|&x| x == max).map(|at| at as u32);
        }
        let temperature = f64::from(self.sampling.temperature);
        let weight = |logit: f32| (f64::from(logit - max) / temperature).exp();
        let mut tokens: Vec<(f64, u32)> = (logits.iter().zip(0..))
            .map(|(&logit, token)| (weight(logit), token))
            .filter(|(weight, _)| *weight > 0.0)
            .collect();
        keep_top_k(&mut tokens, self.sampling.top_k);
        keep_top_p(&mut tokens, f64::from(self.sampling.top_p));
        Some(self.draw_one(&tokens))
    }

    fn penalize(&self, logits: &mut [f32]) {
        let penalty = self.sampling.repetition_penalty;
        if penalty == 1.0 {
            return;
        }
        let seen = self.seen.iter().zip(logits).filter(|(seen, _)| **seen);
        for (_, logit) in seen {
            *logit = match *logit < 0.0 {
                true => *logit * penalty,
                false => *logit / penalty,
            };
        }
    }

    fn draw_one(&mut self, tokens: &[(f64, u32)]) -> u32 {
        let total: f64 = tokens.iter().map(|(weight, _)| weight).sum();
        let mut left = self.draw.uniform() * total;
        for &(weight, token) in tokens {
            left -= weight;
            if left < 0.0 {
                return token;
            }
        }
        tokens.last().expect("the likeliest token is kept").1
    }
}

/// Likeliest first, equals by their ids: one order on every machine.
fn likelier(a: &(f64, u32), b: &(f64, u32)) -> std::cmp::Ordering {
    b.0.total_cmp(&a.0).then(a.1.cmp(&b.1))
}

fn keep_top_k(tokens: &mut Vec<(f64, u32)>, k: usize) {
    if k == 0 || k >= tokens.len() {
        return;
    }
    let (_, &mut (least, _), _) = tokens.select_nth_unstable_by(k - 1, likelier);
    tokens.retain(|(weight, _)| *weight >= least);
    tokens.sort_unstable_by(likelier);
}

/// Keeps a token while those likelier than it hold less than `p` of the mass.
fn keep_top_p(tokens: &mut Vec<(f64, u32)>, p: f64) {
    if p >= 1.0 {
        return;
    }
    let total: f64 = tokens.iter().map(|(weight, _)| weight).sum();
    let mut first = FIRST_CANDIDATES;
    loop {
        let count = first.min(tokens.len());
        if count < tokens.len() {
            tokens.select_nth_unstable_by(count - 1, likelier);
        }
        tokens[..count].sort_unstable_by(likelier);
        let mut before = 0.0;
        let kept = tokens[..count].iter().position(|(weight, _)| {
            let done = before >= p * total;
            before += weight;
            done
        });
        if let Some(kept) = kept {
            // The likeliest always stays.
            return tokens.truncate(kept.max(1));
        }
        if count == tokens.len() {
            return;
        }
        first *= 4;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shares(sampling: Sampling, logits: &[f32], seen: &[u32]) -> Vec<f64> {
        let mut sampler = Sampler::new(sampling, logits.len());
        sampler.note(seen);
        let draws = 20_000;
        let mut counts = vec![0usize; logits.len()];
        for _ in 0..draws {
            counts[sampler.pick(logits).unwrap() as usize] += 1;
        }
        counts.iter().map(|&n| n as f64 / draws as f64).collect()
    }

    #[track_caller]
    fn near(got: &[f64], want: &[f64]) {
        for (got, want) in got.iter().zip(want) {
            // Four standard deviations of 20,000 draws.
            assert!((got - want).abs() < 0.015, "{got} against {want}");
            assert!(*want > 0.0 || *got == 0.0, "{got} against none");
        }
    }

    /// Probabilities 1/2, 1/4, 1/8, 1/8.
    fn halves() -> Vec<f32> {
        [0.125f32, 0.5, 0.125, 0.25].map(f32::ln).to_vec()
    }

    fn warm() -> Sampling {
        Sampling {
            temperature: 1.0,
            ..Sampling::default()
        }
    }

    #[test]
    fn tokens_come_by_their_probabilities() {
        near(&shares(warm(), &halves(), &[]), &[0.125, 0.5, 0.125, 0.25]);
        let sharp = Sampling {
            temperature: 0.5,
            ..warm()
        };
        // Squares: 1, 16, 1, 4 of 22.
        let want = [1.0 / 22.0, 16.0 / 22.0, 1.0 / 22.0, 4.0 / 22.0];
        near(&shares(sharp, &halves(), &[]), &want);
    }

    #[test]
    fn top_k_and_top_p_cut_the_tail() {
        let two = Sampling { top_k: 2, ..warm() };
        near(
            &shares(two, &halves(), &[]),
            &[0.0, 2.0 / 3.0, 0.0, 1.0 / 3.0],
        );
        // The third likeliest is one of two equals: both stay, as in the reference.
        let three = Sampling { top_k: 3, ..warm() };
        near(&shares(three, &halves(), &[]), &[0.125, 0.5, 0.125, 0.25]);
        // 1/2 is reached by the first alone; a little more needs the second.
        let half = Sampling {
            top_p: 0.5,
            ..warm()
        };
        near(&shares(half, &halves(), &[]), &[0.0, 1.0, 0.0, 0.0]);
        let more = Sampling {
            top_p: 0.51,
            ..warm()
        };
        near(
            &shares(more, &halves(), &[]),
            &[0.0, 2.0 / 3.0, 0.0, 1.0 / 3.0],
        );
        let least = Sampling {
            top_p: 1e-6,
            ..warm()
        };
        near(&shares(least, &halves(), &[]), &[0.0, 1.0, 0.0, 0.0]);
    }

    /// More equal tokens than are looked at first.
    #[test]
    fn top_p_of_a_flat_distribution_goes_on_until_the_mass_is_there() {
        let logits = vec![0.0f32; 2000];
        let mut tokens: Vec<(f64, u32)> = logits.iter().zip(0..).map(|(_, t)| (1.0, t)).collect();
        keep_top_p(&mut tokens, 0.75);
        assert_eq!(tokens.len(), 1500);
        assert_eq!(tokens.last().unwrap().1, 1499);
    }

    #[test]
    fn the_penalty_divides_positive_and_multiplies_negative_logits() {
        let greedy = |penalty, seen: &[u32]| {
            let sampling = Sampling {
                repetition_penalty: penalty,
                ..Sampling::default()
            };
            let mut sampler = Sampler::new(sampling, 3);
            sampler.note(seen);
            sampler.pick(&[2.0, 1.5, -1.0]).unwrap()
        };
        assert_eq!(greedy(1.0, &[0]), 0);
        // 2 / 1.3 is still above 1.5, 2 / 1.4 is not; a token counts once.
        assert_eq!(greedy(1.3, &[0, 0, 0]), 0);
        assert_eq!(greedy(1.4, &[0]), 1);
        let mut sampler = Sampler::new(
            Sampling {
                repetition_penalty: 2.0,
                ..Sampling::default()
            },
            2,
        );
        sampler.note(&[0]);
        assert_eq!(sampler.pick(&[-1.0, -1.9]).unwrap(), 1);
        sampler.forget();
        assert_eq!(sampler.pick(&[-1.0, -1.9]).unwrap(), 0);
    }

    #[test]
    fn one_seed_gives_one_stream_and_another_another() {
        let run = |seed| {
            let mut sampler = Sampler::new(Sampling { seed, ..warm() }, 4);
            (0..50)
                .map(|_| sampler.pick(&halves()).unwrap())
                .collect::<Vec<_>>()
        };
        assert_eq!(run(3), run(3));
        assert_ne!(run(3), run(4));
    }

    #[test]
    fn nothing_is_picked_where_no_logit_is_finite() {
        let mut sampler = Sampler::new(warm(), 2);
        assert_eq!(sampler.pick(&[f32::NAN, f32::NEG_INFINITY]), None);
        assert_eq!(sampler.pick(&[f32::NAN, 1.0]), Some(1));
    }

    #[test]
    fn settings_outside_their_range_are_named() {
        let refused = |change: fn(&mut Sampling)| {
            let mut sampling = warm();
            change(&mut sampling);
            sampling.validate().unwrap_err().to_string()
        };
        assert_eq!(
            refused(|s| s.temperature = -1.0),
            "temperature -1 is not 0 or more"
        );
        assert_eq!(
            refused(|s| s.top_p = 0.0),
            "top-p 0 is not above 0 and at most 1"
        );
        assert_eq!(
            refused(|s| s.repetition_penalty = f32::NAN),
            "repetition penalty NaN is not above 0"
        );
        assert_eq!(warm().validate(), Ok(()));
    }
}
