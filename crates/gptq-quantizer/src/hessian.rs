//! Accumulation of `H = 2/tokens * X^T X`.

use gptq_kernels::Gram;
use gptq_kernels::{ActivationSink, Activations};

use crate::QuantizeError;
use crate::mismatch::{Mismatch, MismatchSum, merge};

/// `H` while tokens arrive.
pub struct HessianSum {
    features: usize,
    tokens: usize,
    gram: Gram,
    mismatch: Option<MismatchSum>,
}

impl HessianSum {
    /// For a layer of `features` input channels.
    pub fn new(features: usize) -> Self {
        HessianSum {
            features,
            tokens: 0,
            gram: Gram::new(features),
            mismatch: None,
        }
    }

    /// Also sums the differences between rows and their float partners.
    pub fn beside_float(features: usize) -> Self {
        HessianSum {
            mismatch: Some(MismatchSum::new(features)),
            ..Self::new(features)
        }
    }

    /// Pairs of which the first is token `start` of the pass: not all of its tokens need come here.
    pub(crate) fn observe_pair_at(
        &mut self,
        start: usize,
        x: Activations<'_>,
        float: Activations<'_>,
        tokens: usize,
        in_features: usize,
    ) {
        self.observe(x, tokens, in_features);
        if let (Some(sum), Activations::Host(x), Activations::Host(float)) =
            (&mut self.mismatch, x, float)
        {
            sum.add(x, float, start, tokens);
        }
    }

    /// An empty sum of the same kind.
    pub(crate) fn another(&self) -> Self {
        match self.mismatch {
            None => Self::new(self.features),
            Some(_) => Self::beside_float(self.features),
        }
    }

    /// Tokens so far.
    pub(crate) fn tokens(&self) -> usize {
        self.tokens
    }

    /// Divides by the tokens seen. An activation that overflowed shows in the diagonal and is an
    /// error here: carried on it would turn every code of the layer into noise.
    pub fn finish(self) -> Result<Hessian, QuantizeError> {
        if self.tokens == 0 {
            return Err(QuantizeError::NoTokens);
        }
        let scale = 2.0 / self.tokens as f32;
        let hessian = Hessian {
            features: self.features,
            tokens: self.tokens,
            values: self.gram.finish(scale),
            mismatch: self.mismatch.map(MismatchSum::finish),
        };
        check_finite(&hessian.diagonal())?;
        Ok(hessian)
    }
}

/// Refuses a Hessian whose diagonal shows an activation that overflowed.
pub(crate) fn check_finite(diagonal: &[f32]) -> Result<(), QuantizeError> {
    match diagonal.iter().position(|value| !value.is_finite()) {
        Some(channel) => Err(QuantizeError::NotFinite {
            channel,
            value: diagonal[channel],
        }),
        None => Ok(()),
    }
}

impl ActivationSink for HessianSum {
    fn observe(&mut self, x: Activations<'_>, tokens: usize, in_features: usize) {
        let Activations::Host(x) = x else {
            unreachable!("a decoder on the processor shows rows in host memory");
        };
        assert_eq!(
            in_features, self.features,
            "in_features of the observed rows"
        );
        self.gram.add(x, tokens);
        self.tokens += tokens;
    }

    fn observe_pair(
        &mut self,
        x: Activations<'_>,
        float: Activations<'_>,
        tokens: usize,
        in_features: usize,
    ) {
        self.observe_pair_at(self.tokens, x, float, tokens, in_features);
    }
}

/// `H = 2/tokens * X^T X`, undamped, symmetric, `[features, features]` row-major in f32.
pub struct Hessian {
    features: usize,
    tokens: usize,
    values: Vec<f32>,
    mismatch: Option<Mismatch>,
}

impl Hessian {
    /// From a full matrix, for tests and tools.
    pub fn from_values(features: usize, tokens: usize, values: Vec<f32>) -> Self {
        assert_eq!(values.len(), features * features, "elements of a square");
        Hessian {
            features,
            tokens,
            values,
            mismatch: None,
        }
    }

    /// Becomes that of the tokens of `other` too.
    pub(crate) fn merge(&mut self, other: &Hessian) {
        merge(&mut self.values, self.tokens, &other.values, other.tokens);
        self.tokens += other.tokens;
        if let (Some(mine), Some(other)) = (&mut self.mismatch, &other.mismatch) {
            mine.merge(other);
        }
    }

    /// The mismatch between these inputs and those of the float model, if a float stream was seen.
    pub fn mismatch(&self) -> Option<&Mismatch> {
        self.mismatch.as_ref()
    }

    /// `K`.
    pub fn features(&self) -> usize {
        self.features
    }

    /// Tokens that went into the sum.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Element `[i, j]`.
    pub fn at(&self, i: usize, j: usize) -> f32 {
        self.values[i * self.features + j]
    }

    /// All elements, row-major.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// The diagonal: twice the mean square of each input channel.
    pub fn diagonal(&self) -> Vec<f32> {
        (0..self.features).map(|i| self.at(i, i)).collect()
    }

    /// Channels that were zero on every token.
    pub fn dead_channels(&self) -> usize {
        self.diagonal().iter().filter(|&&d| d == 0.0).count()
    }
}
