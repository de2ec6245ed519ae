//! Folded act-order: the file stores channels in act-order, so that `g_idx` is trivial.
//!
//! The input channels of a linear may be stored in any order if the outputs that feed them are stored in
//! the same order: rows of gate and up for down; rows of v for o, where the permutation stays inside a head
//! and is shared by all query heads of that head of v. The model computes the same function, and groups
//! formed in act-order have a trivial `g_idx`.

use std::collections::BTreeMap;
use std::ops::Range;

use gptq_model::spec::{KeySource, Mixer};
use gptq_model::{CaptureGroup, LinearSpec, ModelSpec, Tap};
use gptq_quantizer::Order;
use gptq_types::{ColumnOrder, GroupSize, LayerName, LayerRecord, QuantSpec, SolvedLayer};

use crate::PipelineError;

/// A permutation of a capture group's input channels that its producers can absorb.
pub struct Fold {
    /// Channels that may be sorted among themselves.
    run: usize,
    /// Runs, one after the other, that take the same permutation.
    sharing: usize,
    /// The linears whose outputs are these channels.
    pub before: Vec<Before>,
}

/// A linear some of whose outputs are channels that may be permuted.
pub struct Before {
    /// Its name.
    pub layer: LayerName,
    outputs: usize,
    /// Ranges of its outputs that are the channels: one range for each copy of all of them (both halves of a
    /// fused gate and up).
    columns: Vec<Range<usize>>,
}

impl Fold {
    /// The fold for the rows at `tap` of block `index`. `None` if folding changes no group (with one group a
    /// row, and in heads that are no longer than a group), or if other linears or blocks read the outputs too.
    pub fn of(model: &ModelSpec, index: usize, tap: Tap, group_size: GroupSize) -> Option<Self> {
        let GroupSize::Channels(size) = group_size else {
            return None;
        };
        let branch = &model.blocks[index].steps[tap.step].branches[tap.branch?];
        let (run, sharing, operands) = match &branch.mixer {
            Mixer::Gated(_) | Mixer::Plain(_) => {
                (branch.output.in_features, 1, &branch.operands[..])
            }
            Mixer::Attention(attention) => {
                let shape = &attention.shape;
                let values = branch.operands.get(2..)?;
                let alone = !branch.operands[..2].contains(values.first()?);
                let own = attention.keys == KeySource::Own && alone && shape.head_dim > size;
                if !own || attention.norms.value.is_some() {
                    return None;
                }
                (shape.head_dim, shape.heads / shape.kv_heads, values)
            }
            Mixer::PerBlockInput(_) => return None,
        };
        let mut before: Vec<Before> = Vec::new();
        for piece in operands {
            let linear = &branch.input[piece.linear];
            match before.iter_mut().find(|before| before.layer == linear.name) {
                Some(before) => before.columns.push(piece.columns.clone()),
                None => before.push(Before {
                    layer: linear.name.clone(),
                    outputs: linear.out_features,
                    columns: vec![piece.columns.clone()],
                }),
            }
        }
        let quantized = branch.input.iter().all(|linear| linear.quantized);
        quantized.then_some(Fold {
            run,
            sharing,
            before,
        })
    }

    /// Act-order within what may be permuted.
    pub fn order(&self, group_size: GroupSize, diagonal: &[f32]) -> Order {
        Order::folded(group_size, diagonal, self.run, self.sharing)
    }

    /// The permutation of the producers' outputs that belongs to the permutation `channels` of the inputs: new
    /// output `n` is old output `outputs[n]`. `None` if heads that share values are permuted differently, which
    /// no run writes.
    pub fn outputs(&self, channels: &[u32]) -> Option<Vec<u32>> {
        let (run, bundle) = (self.run, self.run * self.sharing);
        let mut outputs = Vec::with_capacity(channels.len() / self.sharing);
        for (at, heads) in channels.chunks_exact(bundle).enumerate() {
            let start = (at * bundle) as u32;
            let first: Vec<u32> = (heads[..run].iter())
                .map(|channel| channel.checked_sub(start))
                .collect::<Option<_>>()?;
            let alike = heads.chunks_exact(run).enumerate().all(|(head, places)| {
                let start = start + (head * run) as u32;
                (places.iter().zip(&first)).all(|(channel, place)| *channel == start + place)
            });
            if !alike || !is_permutation(&first) {
                return None;
            }
            outputs.extend(first.iter().map(|place| (at * run) as u32 + place));
        }
        Some(outputs)
    }

    /// The folds of a block, by tap.
    pub fn all(
        model: &ModelSpec,
        index: usize,
        group_size: GroupSize,
    ) -> Vec<(CaptureGroup, Fold)> {
        let groups = model.blocks[index].groups().into_iter();
        groups
            .filter_map(|group| {
                let fold = Fold::of(model, index, group.tap, group_size)?;
                Some((group, fold))
            })
            .collect()
    }

