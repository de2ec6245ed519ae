//! Damping and factorisation: from a Hessian to the `U` that the solver sweeps with.

use gptq_kernels::inverse_cholesky;
use gptq_types::QuantSpec;

use crate::{Hessian, Order, QuantizeError};

/// Damping grows by this factor after a failed factorisation.
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
    /// Share of the mean diagonal that was added in the end.
    pub damp_used: f64,
    /// Failed factorisations before.
    pub escalations: u32,
    /// Channels without any signal: they get the mean diagonal, so that their weights are rounded
    /// to nearest and pass no error on. (The original code sets such weights to zero, which is
    /// wrong for any token that does use the channel.)
    pub dead_channels: usize,
}

impl Factor {
    /// Damps by `spec.damp_percent` of the mean diagonal and factors in f64. Where a pivot is not
    /// positive the damping is doubled, and counted, until it is or the limit is reached.
    pub fn new(hessian: &Hessian, spec: &QuantSpec) -> Result<Self, QuantizeError> {
        let k = hessian.features();
        let diagonal = hessian.diagonal();
        let order = Order::new(spec.order, spec.group_size, &diagonal);
        let dead_channels = hessian.dead_channels();
        let live = (k - dead_channels).max(1) as f64;
        let mean = diagonal.iter().map(|&d| f64::from(d)).sum::<f64>() / live;
        let mean = if mean > 0.0 { mean } else { 1.0 };

        let mut damp_used = spec.damp_percent;
        let mut escalations = 0;
        loop {
            let damped = |i: usize, j: usize| {
                let (row, col) = (order.channels[i], order.channels[j]);
                let h = f64::from(hessian.at(row, col));
                match (i == j, h == 0.0) {
                    (false, _) => h,
                    (true, true) => mean * (1.0 + damp_used),
                    (true, false) => h + mean * damp_used,
                }
            };
            match inverse_cholesky(k, damped) {
                Ok(u) => {
                    return Ok(Factor {
                        order,
                        u,
                        damp_used,
                        escalations,
                        dead_channels,
                    });
                }
                Err(error) => {
                    escalations += 1;
                    damp_used *= ESCALATION;
                    if damp_used > MAX_DAMP_PERCENT {
                        return Err(QuantizeError::Singular {
                            features: k,
                            pivot: error.pivot,
                            damp: damp_used / ESCALATION,
                        });
                    }
                }
            }
        }
    }
}
