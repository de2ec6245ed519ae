//! Coordinate descent after the sweep: codes and scales that the sweep could not reconsider.
//!
//! The sweep decides each code once, before those of later channels are known. Afterwards, with
//! `E = V - Q`, `V` the weight that the sweep aimed at and `H` the damped Hessian, each code in turn moves
//! to the one that lowers `tr(E H E^T)` most: the error is quadratic in `q_i`, so that is the grid point
//! nearest to `q_i + (H E)_i / H_ii` (cyclic coordinate descent; QuantEase, Behdin et al. 2023,
//! arXiv:2309.01885, does so from the float weight). Once the codes of a group are visited its scale takes
//! the least squares on them: with `c = code - zero`, `s + c^T (H E) / c^T H c`, rounded to f16 and kept
//! if that lowers the error. Zeros and `g_idx` stay. No step raises the error.
//!
//! Channels are visited group by group, so that plain act-order, whose groups are scattered over the
//! stored channels, needs rows and columns of `H` gathered once; a group that is longer than a block is
//! cut, and its scale stays.

use std::borrow::Cow;
use std::ops::Range;

use gptq_kernels::{
    DESCENT_CHANNELS, DescentBlock, axpy, descent_blocks, multiply_add, vectorized,
};
use gptq_types::SolvedLayer;
use half::f16;
use rayon::prelude::*;

use crate::grid::nearest;
use crate::{Factor, Hessian};

/// Outputs that one thread takes through all channels.
const PANEL: usize = 128;

/// Lowers `tr(E H E^T)` for `target [K, N]` by `passes` over the codes of `layer` that the sweep with
/// `factor` chose.
pub fn descend(
    layer: &mut SolvedLayer,
    target: &[f32],
    hessian: &Hessian,
    factor: &Factor,
    passes: u32,
) {
    let problem = Problem::new(layer, hessian, factor);
    let n = layer.out_features;
    let panels: Vec<Panel> = (0..n)
        .into_par_iter()
        .step_by(PANEL)
        .map(|first| {
            let outputs = first..n.min(first + PANEL);
            let mut panel = Panel::cut(&problem, layer, target, outputs);
            for _ in 0..passes {
                panel.pass(&problem);
            }
            panel
        })
        .collect();
    for panel in panels {
        panel.write_back(&problem, layer);
    }
}

/// The data that all outputs share, with channels sorted by group.
struct Problem<'a> {
    /// `[K]`: the stored channel at each position.
    channels: Vec<usize>,
    blocks: Vec<DescentBlock>,
    /// `[K, K]`, without damping.
    hessian: Cow<'a, [f32]>,
    /// `[K]`: the damped diagonal.
    diagonal: Vec<f32>,
    max_code: f32,
}

impl<'a> Problem<'a> {
    fn new(layer: &SolvedLayer, hessian: &'a Hessian, factor: &Factor) -> Self {
        let k = layer.in_features;
        let (channels, blocks) = descent_blocks(&layer.g_idx);
        let channels: Vec<usize> = channels.iter().map(|&channel| channel as usize).collect();
        let is_stored = channels.iter().enumerate().all(|(at, &c)| at == c);
        let values = match is_stored {
            true => Cow::Borrowed(hessian.values()),
            false => (channels.iter())
                .flat_map(|&row| channels.iter().map(move |&column| hessian.at(row, column)))
                .collect(),
        };
        let mut damped = vec![0.0; k];
        for (&channel, &value) in factor.order.channels.iter().zip(&factor.importance) {
            damped[channel] = value;
        }
        Problem {
            blocks,
            diagonal: channels.iter().map(|&channel| damped[channel]).collect(),
            channels,
            hessian: values,
            max_code: layer.bits.max_code() as f32,
        }
    }

    fn features(&self) -> usize {
        self.channels.len()
    }

