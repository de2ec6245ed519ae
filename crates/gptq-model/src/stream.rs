//! Blocks over whole windows, on a Burn backend: calibration and evaluation.

use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::ops::Range;
use std::rc::Rc;

use gptq_kernels::{Activation, Rotation, Weight};

use crate::ModelError;
use crate::backend::{DecoderBackend, Tensor};
use crate::forward::{Attention, Block, BlockOps, Branch, Mix, Step, Weights};
use crate::operations::{Operations, Rotary};
use crate::spec::{KeySource, LinearSpec, ModelSpec, Piece, RotarySpec};
use crate::weights::LinearValues;

/// Weights as tensors of a backend.
pub(crate) struct OnBackend<B>(PhantomData<B>);

impl<B: DecoderBackend> Weights for OnBackend<B> {
    type Linears = Linears<B>;
    type Norm = Rc<B::Norm>;
}

/// A linear on the device.
pub(crate) struct Linear<B: DecoderBackend> {
    pub spec: LinearSpec,
    pub weight: Tensor<B, 2>,
    pub bias: Option<Rc<B::Vector>>, // [N]
}

/// Linears that read the same rows.
pub(crate) struct Linears<B: DecoderBackend> {
    pub linears: Vec<Linear<B>>,
    pub operands: Vec<Piece>,
}

impl<B: DecoderBackend> Linear<B> {
    /// The weight as solvers see it.
    pub fn weight(&self) -> Weight<'_> {
        B::show_weight(&self.weight)
    }

    fn copied(&self, on: &B::Context, place: Option<Tensor<B, 2>>) -> Self {
        Linear {
            spec: self.spec.clone(),
            weight: B::copied(on, &self.weight, place),
            bias: self.bias.clone(),
        }
    }

    /// Takes other values, `[in_features, out_features]`.
    pub fn replace(&mut self, on: &B::Context, values: Vec<f32>) {
        let values = LinearValues::InputMajor(values);
        self.weight = B::weight(on, values, self.spec.in_features, self.spec.out_features);
    }
}

impl<B: DecoderBackend> Linears<B> {
    fn copied(&self, on: &B::Context, places: &mut impl Iterator<Item = Tensor<B, 2>>) -> Self {
        Linears {
            linears: (self.linears.iter())
                .map(|linear| linear.copied(on, places.next()))
                .collect(),
            operands: self.operands.clone(),
        }
    }
}

impl<B: DecoderBackend> Block<OnBackend<B>> {
    /// The linears of the block, in the order of the data.
    pub fn linears(&self) -> impl Iterator<Item = &Linear<B>> {
        (self.branches())
            .flat_map(|branch| branch.input.linears.iter().chain(&branch.output.linears))
    }

    /// The linears of the block, mutable, in the order of the data.
    pub fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear<B>> {
        let branches = self.steps.iter_mut().flat_map(|step| &mut step.branches);
        branches
            .flat_map(|branch| (branch.input.linears.iter_mut()).chain(&mut branch.output.linears))
    }

    /// The same block, which stays as it is when linears of this one are replaced or written over; in the
    /// place of another one, where there is one.
    pub fn copied(&self, on: &B::Context, place: Option<Self>) -> Self {
        let mut places = place.into_iter().flat_map(Self::into_weights);
        let mut steps = Vec::with_capacity(self.steps.len());
        for step in &self.steps {
            steps.push(Step {
                branches: (step.branches.iter())
                    .map(|branch| branch.copied(on, &mut places))
                    .collect(),
                residual_factor: step.residual_factor,
            });
        }
        Block {
            steps,
            output_factor: self.output_factor,
        }
    }

    fn into_weights(self) -> impl Iterator<Item = Tensor<B, 2>> {
        let branches = self.steps.into_iter().flat_map(|step| step.branches);
        let linears = branches
            .flat_map(|branch| (branch.input.linears.into_iter()).chain(branch.output.linears));
        linears.map(|linear| linear.weight)
    }
}

