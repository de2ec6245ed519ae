//! The language-model head: logits, likelihoods, and divergence from another model.

use std::sync::Arc;

use gptq_kernels::{exp, exp_sum, multiply_transposed, soft_cap, vectorized};
use rayon::prelude::*;

use crate::ModelError;
#[cfg(feature = "cuda")]
use crate::device_rows::DeviceRows;

/// Rows scored together, and head rows multiplied at a time: a tile of logits takes 4 MB.
const ROWS: usize = 128;
const VOCAB_TILE: usize = 8192;

/// Final hidden states and the head they go through.
pub struct HeadInput(Place);

/// Where the states are, and the head that scores them.
enum Place {
    Host(HeadRows),
    #[cfg(feature = "cuda")]
    Device(DeviceRows),
}

/// Normed states in host memory, which threads share.
pub(crate) struct HeadRows {
    pub normed: Vec<f32>,    // [tokens, width]
    pub head: Arc<Vec<f32>>, // [vocab, width]
    pub width: usize,
    pub soft_cap: Option<f32>,
}

/// The score of one next-token prediction.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct TokenScore {
    /// `-ln p(target)`, nats.
    pub nll: f64,
    /// `sum p ln(p/q)` in nats, `p` the reference; 0 without one.
    pub kl: f64,
    /// Whether the likeliest token is the reference's; true without one.
    pub top1_agrees: bool,
}

impl HeadInput {
    /// States `normed [tokens, width]` before a head `[vocab, width]`, both row-major, that did not
    /// come from a [`crate::Decoder`] of this crate; scored on the processor.
    pub fn on_host(normed: Vec<f32>, head: Arc<Vec<f32>>, width: usize) -> Self {
        HeadInput::of(HeadRows {
            normed,
            head,
            width,
            soft_cap: None,
        })
    }

    pub(crate) fn of(rows: HeadRows) -> Self {
        HeadInput(Place::Host(rows))
    }

    #[cfg(feature = "cuda")]
    pub(crate) fn of_device(rows: DeviceRows) -> Self {
        HeadInput(Place::Device(rows))
    }

    /// Moved to host memory, for later comparisons.
    pub fn kept(self) -> Result<Self, ModelError> {
        match self.0 {
            #[cfg(feature = "cuda")]
            Place::Device(rows) => Ok(HeadInput::of_device(rows.kept()?)),
            Place::Host(rows) => Ok(HeadInput::of(rows)),
        }
    }

    /// Tokens of the batch.
    pub fn tokens(&self) -> usize {
        match &self.0 {
            Place::Host(rows) => rows.tokens(),
            #[cfg(feature = "cuda")]
            Place::Device(rows) => rows.tokens(),
        }
    }

    /// Logits `[tokens, vocab]` row-major, for short inputs; always on the processor, in f32.
    pub fn logits(&self) -> Result<Vec<f32>, ModelError> {
        self.on_processor(HeadRows::logits)
    }

    /// The likeliest next token of each of `rows`, of equals the one with the least id; always on
    /// the processor, in f32. A task asks for few rows, so that a GPU would save little.
    pub fn likeliest(&self, rows: &[usize]) -> Result<Vec<u32>, ModelError> {
        self.on_processor(|host| host.likeliest(rows))?
            .ok_or(ModelError::LogitsNotFinite)
    }

    fn on_processor<T>(&self, work: impl FnOnce(&HeadRows) -> T) -> Result<T, ModelError> {
        match &self.0 {
            Place::Host(rows) => Ok(work(rows)),
            #[cfg(feature = "cuda")]
            Place::Device(rows) => Ok(work(&rows.to_processor()?)),
        }
    }

    /// Scores row `row` of the batch for the token that follows it, for all `(row, target)`.
    /// `reference` holds the same rows of another model with the same vocabulary.
    ///
    /// # Panics
    /// If one was computed on a GPU and the other was not.
    pub fn score(
        &self,
        targets: &[(usize, u32)],
        reference: Option<&HeadInput>,
    ) -> Result<Vec<TokenScore>, ModelError> {
        match &self.0 {
            Place::Host(rows) => {
                let reference = reference.map(|other| match &other.0 {
                    Place::Host(rows) => rows,
                    #[cfg(feature = "cuda")]
                    Place::Device(_) => panic!("states of one device are compared"),
                });
                Ok(rows.score(targets, reference))
            }
            #[cfg(feature = "cuda")]
            Place::Device(rows) => {
                let reference = reference.map(|other| match &other.0 {
                    Place::Device(rows) => rows,
                    Place::Host(_) => panic!("states of one device are compared"),
                });
                Ok(rows.score(targets, reference)?)
            }
        }
    }
}