    /// Element of the damped Hessian.
    #[inline(always)]
    fn at(&self, i: usize, j: usize) -> f32 {
        match i == j {
            true => self.diagonal[i],
            false => self.hessian[i * self.features() + j],
        }
    }
}

/// A run of outputs.
struct Panel {
    outputs: Range<usize>,
    error: Vec<f32>,  // [K, outputs]: target minus dequantized
    steps: Vec<f32>,  // [K, outputs]: code minus zero
    scales: Vec<f32>, // [G, outputs]
    zeros: Vec<f32>,  // [G, outputs]
}

impl Panel {
    fn cut(
        problem: &Problem<'_>,
        layer: &SolvedLayer,
        target: &[f32],
        outputs: Range<usize>,
    ) -> Self {
        let n = layer.out_features;
        let groups = layer.scales.len() / n;
        let grid = |group: usize| group * n + outputs.start..group * n + outputs.end;
        let scales: Vec<f32> = (0..groups)
            .flat_map(|group| layer.scales[grid(group)].iter().map(|s| s.to_f32()))
            .collect();
        let zeros: Vec<f32> = (0..groups)
            .flat_map(|group| layer.zeros[grid(group)].iter().map(|&z| f32::from(z)))
            .collect();
        let width = outputs.len();
        let (mut error, mut steps) = (Vec::new(), Vec::new());
        for &channel in &problem.channels {
            let group = layer.g_idx[channel] as usize * width;
            let row = channel * n + outputs.start;
            for column in 0..width {
                let step = f32::from(layer.codes[row + column]) - zeros[group + column];
                error.push(target[row + column] - step * scales[group + column]);
                steps.push(step);
            }
        }
        Panel {
            outputs,
            error,
            steps,
            scales,
            zeros,
        }
    }

    /// Updates every code, and every scale whose group is one block.
    fn pass(&mut self, problem: &Problem<'_>) {
        let (k, n) = (problem.features(), self.outputs.len());
        let mut gradient = vec![0.0; DESCENT_CHANNELS * n];
        for block in &problem.blocks {
            let count = block.range.len();
            let gradient = &mut gradient[..count * n];
            gradient.fill(0.0);
            let first = block.range.start;
            // H is symmetric: its columns are its rows.
            multiply_add(
                gradient,
                1.0,
                &problem.hessian,
                k,
                first,
                &self.error,
                count,
                k,
                n,
            );
            vectorized(
                #[inline(always)]
                || {
                    self.add_damping(problem, block, gradient);
                    self.move_codes(problem, block, gradient);
                    if block.is_whole {
                        self.move_scales(problem, block, gradient);
                    }
                },
            );
        }
    }

    /// The product was made with the undamped Hessian.
    #[inline(always)]
    fn add_damping(&self, problem: &Problem<'_>, block: &DescentBlock, gradient: &mut [f32]) {
        let (k, n) = (problem.features(), self.outputs.len());
        for (position, gradient) in block.range.clone().zip(gradient.chunks_exact_mut(n)) {
            let added = problem.diagonal[position] - problem.hessian[position * k + position];
            axpy(gradient, added, &self.error[position * n..][..n]);
        }
    }

    /// Moves each code in turn to the best one, with all others fixed.
    #[inline(always)]
    fn move_codes(&mut self, problem: &Problem<'_>, block: &DescentBlock, gradient: &mut [f32]) {
        let n = self.outputs.len();
        let first = block.range.start;
        let mut moved = [0.0; PANEL];
        let moved = &mut moved[..n];
        let (scales, zeros) = (
            &self.scales[block.group * n..][..n],
            &self.zeros[block.group * n..][..n],
        );
        for position in block.range.clone() {
            let inverse = 1.0 / problem.diagonal[position];
            let steps = &mut self.steps[position * n..][..n];
            let at = &gradient[(position - first) * n..][..n];
            for column in 0..n {
                let scale = scales[column];
                let best = steps[column] * scale + at[column] * inverse;
                let new = nearest(best, scale, zeros[column], problem.max_code);
                moved[column] = (new - steps[column]) * scale;
                steps[column] = new;
            }
            axpy(&mut self.error[position * n..][..n], -1.0, moved);
            for (other, row) in gradient.chunks_exact_mut(n).enumerate() {
                axpy(row, -problem.at(first + other, position), moved);
            }
        }
    }