impl<B: DecoderBackend> Branch<OnBackend<B>> {
    fn copied(&self, on: &B::Context, places: &mut impl Iterator<Item = Tensor<B, 2>>) -> Self {
        let mix = match &self.mix {
            Mix::Attention(attention) => Mix::Attention(Box::new(Attention {
                block: attention.block,
                spec: attention.spec.clone(),
                norms: attention.norms.clone(),
            })),
            &Mix::Gated(activation) => Mix::Gated(activation),
            &Mix::Plain(activation) => Mix::Plain(activation),
            &Mix::ByToken { activation, block } => Mix::ByToken { activation, block },
        };
        Branch {
            norm: self.norm.clone(),
            input: self.input.copied(on, places),
            mix,
            output: self.output.copied(on, places),
            after: self.after.clone(),
        }
    }
}

/// Rotary tables of windows of one length: of queries, where theirs differ, and keys.
pub(crate) struct Tables<B: DecoderBackend>(Vec<RotaryPair<B>>);

struct RotaryPair<B: DecoderBackend> {
    queries: Option<Rc<Rotary<B>>>,
    keys: Rc<Rotary<B>>,
}

impl<B: DecoderBackend> Tables<B> {
    /// Those of `positions` in texts that are `tokens` long; `transposed` ones beside them for gradients.
    pub fn new(
        on: &B::Context,
        spec: &ModelSpec,
        positions: Range<usize>,
        tokens: usize,
        transposed: bool,
    ) -> Self {
        let rotary = |rotation: Rotation| {
            let transpose = transposed.then(|| rotation.clone().transposed());
            Rc::new(Rotary {
                table: B::rotary_table(on, rotation),
                transposed: transpose.map(|rotation| B::rotary_table(on, rotation)),
            })
        };
        let table = |spec: &RotarySpec| {
            let queries = spec.queries(positions.clone(), tokens);
            let keys = spec.keys(positions.clone(), tokens);
            RotaryPair {
                queries: queries.map(rotary),
                keys: rotary(keys),
            }
        };
        Tables(spec.rotaries.iter().map(table).collect())
    }
}

/// Keys and values `[tokens, kv_heads * head_dim]` that later blocks read, by the block that made them.
pub(crate) type SharedKeyValues<B> = BTreeMap<usize, [Tensor<B, 2>; 2]>;

/// A batch of windows on its way through a block.
pub(crate) struct Windows<'a, B: DecoderBackend, O: Operations<B>> {
    pub operations: O,
    pub tables: &'a Tables<B>,
    /// Tokens of a window.
    pub tokens: usize,
    /// Keys and values of earlier blocks, and of this one where later ones read them.
    pub shared_kv: BTreeMap<usize, [O::Value; 2]>,
    /// The input that this block looks up by token id, `[tokens, width]`.
    pub by_token: Option<O::Value>,
}

