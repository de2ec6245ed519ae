//! Damping and factorization: from a Hessian to the `U` that the solver sweeps with.

use gptq_kernels::inverse_cholesky;
use gptq_types::QuantSpec;

use crate::{Hessian, Order, QuantizeError};

/// Damping grows by this factor after a failed factorization.
const ESCALATION: f64 = 2.0;
/// Beyond this share of the mean diagonal the result would be rounding to nearest in disguise.
const MAX_DAMP_PERCENT: f64 = 2.0;

/// Everything that the layers which share one input also share in solving.
pub struct Factor {
    /// Processing order of the input channels.
    pub order: Order,
    /// `[K, K]` row-major, upper triangular, rows and columns in processing order:
    /// `(H + damp I)^-1 = U^T U`.
    pub u: Vec<f32>,
    /// `[K]` in processing order: the diagonal of `H + damp I`, by which the scale search weighs
    /// the squared error of each channel.
    pub importance: Vec<f32>,
    /// Share of the mean diagonal that was added in the end.
    pub damp_used: f64,
    /// Failed factorizations before.
    pub escalations: u32,
    /// Channels without any signal: they get the mean diagonal, so that their weights are rounded
    /// to nearest and pass no error on. (The original code sets such weights to zero, which is
    /// wrong for any token that does use the channel.)
    pub dead_channels: usize,
}

impl Factor {
    /// In the order of the spec.
    pub fn new(hessian: &Hessian, spec: &QuantSpec) -> Result<Self, QuantizeError> {
        let order = Order::new(spec.order, spec.group_size, &hessian.diagonal());
        Self::in_order(hessian, order, spec.damp_percent)
    }

    /// Damps by `damp_percent` of the mean diagonal and factors in f64.
    pub fn in_order(
        hessian: &Hessian,
        order: Order,
        damp_percent: f64,
    ) -> Result<Self, QuantizeError> {
        let k = hessian.features();
        let diagonal = hessian.diagonal();
        let damping = Damping::new(&diagonal);
        let (u, damp_used, escalations) = damping.escalate(damp_percent, |share| {
            let added = damping.added(&diagonal, share);
            let damped = |i: usize, j: usize| {
                let (row, col) = (order.channels[i], order.channels[j]);
                let h = f64::from(hessian.at(row, col));
                if i == j { h + added[row] } else { h }
            };
            Ok(inverse_cholesky(k, damped).map_err(|error| error.pivot))
        })?;
        let added = damping.added(&diagonal, damp_used);
        Ok(Factor {
            importance: importance(order.channels.iter().copied(), &diagonal, &added),
            order,
            u,
            damp_used,
            escalations,
            dead_channels: damping.dead_channels,
        })
    }
}

/// The damped diagonal, in the order of `channels`.
pub(crate) fn importance(
    channels: impl Iterator<Item = usize>,
    diagonal: &[f32],
    added: &[f64],
) -> Vec<f32> {
    let damped = |channel: usize| (f64::from(diagonal[channel]) + added[channel]) as f32;
    channels.map(damped).collect()
}

/// The damping that is added to the diagonal of a Hessian.
pub(crate) struct Damping {
    /// Mean of the diagonal over live channels.
    mean: f64,
    /// Channels that were zero on every token.
    pub dead_channels: usize,
    features: usize,
}

impl Damping {
    pub fn new(diagonal: &[f32]) -> Self {
        let dead_channels = diagonal.iter().filter(|&&d| d == 0.0).count();
        let live = (diagonal.len() - dead_channels).max(1) as f64;
        let mean = diagonal.iter().map(|&d| f64::from(d)).sum::<f64>() / live;
        Damping {
            mean: if mean > 0.0 { mean } else { 1.0 },
            dead_channels,
            features: diagonal.len(),
        }
    }

    /// `[features]`, in stored order.
    pub fn added(&self, diagonal: &[f32], share: f64) -> Vec<f64> {
        let of = |&d: &f32| self.mean * if d == 0.0 { 1.0 + share } else { share };
        diagonal.iter().map(of).collect()
    }

    /// Tries with growing damping until a factorization succeeds; the inner error of `attempt` is
    /// the pivot that was not positive. Returns the factor, the share and the failures before.
    pub fn escalate<F>(
        &self,
        damp_percent: f64,
        mut attempt: impl FnMut(f64) -> Result<Result<F, usize>, QuantizeError>,
    ) -> Result<(F, f64, u32), QuantizeError> {
        let (mut share, mut escalations) = (damp_percent, 0);
        loop {
            match attempt(share)? {
                Ok(factor) => return Ok((factor, share, escalations)),
                Err(pivot) if share * ESCALATION > MAX_DAMP_PERCENT => {
                    return Err(QuantizeError::Singular {
                        features: self.features,
                        pivot,
                        damp: share,
                    });
                }
                Err(_) => {
                    escalations += 1;
                    share *= ESCALATION;
                }
            }
        }
    }
}
