//! Adam, which moves parameters along their gradients.

use rayon::prelude::*;

use crate::real::Real;
use crate::vector::vectorized;

/// Decay of the mean gradient; Kingma and Ba's.
const FIRST_DECAY: f64 = 0.9;
/// Decay of the mean square: less than Kingma and Ba's 0.999, since a block is trained for few steps.
const SECOND_DECAY: f64 = 0.95;
/// Beside the root of the mean square; Kingma and Ba's.
const EPSILON: f64 = 1e-8;
/// Elements handed to one task.
const CHUNK: usize = 1 << 15;

/// About how far a step moves a parameter of a linear at most.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LearningRates {
    /// Of latents.
    pub latents: f64,
    /// Of scales.
    pub scales: f64,
}

/// Adam with betas 0.9 and 0.95 and epsilon 1e-8, its moments corrected for their start at 0, without weight
/// decay (Kingma and Ba 2015, algorithm 1): the state of one list of parameters.
#[derive(Clone, Debug)]
pub struct Adam<R> {
    /// Decaying mean of gradients.
    mean: Vec<R>,
    /// Decaying mean of their squares.
    square: Vec<R>,
    steps: i32,
}

impl<R: Real> Adam<R> {
    /// Before the first step of `parameters` parameters.
    pub fn new(parameters: usize) -> Self {
        Adam {
            mean: vec![R::ZERO; parameters],
            square: vec![R::ZERO; parameters],
            steps: 0,
        }
    }

    /// Moves `parameters` against `gradient`, both as long as [`Adam::new`] was told; a parameter moves by
    /// at most about `learning_rate`.
    ///
    /// # Panics
    /// If they are not.
    pub fn step(&mut self, parameters: &mut [R], gradient: &[R], learning_rate: f64) {
        let len = self.mean.len();
        assert_eq!((parameters.len(), gradient.len()), (len, len), "parameters");
        self.steps += 1;
        let step = AdamStep::new(learning_rate, self.steps);
        let moments = (self.mean.par_chunks_mut(CHUNK)).zip(self.square.par_chunks_mut(CHUNK));
        (parameters.par_chunks_mut(CHUNK))
            .zip(gradient.par_chunks(CHUNK))
            .zip(moments)
            .for_each(|((parameters, gradient), (mean, square))| {
                vectorized(|| step.take(parameters, gradient, mean, square));
            });
    }
}

/// The numbers of one step.
pub(crate) struct AdamStep<R> {
    pub decays: [R; 2],
    pub shares: [R; 2],
    pub rate: R,
    pub correction: R, // of the root of the mean square
    pub epsilon: R,
}

impl<R: Real> AdamStep<R> {
    /// Of step `number`, counted from 1.
    pub fn new(learning_rate: f64, number: i32) -> Self {
        AdamStep {
            decays: [FIRST_DECAY, SECOND_DECAY].map(R::of),
            shares: [1.0 - FIRST_DECAY, 1.0 - SECOND_DECAY].map(R::of),
            rate: R::of(learning_rate / (1.0 - FIRST_DECAY.powi(number))),
            correction: R::of(1.0 / (1.0 - SECOND_DECAY.powi(number)).sqrt()),
            epsilon: R::of(EPSILON),
        }
    }

    #[inline(always)]
    fn take(&self, parameters: &mut [R], gradient: &[R], mean: &mut [R], square: &mut [R]) {
        let moments = mean.iter_mut().zip(square);
        for ((parameter, &g), (mean, square)) in parameters.iter_mut().zip(gradient).zip(moments) {
            *mean = self.decays[0] * *mean + self.shares[0] * g;
            *square = self.decays[1] * *square + self.shares[1] * (g * g);
            let root = square.sqrt() * self.correction;
            *parameter = *parameter - self.rate * *mean / (root + self.epsilon);
        }
    }
}

/// The share of the learning rate at step `step` of `total`, counted from 0: half a cosine from 1 to 0
/// without warm-up or restart (Loshchilov and Hutter 2017, eq. 5).
pub fn cosine_decay(step: usize, total: usize) -> f64 {
    let progress = step.min(total) as f64 / total.max(1) as f64;
    0.5 * (1.0 + (std::f64::consts::PI * progress).cos())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backward::definition::{assert_near, on_threads, random, single};

    const STEPS: usize = 12;

    /// Parameters after each step, from the sums that the moments are: no state, no correction of a
    /// recursion.
    fn definition(start: f64, gradients: &[f64], rate: f64) -> f64 {
        let mut parameter = start;
        for t in 1..=gradients.len() {
            let mean = |beta: f64, of: fn(f64) -> f64| {
                let weights = (0..t).map(|i| beta.powi((t - 1 - i) as i32));
                let sum: f64 = weights
                    .clone()
                    .zip(gradients)
                    .map(|(w, &g)| w * of(g))
                    .sum();
                sum / weights.sum::<f64>()
            };
            let (first, second) = (mean(0.9, |g| g), mean(0.95, |g| g * g));
            let rate = rate * cosine_decay(t - 1, STEPS);
            parameter -= rate * first / (second.sqrt() + 1e-8);
        }
        parameter
    }

    fn trained<R: Real>(start: &[R], gradients: &[Vec<R>]) -> Vec<R> {
        let mut parameters = start.to_vec();
        let mut adam = Adam::new(start.len());
        for (step, gradient) in gradients.iter().enumerate() {
            let rate = 0.01 * cosine_decay(step, STEPS);
            adam.step(&mut parameters, gradient, rate);
        }
        parameters
    }

    #[test]
    fn steps_agree_with_the_definition() {
        let len = 2 * CHUNK + 5;
        let start = random(len, 1);
        let gradients: Vec<Vec<f64>> = (0..STEPS).map(|t| random(len, 2 + t as u64)).collect();
        let got = trained(&start, &gradients);
        for at in (0..len).step_by(977) {
            let own: Vec<f64> = gradients.iter().map(|g| g[at]).collect();
            let want = definition(start[at], &own, 0.01);
            assert!((got[at] - want).abs() < 1e-13, "{} against {want}", got[at]);
        }
        let gradients: Vec<Vec<f32>> = gradients.iter().map(|g| single(g)).collect();
        let run = |threads| on_threads(threads, || trained(&single(&start), &gradients));
        let one = run(1);
        assert_near(&one, &got, 1e-6, "in f32");
        assert_eq!(one, run(2));
    }

    #[test]
    fn the_first_step_is_the_learning_rate_and_no_gradient_none() {
        let mut parameters = [1.0f32, 1.0, 1.0];
        let mut adam = Adam::new(3);
        adam.step(&mut parameters, &[3.0, -0.001, 0.0], 0.25);
        for (got, want) in parameters.iter().zip([0.75, 1.25, 1.0]) {
            assert!((got - want).abs() < 1e-5, "{parameters:?}");
        }
    }

    #[test]
    fn the_schedule_falls_from_one_to_zero() {
        assert_eq!(cosine_decay(0, 8), 1.0);
        assert!((cosine_decay(4, 8) - 0.5).abs() < 1e-15);
        assert_eq!(cosine_decay(8, 8), 0.0);
        assert_eq!(cosine_decay(9, 8), 0.0);
        assert!((0..8).all(|t| cosine_decay(t + 1, 8) < cosine_decay(t, 8)));
    }
}
