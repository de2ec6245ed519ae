//! The weights of a block from files to a device.

use std::collections::HashMap;
use std::rc::Rc;

use gptq_types::{LayerName, SourceError};
use rayon::prelude::*;

use crate::ModelError;
use crate::backend::DecoderBackend;
use crate::forward::BlockLoader;
use crate::spec::{BlockSpec, LinearSpec, NormSpec, Piece};
use crate::stream::{Linear, Linears, OnBackend};
use crate::weights::{LinearWeights, WeightSource};

/// The weights of one block in host memory, on their way to the device.
pub(crate) struct HostBlock {
    linears: HashMap<LayerName, LinearWeights>,
    vectors: HashMap<String, Vec<f32>>,
}

impl HostBlock {
    pub fn read<B: DecoderBackend>(
        source: &dyn WeightSource,
        spec: &BlockSpec,
    ) -> Result<Self, SourceError> {
        let read = |linear: &LinearSpec| {
            let stored = B::read(source, &linear.name, linear.shape(), linear.bias)?;
            Ok::<_, SourceError>((linear.name.clone(), stored))
        };
        let linears: Vec<&LinearSpec> = spec.linears().collect();
        // Side by side where somebody waits; one after another needs less memory on the way.
        let linears = match B::PREFETCH {
            true => linears
                .into_par_iter()
                .map(read)
                .collect::<Result<_, _>>()?,
            false => linears.into_iter().map(read).collect::<Result<_, _>>()?,
        };
        let vectors = (spec.plain_tensors().into_iter())
            .map(|(name, _)| Ok((name.clone(), source.plain(&name)?)));
        Ok(HostBlock {
            linears,
            vectors: vectors.collect::<Result<_, SourceError>>()?,
        })
    }

    fn vector(&self, name: &str) -> &[f32] {
        (self.vectors.get(name)).expect("all plain tensors of the spec were read")
    }
}

/// The weight and the bias of a norm in f32, the offset added; `vector` reads a tensor by its name.
pub fn norm_values<E>(
    norm: &NormSpec,
    mut vector: impl FnMut(&str) -> Result<Vec<f32>, E>,
) -> Result<(Vec<f32>, Option<Vec<f32>>), E> {
    let mut weight = match &norm.weight {
        Some(name) => vector(name)?,
        None => vec![1.0; norm.width],
    };
    if norm.offset != 0.0 {
        weight.iter_mut().for_each(|weight| *weight += norm.offset);
    }
    let bias = norm.bias.as_ref().map(|name| vector(name)).transpose()?;
    Ok((weight, bias))
}

/// A block in host memory that is brought to a device.
pub(crate) struct OnDevice<'a, B: DecoderBackend> {
    pub host: &'a mut HostBlock,
    pub on: &'a B::Context,
}

impl<B: DecoderBackend> BlockLoader<OnBackend<B>> for OnDevice<'_, B> {
    fn linears(
        &mut self,
        linears: &[LinearSpec],
        operands: &[Piece],
    ) -> Result<Linears<B>, ModelError> {
        let on = self.on;
        let mut load = |spec: &LinearSpec| {
            let stored = self.host.linears.remove(&spec.name);
            let stored = stored.expect("all linears of the spec were read");
            Linear {
                weight: B::weight(on, stored.weight, spec.in_features, spec.out_features),
                bias: stored.bias.map(|bias| Rc::new(B::vector(on, bias))),
                spec: spec.clone(),
            }
        };
        Ok(Linears {
            linears: linears.iter().map(&mut load).collect(),
            operands: operands.to_vec(),
        })
    }

    fn norm(&mut self, norm: &NormSpec) -> Result<Rc<B::Norm>, ModelError> {
        let read = |name: &str| Ok::<_, ModelError>(self.host.vector(name).to_vec());
        let (weight, bias) = norm_values(norm, read)?;
        Ok(Rc::new(B::norm_weights(
            self.on, norm.kind, weight, bias, norm.eps,
        )))
    }

    fn factor(&mut self, name: &str) -> Result<f32, ModelError> {
        Ok(self.host.vector(name)[0])
    }
}
