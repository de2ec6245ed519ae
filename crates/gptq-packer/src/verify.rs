//! Proof that a file holds what the solver chose: it is read again and compared, bit for bit.

use gptq_types::{CheckpointFormat, LayerName, SolvedLayer, TensorSource};
use half::f16;
use rayon::prelude::*;

use crate::checkpoint::{ReadError, StoredShape};
use crate::unpack::unpack;

/// A file that does not hold what the solver chose.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum VerifyError {
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error("layer `{layer}` in {place} has {what} {found}, the solver has {expected}")]
    Shape {
        layer: LayerName,
        place: String,
        what: &'static str,
        expected: usize,
        found: usize,
    },
    /// `row` is an input for codes, weights and group indices, a group for scales and zeros;
    /// `column` is an output.
    #[error(
        "layer `{layer}` in {place}: {what} at [{row}, {column}] is {found}, the solver has {expected}"
    )]
    Mismatch {
        layer: LayerName,
        place: String,
        what: &'static str,
        row: usize,
        column: usize,
        expected: f32,
        found: f32,
    },
}

/// Reads the layer back from `source` and compares codes, scales, zeros, group indices and the
/// dequantized weights with `solved`, to the bit.
///
/// # Errors
/// The first difference, or the reason why the layer cannot be read.
pub fn verify_layer(
    source: &dyn TensorSource,
    name: &LayerName,
    solved: &SolvedLayer,
    format: CheckpointFormat,
) -> Result<(), VerifyError> {
    let verifier = Verifier {
        layer: name,
        place: source.place(),
    };
    let wanted = StoredShape {
        bits: solved.bits,
        inputs: solved.in_features,
        outputs: solved.out_features,
        groups: solved.groups(),
    };
    let packed = wanted.read(source, name)?;
    verifier.same_size("g_idx entries", solved.g_idx.len(), packed.g_idx.len())?;
    let stored = unpack(&packed, format).map_err(|error| ReadError::Layer {
        layer: name.clone(),
        place: source.place(),
        source: error,
    })?;
    drop(packed);
    let outputs = solved.out_features;
    verifier.same("g_idx", 1, &solved.g_idx, &stored.g_idx, |group| {
        group as f32
    })?;
    verifier.same(
        "scale",
        outputs,
        &bits_of(solved),
        &bits_of(&stored),
        |bits| f16::from_bits(bits).to_f32(),
    )?;
    verifier.same("zero", outputs, &solved.zeros, &stored.zeros, f32::from)?;
    verifier.same("code", outputs, &solved.codes, &stored.codes, f32::from)?;
    verifier.same_weights(solved, &stored)
}

/// Elements that one task compares.
const PIECE: usize = 1 << 20;

fn bits_of(layer: &SolvedLayer) -> Vec<u16> {
    layer.scales.iter().map(|scale| scale.to_bits()).collect()
}

struct Verifier<'a> {
    layer: &'a LayerName,
    place: String,
}

impl Verifier<'_> {
    fn same_size(
        &self,
        what: &'static str,
        expected: usize,
        found: usize,
    ) -> Result<(), VerifyError> {
        if expected == found {
            return Ok(());
        }
        Err(VerifyError::Shape {
            layer: self.layer.clone(),
            place: self.place.clone(),
            what,
            expected,
            found,
        })
    }

    fn same<T: Copy + PartialEq + Sync>(
        &self,
        what: &'static str,
        columns: usize,
        expected: &[T],
        found: &[T],
        show: impl Fn(T) -> f32,
    ) -> Result<(), VerifyError> {
        self.same_size(what, expected.len(), found.len())?;
        let pieces = expected.par_chunks(PIECE).zip(found.par_chunks(PIECE));
        if pieces.all(|(expected, found)| expected == found) {
            return Ok(());
        }
        match expected.iter().zip(found).position(|(e, f)| e != f) {
            None => Ok(()),
            Some(index) => Err(self.mismatch(
                what,
                index / columns,
                index % columns,
                show(expected[index]),
                show(found[index]),
            )),
        }
    }

    /// Row by row, so that no second copy of the weights is held.
    fn same_weights(&self, solved: &SolvedLayer, stored: &SolvedLayer) -> Result<(), VerifyError> {
        let (expected, found) = (Weights::new(solved), Weights::new(stored));
        let differing = |&row: &usize| {
            let pairs = expected.row(row).zip(found.row(row));
            pairs.fold(0, |bits, (e, f)| bits | (e.to_bits() ^ f.to_bits())) != 0
        };
        let Some(row) = (0..solved.in_features)
            .into_par_iter()
            .find_first(differing)
        else {
            return Ok(());
        };
        let mut pairs = expected.row(row).zip(found.row(row)).enumerate();
        match pairs.find(|(_, (e, f))| e.to_bits() != f.to_bits()) {
            None => Ok(()),
            Some((column, (e, f))) => Err(self.mismatch("weight", row, column, e, f)),
        }
    }

    fn mismatch(
        &self,
        what: &'static str,
        row: usize,
        column: usize,
        expected: f32,
        found: f32,
    ) -> VerifyError {
        VerifyError::Mismatch {
            layer: self.layer.clone(),
            place: self.place.clone(),
            what,
            row,
            column,
            expected,
            found,
        }
    }
}

/// The formula of [`SolvedLayer::dequantize`], one row at a time, with scales widened once.
struct Weights<'a> {
    layer: &'a SolvedLayer,
    scales: Vec<f32>,
}

impl<'a> Weights<'a> {
    fn new(layer: &'a SolvedLayer) -> Self {
        Weights {
            layer,
            scales: layer.scales.iter().map(|scale| scale.to_f32()).collect(),
        }
    }

    fn row(&self, row: usize) -> impl Iterator<Item = f32> {
        let columns = self.layer.out_features;
        let group = self.layer.g_idx[row] as usize * columns;
        let scales = &self.scales[group..group + columns];
        let zeros = &self.layer.zeros[group..group + columns];
        let codes = &self.layer.codes[row * columns..(row + 1) * columns];
        let weight = |((&code, &scale), &zero): ((&u8, &f32), &u16)| {
            scale * (f32::from(code) - f32::from(zero))
        };
        codes.iter().zip(scales).zip(zeros).map(weight)
    }
}