    /// Linears of which somebody permutes the outputs, if orders may be folded at all.
    pub fn all_before(model: &ModelSpec, index: usize, group_size: GroupSize) -> Vec<LayerName> {
        let folds = Fold::all(model, index, group_size).into_iter();
        folds
            .flat_map(|(_, fold)| fold.before)
            .map(|before| before.layer)
            .collect()
    }
}

impl Before {
    /// The permutation of all its outputs that belongs to the permutation `channels`.
    pub fn outputs(&self, channels: &[u32]) -> Vec<u32> {
        let mut outputs: Vec<u32> = (0..self.outputs as u32).collect();
        for columns in &self.columns {
            for (place, channel) in columns.clone().zip(channels) {
                outputs[place] = columns.start as u32 + channel;
            }
        }
        outputs
    }
}

/// The permutations of a finished block's linears in the file.
#[derive(Default)]
pub struct Folded {
    /// Input channel of the float model at each place, by linear.
    inputs: BTreeMap<LayerName, Vec<u32>>,
    /// Output channel of the float model at each place, by linear.
    outputs: BTreeMap<LayerName, Vec<u32>>,
}

impl Folded {
    /// The permutations in the records of block `index`, which was written under `spec`.
    ///
    /// # Errors
    /// The linear whose record lacks the order of its channels, or holds an impossible one.
    pub fn of(
        model: &ModelSpec,
        index: usize,
        spec: &QuantSpec,
        layers: &[LayerRecord],
    ) -> Result<Self, PipelineError> {
        let mut folded = Folded::default();
        if !spec.order.may_fold() {
            return Ok(folded);
        }
        for (group, fold) in Fold::all(model, index, spec.group_size) {
            for LinearSpec {
                name, in_features, ..
            } in group.linears
            {
                let record = layers.iter().find(|record| record.layer == name);
                let Some(record) = record else {
                    return Err(PipelineError::UnknownOrder(name));
                };
                // `Auto` records the chosen order; another than `Folded` permutes nothing.
                if spec.order == ColumnOrder::Auto
                    && record.folded.is_none()
                    && (record.order).is_some_and(|order| order != ColumnOrder::Folded)
                {
                    continue;
                }
                let channels = record.folded.as_ref();
                let channels = channels.filter(|channels| channels.len() == in_features);
                let found = channels.and_then(|channels| Some((channels, fold.outputs(channels)?)));
                let Some((channels, outputs)) = found else {
                    return Err(PipelineError::UnknownOrder(name));
                };
                for before in &fold.before {
                    let outputs = before.outputs(&outputs);
                    folded.outputs.insert(before.layer.clone(), outputs);
                }
                folded.inputs.insert(name, channels.clone());
            }
        }
        Ok(folded)
    }

    /// The output of the float model at each output of a linear, where they are permuted.
    pub fn outputs_of(&self, layer: &LayerName) -> Option<&[u32]> {
        self.outputs.get(layer).map(Vec::as_slice)
    }

    /// A linear as it is in the file, in the order of the float model again.
    pub fn unfolded(&self, layer: &LayerName, mut solved: SolvedLayer) -> SolvedLayer {
        if let Some(channels) = self.inputs.get(layer) {
            solved.permute_inputs(&inverse(channels));
        }
        if let Some(outputs) = self.outputs.get(layer) {
            solved.permute_outputs(&inverse(outputs));
        }
        solved
    }
}

/// Whether `channels` holds each index below its length once.
fn is_permutation(channels: &[u32]) -> bool {
    let mut seen = vec![false; channels.len()];
    (channels.iter()).all(|&channel| {
        (seen.get_mut(channel as usize)).is_some_and(|seen| !std::mem::replace(seen, true))
    })
}

fn inverse(channels: &[u32]) -> Vec<u32> {
    let mut inverse = vec![0; channels.len()];
    for (place, &channel) in channels.iter().enumerate() {
        inverse[channel as usize] = place as u32;
    }
    inverse
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_of_values_follow_the_query_heads_that_share_them() {
        let fold = Fold {
            run: 2,
            sharing: 2,
            before: Vec::new(),
        };
        // Key-value head 0 serves query heads 0 and 1, head 1 the others.
        let outputs = fold.outputs(&[1, 0, 3, 2, 4, 5, 6, 7]);
        assert_eq!(outputs.unwrap(), [1, 0, 2, 3]);
        for wrong in [[1, 0, 2, 3, 4, 5, 6, 7], [4, 5, 6, 7, 0, 1, 2, 3], [0; 8]] {
            assert_eq!(fold.outputs(&wrong), None);
        }
        let whole = Fold {
            run: 4,
            sharing: 1,
            before: Vec::new(),
        };
        assert_eq!(whole.outputs(&[3, 0, 2, 1]).unwrap(), [3, 0, 2, 1]);
    }

    #[test]
    fn an_inverse_takes_a_permutation_back() {
        let channels = [2, 0, 3, 1];
        assert!(is_permutation(&channels));
        assert!(!is_permutation(&[0, 0, 1]) && !is_permutation(&[0, 3, 1]));
        assert_eq!(inverse(&channels), [1, 3, 0, 2]);
    }
}
