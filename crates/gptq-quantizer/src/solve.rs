//! Algorithm 1 of the paper, with lazy batch updates.
//!
//! Given `U`, the outputs of a layer do not depend on each other, so the weight is cut into
//! panels of outputs and every panel is swept from first to last channel on its own: no thread
//! waits for another, and the codes are the same for any number of threads.
//!
//! Closures given to `vectorized` are marked `inline(always)`: one that the compiler finds too long
//! to inline would silently be compiled for the oldest processor.

use gptq_kernels::{axpy, multiply_add, vectorized};
use gptq_types::{QuantSpec, SolvedLayer};
use half::f16;
use rayon::prelude::*;

use crate::grid::{Grid, GridRule, ScaleOverflow, nearest};
use crate::search::{Candidate, Row, SearchRule, fit_best};
use crate::{Factor, QuantizeError};

/// Outputs swept together: a block of this width stays in the second-level cache.
const PANEL: usize = 128;
/// Channels between two trailing updates, `B` in the paper.
const BLOCK: usize = 128;

/// Codes and what they cost.
pub struct Solved {
    /// The quantized layer.
    pub layer: SolvedLayer,
    /// `sum of ((w - q) / U_ii)^2` over all weights, in the paper's measure: equal to
    /// `tr(E H E^T)` with the damped `H`.
    pub compensated_error: f64,
    /// `[K, N]` like the codes: the value of each weight when it was rounded, with the errors passed on to it.
    /// Empty where nothing is trained.
    pub latents: Vec<f32>,
}

/// Quantizes `weight [K, N]` (input channel first) with the factor of its Hessian.
pub fn solve(
    weight: &[f32],
    out_features: usize,
    factor: &Factor,
    spec: &QuantSpec,
) -> Result<Solved, QuantizeError> {
    let k = factor.order.channels.len();
    if weight.len() != k * out_features {
        return Err(QuantizeError::Shape {
            found: weight.len(),
            in_features: k,
            out_features,
        });
    }
    let panels: Vec<Result<Panel, QuantizeError>> = (0..out_features)
        .into_par_iter()
        .step_by(PANEL)
        .map(|first| {
            let mut panel = Panel::cut(weight, out_features, first, factor, spec)?;
            panel.sweep()?;
            Ok(panel)
        })
        .collect();
    // The first error in the order of outputs, whichever thread was the first to meet one.
    let panels = panels.into_iter().collect::<Result<Vec<Panel>, _>>()?;
    Ok(assemble(&panels, out_features, factor, spec))
}

/// A run of outputs on its way through all channels.
struct Panel<'a> {
    factor: &'a Factor,
    rule: GridRule,
    candidates: Vec<Candidate>, // grids that are tried for each group
    outputs: usize,
    w: Vec<f32>,      // [K, outputs], processing order; carries the errors passed on
    codes: Vec<u8>,   // [K, outputs], processing order
    grids: Vec<Grid>, // [G]
    compensated_error: f64,
}

impl<'a> Panel<'a> {
    fn cut(
        weight: &[f32],
        out_features: usize,
        first: usize,
        factor: &'a Factor,
        spec: &QuantSpec,
    ) -> Result<Self, QuantizeError> {
        let k = factor.order.channels.len();
        let outputs = PANEL.min(out_features - first);
        let mut w = Vec::with_capacity(k * outputs);
        for &channel in &factor.order.channels {
            w.extend_from_slice(&weight[channel * out_features + first..][..outputs]);
        }
        let mut panel = Panel {
            factor,
            rule: GridRule::new(spec),
            candidates: SearchRule::new(spec).candidates(),
            outputs,
            w,
            codes: vec![0; k * outputs],
            grids: vec![Grid::default(); spec.group_size.count(k)],
            compensated_error: 0.0,
        };
        if factor.order.fixed_grids {
            panel.fix_grids()?;
        }
        Ok(panel)
    }

    /// Grids of all groups from the untouched weights.
    fn fix_grids(&mut self) -> Result<(), QuantizeError> {
        let mut members: Vec<Vec<usize>> = vec![Vec::new(); self.grids.len()];
        for (position, &group) in self.factor.order.groups.iter().enumerate() {
            members[group as usize].push(position);
        }
        for (group, members) in members.into_iter().enumerate() {
            let grid = vectorized(
                #[inline(always)]
                || self.fit_grid(members.into_iter()),
            );
            self.grids[group] = grid.map_err(overflow_in(group))?;
        }
        Ok(())
    }

    /// The grid of a group from the weights at its `positions` as they are now.
    #[inline(always)]
    fn fit_grid(&self, positions: impl Iterator<Item = usize>) -> Result<Grid, ScaleOverflow> {
        let rows: Vec<Row> = positions
            .map(|p| Row {
                weights: &self.w[p * self.outputs..][..self.outputs],
                importance: self.factor.importance[p],
            })
            .collect();
        fit_best(&self.rule, &self.candidates, &rows, self.outputs)
    }

