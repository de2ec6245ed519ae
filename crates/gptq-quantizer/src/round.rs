//! Rounding to nearest: the baseline that looks at no data.

use gptq_kernels::vectorized;
use gptq_types::{QuantSpec, SolvedLayer};
use half::f16;

use crate::QuantizeError;
use crate::grid::{GridRule, ScaleOverflow, nearest};

/// Rounds `weight [K, N]` to the grids of its groups in stored order.
pub fn round_to_nearest(
    weight: &[f32],
    out_features: usize,
    spec: &QuantSpec,
) -> Result<SolvedLayer, QuantizeError> {
    let n = out_features;
    let k = weight.len() / n.max(1);
    if k * n != weight.len() {
        return Err(QuantizeError::Shape {
            found: weight.len(),
            in_features: k,
            out_features,
        });
    }
    let rule = GridRule::plain(spec);
    let size = spec.group_size.resolve(k);
    let mut layer = SolvedLayer {
        bits: spec.bits,
        in_features: k,
        out_features,
        codes: Vec::with_capacity(k * n),
        scales: Vec::new(),
        zeros: Vec::new(),
        g_idx: (0..k).map(|channel| (channel / size) as u32).collect(),
    };
    for (group, rows) in weight.chunks(size * n).enumerate() {
        let grid = vectorized(
            #[inline(always)]
            || rule.fit(rows.chunks_exact(n), n),
        )
        .map_err(|ScaleOverflow(scale)| QuantizeError::ScaleOverflow { group, scale })?;
        vectorized(
            #[inline(always)]
            || {
                for row in rows.chunks_exact(n) {
                    let columns = row.iter().zip(&grid.scales).zip(&grid.zeros);
                    layer.codes.extend(columns.map(|((&w, &scale), &zero)| {
                        (nearest(w, scale, zero, rule.max_code()) + zero) as u8
                    }));
                }
            },
        );
        layer
            .scales
            .extend(grid.scales.iter().map(|&s| f16::from_f32(s)));
        layer.zeros.extend(grid.zeros.iter().map(|&z| z as u16));
    }
    Ok(layer)
}
