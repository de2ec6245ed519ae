//! Logits of given tokens: what a checkpoint must say, whoever runs it.

use gptq_model::{Decoder, ModelError};

/// Logits `[ids.len(), vocab_size]` row-major of one sequence.
pub fn logits(decoder: &mut dyn Decoder, ids: &[u32]) -> Result<Vec<f32>, ModelError> {
    decoder.embed(&[ids.to_vec()])?;
    for index in 0..decoder.spec().blocks.len() {
        decoder.load_block(index)?;
        decoder.forward_block()?;
    }
    decoder.head_input(0)?.logits()
}

/// Two sets of logits side by side.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LogitComparison {
    /// Largest absolute difference; infinite where one side is not finite.
    pub max_difference: f32,
    /// Its position: token and vocabulary entry.
    pub at: (usize, usize),
    /// Both values there: got, expected.
    pub values: (f32, f32),
    /// Share of positions with the same likeliest token.
    pub top1_agreement: f64,
    /// Mean over positions of the KL divergence of `expected` from `got`, nats.
    pub kl: f64,
}

/// Compares `got` with `expected`, both `[tokens, vocab]` row-major and equally long.
pub fn compare(got: &[f32], expected: &[f32], vocab: usize) -> LogitComparison {
    let mut worst = LogitComparison {
        max_difference: 0.0,
        at: (0, 0),
        values: (got[0], expected[0]),
        top1_agreement: 0.0,
        kl: 0.0,
    };
    for (index, (&g, &e)) in got.iter().zip(expected).enumerate() {
        let difference = (g - e).abs();
        let difference = if difference.is_nan() {
            f32::INFINITY
        } else {
            difference
        };
        if difference > worst.max_difference {
            worst.max_difference = difference;
            worst.at = (index / vocab, index % vocab);
            worst.values = (g, e);
        }
    }
    let rows = got.len() / vocab;
    let agreeing = got
        .chunks_exact(vocab)
        .zip(expected.chunks_exact(vocab))
        .filter(|(g, e)| argmax(g) == argmax(e))
        .count();
    worst.top1_agreement = agreeing as f64 / rows.max(1) as f64;
    let pairs = got.chunks_exact(vocab).zip(expected.chunks_exact(vocab));
    let kl: f64 = pairs.map(|(got, expected)| divergence(got, expected)).sum();
    worst.kl = gptq_types::kl(kl / rows.max(1) as f64);
    worst
}

/// `sum p ln(p / q)` of one row's softmaxes, `p` the expected one.
fn divergence(got: &[f32], expected: &[f32]) -> f64 {
    let log_sum = |row: &[f32]| {
        let most = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = row.iter().map(|&x| f64::from(x - most).exp()).sum();
        f64::from(most) + sum.ln()
    };
    let (q, p) = (log_sum(got), log_sum(expected));
    let cells = got.iter().zip(expected).map(|(&g, &e)| {
        let log_p = f64::from(e) - p;
        log_p.exp() * (log_p - (f64::from(g) - q))
    });
    cells.sum()
}

fn argmax(row: &[f32]) -> usize {
    let mut best = 0;
    for (index, value) in row.iter().enumerate() {
        if *value > row[best] {
            best = index;
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_difference_is_placed() {
        let found = compare(&[1.0, 2.0, 3.0, 9.0], &[1.0, 2.0, 3.5, 3.0], 2);
        assert_eq!((found.max_difference, found.at), (6.0, (1, 1)));
        assert_eq!(found.values, (9.0, 3.0));
        assert_eq!(found.top1_agreement, 0.5);
        // The first rows are alike; of the second p = softmax(3.5, 3), q = softmax(3, 9).
        let p = 1.0 / (1.0 + (-0.5f64).exp());
        let q = 1.0 / (1.0 + 6.0f64.exp());
        let kl = p * (p / q).ln() + (1.0 - p) * ((1.0 - p) / (1.0 - q)).ln();
        assert!((found.kl - kl / 2.0).abs() < 1e-9, "{}", found.kl);
        let nan = compare(&[f32::NAN, 0.0], &[0.0, 0.0], 2);
        assert!(nan.max_difference.is_infinite());
    }
}