    /// Rounds every channel in order. Blocks end where groups end, so that a grid is always
    /// fitted to weights that already carry every error passed on before it.
    fn sweep(&mut self) -> Result<(), QuantizeError> {
        let k = self.factor.order.channels.len();
        let mut errors = Vec::new();
        let mut first = 0;
        while first < k {
            let last = self.factor.order.block_end(first, BLOCK);
            errors.clear();
            errors.resize((last - first) * self.outputs, 0.0);
            vectorized(
                #[inline(always)]
                || self.sweep_block(first, last, &mut errors),
            )?;
            self.update_trailing(first, last, &errors);
            first = last;
        }
        Ok(())
    }

    /// Lines 5 to 10 of algorithm 1: quantize a channel, pass its error on inside the block.
    #[inline(always)]
    fn sweep_block(
        &mut self,
        first: usize,
        last: usize,
        errors: &mut [f32],
    ) -> Result<(), QuantizeError> {
        let k = self.factor.order.channels.len();
        let n = self.outputs;
        for i in first..last {
            if !self.factor.order.fixed_grids {
                self.fit_grid_at(i)?;
            }
            let u = &self.factor.u[i * k..(i + 1) * k];
            let error = &mut errors[(i - first) * n..][..n];
            self.round_channel(i, u[i], error);
            let (_, rest) = self.w.split_at_mut((i + 1) * n);
            for (row, &u_ij) in rest.chunks_exact_mut(n).zip(&u[i + 1..last]) {
                axpy(row, -u_ij, error);
            }
        }
        Ok(())
    }

    /// Fits the grid of the group that begins at position `i`, if one does.
    #[inline(always)]
    fn fit_grid_at(&mut self, i: usize) -> Result<(), QuantizeError> {
        let groups = &self.factor.order.groups;
        if i > 0 && groups[i - 1] == groups[i] {
            return Ok(());
        }
        let end = self.factor.order.group_end(i);
        let group = groups[i] as usize;
        self.grids[group] = self.fit_grid(i..end).map_err(overflow_in(group))?;
        Ok(())
    }

    /// Codes of channel `i` and `error = (w - q) / U_ii`.
    #[inline(always)]
    fn round_channel(&mut self, i: usize, u_ii: f32, error: &mut [f32]) {
        let n = self.outputs;
        let grid = &self.grids[self.factor.order.groups[i] as usize];
        let w = &self.w[i * n..(i + 1) * n];
        let codes = &mut self.codes[i * n..(i + 1) * n];
        let inverse = 1.0 / u_ii;
        let max_code = self.rule.max_code();
        let grid = grid.scales.iter().zip(&grid.zeros);
        for ((((error, code), &w), &scale), &zero) in (error.iter_mut())
            .zip(codes)
            .zip(w)
            .zip(grid.clone().map(|g| g.0))
            .zip(grid.map(|g| g.1))
        {
            let steps = nearest(w, scale, zero, max_code);
            *code = (steps + zero) as u8;
            *error = (w - steps * scale) * inverse;
        }
        self.compensated_error += f64::from(gptq_kernels::dot(error, error));
    }

    /// Line 12 of algorithm 1: `W[:, last:] -= E U[first:last, last:]`, transposed.
    fn update_trailing(&mut self, first: usize, last: usize, errors: &[f32]) {
        let k = self.factor.order.channels.len();
        if last == k {
            return;
        }
        multiply_add(
            &mut self.w[last * self.outputs..],
            -1.0,
            &self.factor.u[first * k..last * k],
            k,
            last,
            errors,
            k - last,
            last - first,
            self.outputs,
        );
    }
}

fn overflow_in(group: usize) -> impl FnOnce(ScaleOverflow) -> QuantizeError {
    move |ScaleOverflow(scale)| QuantizeError::ScaleOverflow { group, scale }
}

/// Panels side by side, channels back in stored order.
fn assemble(
    panels: &[Panel<'_>],
    out_features: usize,
    factor: &Factor,
    spec: &QuantSpec,
) -> Solved {
    let k = factor.order.channels.len();
    let groups = spec.group_size.count(k);
    let mut scales = Vec::with_capacity(groups * out_features);
    let mut zeros = Vec::with_capacity(groups * out_features);
    for group in 0..groups {
        for panel in panels {
            let grid = &panel.grids[group];
            scales.extend(grid.scales.iter().map(|&s| f16::from_f32(s)));
            zeros.extend(grid.zeros.iter().map(|&z| z as u16));
        }
    }
    let mut position_of = vec![0; k];
    for (position, &channel) in factor.order.channels.iter().enumerate() {
        position_of[channel] = position;
    }
    let mut codes = Vec::with_capacity(k * out_features);
    for &position in &position_of {
        for panel in panels {
            codes.extend_from_slice(&panel.codes[position * panel.outputs..][..panel.outputs]);
        }
    }
    let mut latents = Vec::new();
    if spec.trains() {
        latents.reserve_exact(k * out_features);
        for &position in &position_of {
            for panel in panels {
                latents.extend_from_slice(&panel.w[position * panel.outputs..][..panel.outputs]);
            }
        }
    }
    Solved {
        latents,
        compensated_error: panels.iter().map(|panel| panel.compensated_error).sum(),
        layer: SolvedLayer {
            bits: spec.bits,
            in_features: k,
            out_features,
            codes,
            scales,
            zeros,
            g_idx: factor.order.g_idx(),
        },
    }
}