    /// The scale of a group to the least squares on its codes.
    #[inline(always)]
    fn move_scales(&mut self, problem: &Problem<'_>, block: &DescentBlock, gradient: &[f32]) {
        let n = self.outputs.len();
        let (mut along, mut curvature) = ([0.0; PANEL], [0.0; PANEL]);
        let mut product = [0.0; PANEL];
        for (position, gradient) in block.range.clone().zip(gradient.chunks_exact(n)) {
            let product = &mut product[..n];
            product.fill(0.0);
            for other in block.range.clone() {
                axpy(
                    product,
                    problem.at(position, other),
                    &self.steps[other * n..][..n],
                );
            }
            let steps = &self.steps[position * n..][..n];
            for column in 0..n {
                along[column] += steps[column] * gradient[column];
                curvature[column] += steps[column] * product[column];
            }
        }
        let scales = &mut self.scales[block.group * n..][..n];
        let mut moved = [0.0; PANEL];
        for column in 0..n {
            let new = refitted(scales[column], along[column], curvature[column]);
            moved[column] = new - scales[column];
            scales[column] = new;
        }
        for position in block.range.clone() {
            let error = &mut self.error[position * n..][..n];
            let steps = &self.steps[position * n..][..n];
            for column in 0..n {
                error[column] -= steps[column] * moved[column];
            }
        }
    }

    fn write_back(self, problem: &Problem<'_>, layer: &mut SolvedLayer) {
        let (n, width) = (layer.out_features, self.outputs.len());
        for (&channel, steps) in problem.channels.iter().zip(self.steps.chunks_exact(width)) {
            let zeros = &self.zeros[layer.g_idx[channel] as usize * width..][..width];
            let codes = &mut layer.codes[channel * n + self.outputs.start..][..width];
            for ((code, step), zero) in codes.iter_mut().zip(steps).zip(zeros) {
                *code = (step + zero) as u8;
            }
        }
        for (group, scales) in self.scales.chunks_exact(width).enumerate() {
            let row = &mut layer.scales[group * n + self.outputs.start..][..width];
            for (to, &scale) in row.iter_mut().zip(scales) {
                *to = f16::from_f32(scale);
            }
        }
    }
}

/// The f16 scale nearest to `scale + along / curvature`, if it has the same sign and lowers the error.
#[inline(always)]
fn refitted(scale: f32, along: f32, curvature: f32) -> f32 {
    let new = f16::from_f32(scale + along / curvature).to_f32();
    let moved = new - scale;
    let gain = moved * (2.0 * along - moved * curvature);
    let is_storable = new.is_finite() && new.abs() >= f16::MIN_POSITIVE.to_f32();
    match gain > 0.0 && is_storable && new.is_sign_negative() == scale.is_sign_negative() {
        true => new,
        false => scale,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scale_moves_only_where_that_lowers_the_error() {
        assert_eq!(refitted(0.5, 1.0, 4.0), 0.75);
        assert_eq!(refitted(-0.5, -1.0, 4.0), -0.75);
        assert_eq!(refitted(0.5, 0.0, 4.0), 0.5);
        assert_eq!(refitted(0.5, -4.0, 4.0), 0.5, "another sign");
        assert_eq!(refitted(0.5, 1.0, 0.0), 0.5, "no weight but zeros");
        assert_eq!(refitted(0.5, 1e-6, 4.0), 0.5, "less than f16 tells apart");
        assert_eq!(refitted(6e4, 1e5, 1.0), 6e4, "beyond f16");
    }
}