impl<B: DecoderBackend, O: Operations<B>> Windows<'_, B, O> {
    fn normed(&mut self, x: O::Value, norm: Option<&Rc<B::Norm>>) -> O::Value {
        match norm {
            Some(norm) => self.operations.norm(&x, norm),
            None => x,
        }
    }

    /// Applies the norm and RoPE to queries or keys, in the order of the model.
    fn with_rope(
        &mut self,
        x: O::Value,
        attention: &Attention<OnBackend<B>>,
        of_keys: bool,
    ) -> O::Value {
        let norm = attention.norms[usize::from(of_keys)].as_ref();
        let after = attention.spec.norms.after_rotation;
        let x = match after {
            true => x,
            false => self.normed(x, norm),
        };
        let x = match attention.spec.rotary {
            None => x,
            Some(rotary) => {
                let RotaryPair { queries, keys } = &self.tables.0[rotary];
                let rotary = queries.as_ref().filter(|_| !of_keys).unwrap_or(keys);
                self.operations.rotate(x, rotary, self.tokens)
            }
        };
        match after {
            true => self.normed(x, norm),
            false => x,
        }
    }

    /// Keys and values of an attention, from its own operands or from an earlier block.
    fn keys_and_values(
        &mut self,
        mut operands: impl Iterator<Item = O::Value>,
        attention: &Attention<OnBackend<B>>,
    ) -> [O::Value; 2] {
        if let KeySource::Block(block) = attention.spec.keys {
            return self.shared_kv[&block].clone();
        }
        let mut next = || operands.next().expect("the spec names keys and values");
        let (k, v) = (next(), next());
        let k = self.with_rope(k, attention, true);
        let v = self.normed(v, attention.norms[2].as_ref());
        if attention.spec.keys == KeySource::Donor {
            let pair = [k.clone(), v.clone()];
            self.shared_kv.insert(attention.block, pair);
        }
        [k, v]
    }

    /// The one operand of linears.
    fn operand(&mut self, linears: &Linears<B>, x: &O::Value) -> O::Value {
        let mut operands = self.operations.operands(linears, x);
        operands.pop().expect("the spec names an operand")
    }
}

impl<B: DecoderBackend, O: Operations<B>> BlockOps<OnBackend<B>> for Windows<'_, B, O> {
    type Rows = O::Value;

    fn input(
        &mut self,
        hidden: &O::Value,
        norm: Option<&Rc<B::Norm>>,
        _: &Linears<B>,
    ) -> Result<O::Value, ModelError> {
        Ok(self.normed(hidden.clone(), norm))
    }

    fn attend(
        &mut self,
        x: O::Value,
        input: &Linears<B>,
        attention: &Attention<OnBackend<B>>,
        _: &Linears<B>,
    ) -> Result<O::Value, ModelError> {
        let mut operands = self.operations.operands(input, &x).into_iter();
        drop(x);
        let q = operands.next().expect("the spec names queries");
        let q = self.with_rope(q, attention, false);
        let [k, v] = self.keys_and_values(operands, attention);
        let shape = attention.spec.shape;
        Ok(self.operations.attend(&q, &k, &v, self.tokens, shape))
    }

    fn gate(
        &mut self,
        x: O::Value,
        input: &Linears<B>,
        activation: Activation,
        _: &Linears<B>,
    ) -> Result<O::Value, ModelError> {
        let mut operands = self.operations.operands(input, &x).into_iter();
        drop(x);
        let mut next = || operands.next().expect("the spec names gate and up");
        let (gate, up) = (next(), next());
        Ok(self.operations.gate(gate, &up, activation))
    }

    fn activate(
        &mut self,
        x: O::Value,
        input: &Linears<B>,
        activation: Activation,
        _: &Linears<B>,
    ) -> Result<O::Value, ModelError> {
        let x = self.operand(input, &x);
        Ok(self.operations.activate(x, activation))
    }

    fn gate_by_token(
        &mut self,
        x: O::Value,
        input: &Linears<B>,
        activation: Activation,
        _: usize,
        _: &Linears<B>,
    ) -> Result<O::Value, ModelError> {
        let gate = self.operand(input, &x);
        let row = self.by_token.as_ref();
        let row = row.expect("the batch has the block's rows");
        Ok(self.operations.gate(gate, row, activation))
    }

    fn add(
        &mut self,
        hidden: O::Value,
        inner: O::Value,
        output: &Linears<B>,
        after: Option<&Rc<B::Norm>>,
        factor: f32,
    ) -> Result<O::Value, ModelError> {
        let added = self.operand(output, &inner);
        drop(inner);
        let added = self.normed(added, after);
        Ok(self.operations.add(hidden, added, factor))
    }

    fn scale(&mut self, hidden: O::Value, factor: f32) -> Result<O::Value, ModelError> {
        Ok(self.operations.scale(hidden, factor))
    }
}