impl HeadRows {
    fn tokens(&self) -> usize {
        self.normed.len() / self.width
    }

    fn vocab(&self) -> usize {
        self.head.len() / self.width
    }

    fn logits(&self) -> Vec<f32> {
        let (rows, vocab) = (self.tokens(), self.vocab());
        let mut out = vec![0.0; rows * vocab];
        multiply_transposed(&mut out, &self.normed, &self.head, rows, self.width, vocab);
        if let Some(cap) = self.soft_cap {
            soft_cap(&mut out, cap);
        }
        out
    }

    /// Nothing where a logit is not finite: then none is the largest.
    fn likeliest(&self, rows: &[usize]) -> Option<Vec<u32>> {
        let rows: Vec<(usize, u32)> = rows.iter().map(|&row| (row, 0)).collect();
        (rows.par_chunks(ROWS))
            .flat_map_iter(|rows| self.run(rows, None))
            .map(|running| (running.q.log().is_finite()).then_some(running.q.argmax as u32))
            .collect()
    }

    fn score(&self, targets: &[(usize, u32)], reference: Option<&HeadRows>) -> Vec<TokenScore> {
        targets
            .par_chunks(ROWS)
            .flat_map_iter(|targets| self.run(targets, reference))
            .map(|running| running.finish())
            .collect()
    }

    /// The whole vocabulary, tile by tile.
    fn run(&self, targets: &[(usize, u32)], reference: Option<&HeadRows>) -> Vec<Running> {
        let mut running = vec![Running::default(); targets.len()];
        let own = self.gather(targets);
        let other = reference.map(|reference| reference.gather(targets));
        let vocab = self.vocab();
        let (mut q, mut p) = (Vec::new(), Vec::new());
        for first in (0..vocab).step_by(VOCAB_TILE) {
            let count = VOCAB_TILE.min(vocab - first);
            self.tile(&own, first, count, &mut q);
            if let (Some(reference), Some(other)) = (reference, &other) {
                reference.tile(other, first, count, &mut p);
            }
            for (row, (running, &(_, target))) in running.iter_mut().zip(targets).enumerate() {
                let q = &q[row * count..(row + 1) * count];
                let p = p.get(row * count..(row + 1) * count);
                vectorized(|| running.add(q, p, first));
                if let Some(at) = (target as usize)
                    .checked_sub(first)
                    .filter(|&at| at < count)
                {
                    running.target = q[at];
                }
            }
        }
        running
    }

    fn gather(&self, targets: &[(usize, u32)]) -> Vec<f32> {
        (targets.iter())
            .flat_map(|&(row, _)| &self.normed[row * self.width..(row + 1) * self.width])
            .copied()
            .collect()
    }

    /// Logits of `rows` for the tokens `first..first + count`.
    fn tile(&self, rows: &[f32], first: usize, count: usize, out: &mut Vec<f32>) {
        let m = rows.len() / self.width;
        out.resize(m * count, 0.0);
        let head = &self.head[first * self.width..(first + count) * self.width];
        multiply_transposed(out, rows, head, m, self.width, count);
        if let Some(cap) = self.soft_cap {
            soft_cap(out, cap);
        }
    }
}

/// Log-sum-exps of both models over the part of the vocabulary seen so far, each relative to its
/// own running maximum, and `sum e^p (p - q)` on the reference's scale.
#[derive(Clone)]
struct Running {
    q: Partition,
    p: Partition,
    difference: f64,
    target: f32,
    with_reference: bool,
}

#[derive(Clone, Copy)]
struct Partition {
    max: f32,
    argmax: usize,
    sum: f64,
}

impl Default for Running {
    fn default() -> Self {
        let empty = Partition {
            max: f32::NEG_INFINITY,
            argmax: 0,
            sum: 0.0,
        };
        Running {
            q: empty,
            p: empty,
            difference: 0.0,
            target: f32::NAN,
            with_reference: false,
        }
    }
}

impl Partition {
    /// Takes a tile in; returns by how much earlier sums shrank.
    #[inline(always)]
    fn add(&mut self, logits: &[f32], first: usize) -> f64 {
        let mut shrink = 1.0;
        let tile_max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        if tile_max > self.max {
            shrink = f64::from(self.max - tile_max).exp();
            self.max = tile_max;
            let at = logits.iter().position(|&x| x == tile_max).unwrap_or(0);
            self.argmax = first + at;
        }
        self.sum = self.sum * shrink + f64::from(exp_sum(logits, self.max));
        shrink
    }

