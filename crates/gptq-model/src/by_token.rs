//! Inputs that blocks look up by token id.

use std::collections::HashMap;

use crate::ModelError;
use crate::backend::{DecoderBackend, Tensor};
use crate::read_block::norm_values;
use crate::spec::PerBlockInputSpec;
use crate::weights::WeightSource;

/// The rows that a set of windows needs, and what they are added to; see
/// [`PerBlockInputSpec`].
pub(crate) struct RowsByToken<'a, B: DecoderBackend> {
    on: &'a B::Context,
    spec: &'a PerBlockInputSpec,
    places: HashMap<u32, usize>,
    rows: Vec<f32>, // [distinct ids, blocks * width], scaled
    columns: usize, // blocks * width
    projection: Tensor<B, 2>,
    norm: B::Norm,
}

impl<'a, B: DecoderBackend> RowsByToken<'a, B> {
    /// Reads the rows of all ids of `windows`, and nothing else of the table: it may outweigh the model.
    pub fn read(
        on: &'a B::Context,
        source: &dyn WeightSource,
        spec: &'a PerBlockInputSpec,
        (blocks, hidden): (usize, usize),
        windows: &[Vec<u32>],
    ) -> Result<Self, ModelError> {
        let mut ids: Vec<u32> = windows.iter().flatten().copied().collect();
        ids.sort_unstable();
        ids.dedup();
        if let Some(&id) = ids.iter().find(|&&id| id as usize >= spec.vocab) {
            let vocab_size = spec.vocab;
            return Err(ModelError::TokenOutsideVocabulary { id, vocab_size });
        }
        let columns = blocks * spec.width;
        let mut rows = source.rows(&spec.table, &ids, columns)?;
        rows.iter_mut().for_each(|value| *value *= spec.row_factor);
        let (weight, bias) = norm_values(&spec.norm, |name| source.plain(name))?;
        let stored = source.plain_as_stored(&spec.projection)?;
        Ok(RowsByToken {
            on,
            spec,
            places: (ids.into_iter().enumerate())
                .map(|(at, id)| (id, at))
                .collect(),
            rows,
            columns,
            projection: B::weight(on, stored.into(), hidden, columns),
            norm: B::norm_weights(on, spec.norm.kind, weight, bias, spec.norm.eps),
        })
    }

    /// The inputs of all blocks, `[ids, blocks * width]`, from the embeddings of the ids.
    pub fn of(&self, ids: &[u32], embedded: &Tensor<B, 2>) -> Tensor<B, 2> {
        let mut rows = Vec::with_capacity(ids.len() * self.columns);
        for id in ids {
            let at = self.places[id] * self.columns;
            rows.extend_from_slice(&self.rows[at..at + self.columns]);
        }
        let projected = B::project(self.on, embedded, &self.projection, None);
        let projected = B::scale(self.on, projected, self.spec.projection_factor);
        let sum = B::add(
            self.on,
            B::norm(self.on, &projected, &self.norm),
            B::upload(self.on, rows, self.columns),
            1.0,
        );
        B::scale(self.on, sum, self.spec.factor)
    }
}
