//! What a block does with rows, done at once or recorded for gradients.

use std::ops::Range;
use std::rc::Rc;

use gptq_kernels::{Activation, AttentionShape};

use crate::backend::{DecoderBackend, Tensor};
use crate::stream::{Linear, Linears};

/// The operations of a block on windows. [`Windows`](crate::stream::Windows) says in which order they run,
/// whoever does them.
pub(crate) trait Operations<B: DecoderBackend> {
    /// Rows, and where they come from.
    type Value: Clone;

    /// A value that nothing is computed for.
    fn constant(&mut self, x: Tensor<B, 2>) -> Self::Value;

    /// The rows themselves.
    fn tensor(value: &Self::Value) -> &Tensor<B, 2>;

    /// The outputs of linears that read the same rows, as the operands of a mixer.
    fn operands(&mut self, linears: &Linears<B>, x: &Self::Value) -> Vec<Self::Value>;

    /// A norm over runs of as many columns as its weight has.
    fn norm(&mut self, x: &Self::Value, norm: &Rc<B::Norm>) -> Self::Value;

    /// RoPE.
    fn rotate(&mut self, x: Self::Value, rotary: &Rc<Rotary<B>>, tokens: usize) -> Self::Value;

    /// Causal attention inside windows.
    fn attend(
        &mut self,
        q: &Self::Value,
        k: &Self::Value,
        v: &Self::Value,
        tokens: usize,
        shape: AttentionShape,
    ) -> Self::Value;

    /// `activation(gate) * up`.
    fn gate(&mut self, gate: Self::Value, up: &Self::Value, activation: Activation) -> Self::Value;

    /// `activation(x)`.
    fn activate(&mut self, x: Self::Value, activation: Activation) -> Self::Value;

    /// `x + factor * y`.
    fn add(&mut self, x: Self::Value, y: Self::Value, factor: f32) -> Self::Value;

    /// `factor * x`.
    fn scale(&mut self, x: Self::Value, factor: f32) -> Self::Value;
}

/// A rotary table, and its transpose where gradients are asked for.
pub(crate) struct Rotary<B: DecoderBackend> {
    pub table: B::RotaryTable,
    pub transposed: Option<B::RotaryTable>,
}

/// Each operation is done at once, in place where nobody else holds the rows.
pub(crate) struct Direct<'a, B: DecoderBackend> {
    pub on: &'a B::Context,
}

impl<B: DecoderBackend> Linear<B> {
    pub fn forward(&self, on: &B::Context, x: &Tensor<B, 2>) -> Tensor<B, 2> {
        B::project(on, x, &self.weight, self.bias.as_deref())
    }
}

impl<B: DecoderBackend> Linears<B> {
    /// The operands of a mixer, each in memory of its own: they are changed in place.
    pub fn project(&self, on: &B::Context, x: &Tensor<B, 2>) -> Vec<Tensor<B, 2>> {
        let mut outputs: Vec<Option<Tensor<B, 2>>> = Vec::new();
        outputs.resize_with(self.linears.len(), || None);
        let mut operands = Vec::with_capacity(self.operands.len());
        for (at, piece) in self.operands.iter().enumerate() {
            let linear = &self.linears[piece.linear];
            let output = outputs[piece.linear].get_or_insert_with(|| linear.forward(on, x));
            let columns: Range<usize> = piece.columns.clone();
            let whole = columns == (0..linear.spec.out_features);
            operands.push(match whole && !self.operands[..at].contains(piece) {
                true => output.clone(),
                false => B::columns(on, output, columns),
            });
        }
        operands
    }
}

impl<B: DecoderBackend> Operations<B> for Direct<'_, B> {
    type Value = Tensor<B, 2>;

    fn constant(&mut self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        x
    }

    fn tensor(value: &Tensor<B, 2>) -> &Tensor<B, 2> {
        value
    }

    fn operands(&mut self, linears: &Linears<B>, x: &Tensor<B, 2>) -> Vec<Tensor<B, 2>> {
        linears.project(self.on, x)
    }

    fn norm(&mut self, x: &Tensor<B, 2>, norm: &Rc<B::Norm>) -> Tensor<B, 2> {
        B::norm(self.on, x, norm)
    }

    fn rotate(&mut self, x: Tensor<B, 2>, rotary: &Rc<Rotary<B>>, tokens: usize) -> Tensor<B, 2> {
        B::rotate(self.on, x, &rotary.table, tokens)
    }

    fn attend(
        &mut self,
        q: &Tensor<B, 2>,
        k: &Tensor<B, 2>,
        v: &Tensor<B, 2>,
        tokens: usize,
        shape: AttentionShape,
    ) -> Tensor<B, 2> {
        B::attend(self.on, q, k, v, tokens, shape)
    }

    fn gate(
        &mut self,
        gate: Tensor<B, 2>,
        up: &Tensor<B, 2>,
        activation: Activation,
    ) -> Tensor<B, 2> {
        B::gate(self.on, gate, up, activation)
    }

    fn activate(&mut self, x: Tensor<B, 2>, activation: Activation) -> Tensor<B, 2> {
        B::activate(self.on, x, activation)
    }

    fn add(&mut self, x: Tensor<B, 2>, y: Tensor<B, 2>, factor: f32) -> Tensor<B, 2> {
        B::add(self.on, x, y, factor)
    }

    fn scale(&mut self, x: Tensor<B, 2>, factor: f32) -> Tensor<B, 2> {
        B::scale(self.on, x, factor)
    }
}