    fn log(&self) -> f64 {
        f64::from(self.max) + self.sum.ln()
    }
}

impl Running {
    #[inline(always)]
    fn add(&mut self, q: &[f32], p: Option<&[f32]>, first: usize) {
        self.q.add(q, first);
        let Some(p) = p else { return };
        self.with_reference = true;
        let shrink = self.p.add(p, first);
        let max = self.p.max;
        let mut lanes = [0.0f64; 8];
        for (at, (&p, &q)) in p.iter().zip(q).enumerate() {
            lanes[at % 8] += f64::from(exp(p - max) * (p - q));
        }
        self.difference = self.difference * shrink + lanes.iter().sum::<f64>();
    }

    fn finish(&self) -> TokenScore {
        let nll = self.q.log() - f64::from(self.target);
        if !self.with_reference {
            return TokenScore {
                nll,
                kl: 0.0,
                top1_agrees: true,
            };
        }
        TokenScore {
            nll,
            kl: self.difference / self.p.sum - self.p.log() + self.q.log(),
            top1_agrees: self.p.argmax == self.q.argmax,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn input(seed: f32, vocab: usize) -> HeadRows {
        let width = 6;
        let wave = |len: usize, step: f32| (0..len).map(|i| (i as f32 * step).sin()).collect();
        let head = Arc::new(wave(vocab * width, 0.7));
        HeadRows {
            normed: wave(5 * width, seed),
            head,
            width,
            soft_cap: None,
        }
    }

    /// The last tile holds the largest logit of some rows, an earlier one that of others.
    #[test]
    fn the_likeliest_token_is_that_of_the_whole_row() {
        let vocab = VOCAB_TILE + 77;
        let mut own = input(0.31, vocab);
        let width = own.width;
        let mut head = own.head.to_vec();
        let row = own.normed[2 * width..3 * width].iter().map(|x| 100.0 * x);
        let row: Vec<f32> = row.collect();
        head[(vocab - 3) * width..(vocab - 2) * width].copy_from_slice(&row);
        own.head = Arc::new(head);
        let logits = own.logits();
        let rows = [4, 2, 0];
        let want: Vec<u32> = (rows.iter())
            .map(|&row| {
                let logits = &logits[row * vocab..(row + 1) * vocab];
                let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                logits.iter().position(|&x| x == most).unwrap() as u32
            })
            .collect();
        assert_eq!(own.likeliest(&rows).as_ref(), Some(&want));
        assert_eq!(want[1], (vocab - 3) as u32);
    }

    /// Token 0 was the likeliest of a row of NaN, and counted as a guess.
    #[test]
    fn of_logits_that_are_not_finite_none_is_the_likeliest() {
        for odd in [f32::NAN, f32::INFINITY] {
            let mut own = input(0.31, 20);
            assert!(own.likeliest(&[3]).is_some());
            own.normed[3 * own.width] = odd;
            assert_eq!(own.likeliest(&[3]), None);
            assert!(own.likeliest(&[2]).is_some());
        }
    }

    /// More than one tile, so that sums are carried over.
    #[test]
    fn scores_agree_with_the_definition_over_whole_rows() {
        let vocab = VOCAB_TILE + 77;
        let (own, other) = (input(0.31, vocab), input(0.35, vocab));
        let targets = [(0, 3u32), (4, (vocab - 1) as u32)];
        let scores = own.score(&targets, Some(&other));
        let softmax = |logits: &[f32]| -> Vec<f64> {
            let exps: Vec<f64> = logits.iter().map(|&x| f64::from(x).exp()).collect();
            let sum: f64 = exps.iter().sum();
            exps.iter().map(|e| e / sum).collect()
        };
        let (ql, pl) = (own.logits(), other.logits());
        for (score, &(row, target)) in scores.iter().zip(&targets) {
            let q = softmax(&ql[row * vocab..(row + 1) * vocab]);
            let p = softmax(&pl[row * vocab..(row + 1) * vocab]);
            let kl: f64 = p.iter().zip(&q).map(|(p, q)| p * (p / q).ln()).sum();
            assert!((score.nll + q[target as usize].ln()).abs() < 1e-5);
            assert!((score.kl - kl).abs() < 1e-5, "{} against {kl}", score.kl);
        }
        let alone = own.score(&targets, None);
        assert_eq!(alone[0].nll, scores[0].nll);
        assert!(alone[0].top1_agrees);
    }
}
