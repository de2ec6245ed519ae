//! A block's forward pass, written once: for windows and for text, on every device, over float and over
//! quantized weights.
//!
//! [`Weights`] says what a device makes of linears and norms, [`BlockOps`] what it does with rows of
//! tokens. Whoever implements them decides how much a call fuses; the order of the calls, and so the
//! mathematics, is [`Block::forward`]. A pass that looks at the inputs of linears, and replaces weights on
//! the way, makes the same calls one [`Tap`](crate::spec::Tap) at a time: [`Branch::input`],
//! [`Branch::mix`], [`Branch::add`].

use gptq_kernels::Activation;

use crate::ModelError;
use crate::spec::{AttentionSpec, BlockSpec, BranchSpec, LinearSpec, Mixer, NormSpec, Piece};

/// The form of weights on a device.
pub trait Weights {
    /// Linears that read the same rows, and where operands lie in their outputs.
    type Linears;
    /// A norm.
    type Norm;
}

/// Operations of a block on rows of tokens, on one device. `reader` is what reads the result next: a device
/// may write rows in the order in which it wants them.
pub trait BlockOps<W: Weights> {
    /// Rows of tokens, `[rows, columns]`.
    type Rows;

    /// The hidden states, normed, for `reader`.
    fn input(
        &mut self,
        hidden: &Self::Rows,
        norm: Option<&W::Norm>,
        reader: &W::Linears,
    ) -> Result<Self::Rows, ModelError>;

    /// Attention from `x`, the input of the projections.
    fn attend(
        &mut self,
        x: Self::Rows,
        input: &W::Linears,
        attention: &Attention<W>,
        reader: &W::Linears,
    ) -> Result<Self::Rows, ModelError>;

    /// `activation(gate) * up`, both products of `x`.
    fn gate(
        &mut self,
        x: Self::Rows,
        input: &W::Linears,
        activation: Activation,
        reader: &W::Linears,
    ) -> Result<Self::Rows, ModelError>;

    /// `activation` of the product of `x`.
    fn activate(
        &mut self,
        x: Self::Rows,
        input: &W::Linears,
        activation: Activation,
        reader: &W::Linears,
    ) -> Result<Self::Rows, ModelError>;

    /// `activation` of the product of `x`, times what block `block` looked up by token id.
    fn gate_by_token(
        &mut self,
        x: Self::Rows,
        input: &W::Linears,
        activation: Activation,
        block: usize,
        reader: &W::Linears,
    ) -> Result<Self::Rows, ModelError>;

    /// `hidden + factor * after(output(inner))`.
    fn add(
        &mut self,
        hidden: Self::Rows,
        inner: Self::Rows,
        output: &W::Linears,
        after: Option<&W::Norm>,
        factor: f32,
    ) -> Result<Self::Rows, ModelError>;

    /// `factor * hidden`.
    fn scale(&mut self, hidden: Self::Rows, factor: f32) -> Result<Self::Rows, ModelError>;
}

/// Reads the weights of a block.
pub trait BlockLoader<W: Weights> {
    /// Linears that read the same rows; `operands` are pieces of their outputs.
    fn linears(
        &mut self,
        linears: &[LinearSpec],
        operands: &[Piece],
    ) -> Result<W::Linears, ModelError>;

    /// A norm.
    fn norm(&mut self, norm: &NormSpec) -> Result<W::Norm, ModelError>;

    /// A tensor of one number.
    fn factor(&mut self, name: &str) -> Result<f32, ModelError>;
}

/// A block's weights, in the places of its spec.
pub struct Block<W: Weights> {
    /// One after the other.
    pub steps: Vec<Step<W>>,
    /// Multiplies the hidden states at the end.
    pub output_factor: Option<f32>,
}

/// See [`StepSpec`](crate::spec::StepSpec).
pub struct Step<W: Weights> {
    /// Side by side.
    pub branches: Vec<Branch<W>>,
    /// Multiplies what is added.
    pub residual_factor: f32,
}

/// See [`BranchSpec`].
pub struct Branch<W: Weights> {
    /// The norm of its step, once for each branch.
    pub norm: Option<W::Norm>,
    /// Linears that read the normalized hidden states.
    pub input: W::Linears,
    /// The mixer between the linears.
    pub mix: Mix<W>,
    /// Linear that reads the mixed rows.
    pub output: W::Linears,
    /// The norm of the output.
    pub after: Option<W::Norm>,
}

/// See [`Mixer`].
pub enum Mix<W: Weights> {
    /// Attention.
    Attention(Box<Attention<W>>),
    /// A gated feed-forward.
    Gated(Activation),
    /// A plain feed-forward.
    Plain(Activation),
    /// A gate by the rows of a block's own table.
    ByToken {
        /// Activation of the gate.
        activation: Activation,
        /// The block.
        block: usize,
    },
}

/// Attention's spec and its norms.
pub struct Attention<W: Weights> {
    /// The block that it is in.
    pub block: usize,
    /// Heads, rotary table, whose keys.
    pub spec: AttentionSpec,
    /// Norms of queries, keys and values.
    pub norms: [Option<W::Norm>; 3],
}

impl<W: Weights> Block<W> {
    /// Reads block `index`.
    pub fn load(
        spec: &BlockSpec,
        index: usize,
        loader: &mut impl BlockLoader<W>,
    ) -> Result<Self, ModelError> {
        let mut steps = Vec::with_capacity(spec.steps.len());
        for step in &spec.steps {
            let branches = (step.branches.iter())
                .map(|branch| Branch::load(branch, step.norm.as_ref(), index, loader));
            steps.push(Step {
                branches: branches.collect::<Result<_, _>>()?,
                residual_factor: step.residual_factor,
            });
        }
        let factor = spec.output_factor.as_ref();
        Ok(Block {
            steps,
            output_factor: factor.map(|name| loader.factor(name)).transpose()?,
        })
    }

    /// The hidden states behind the block, from those before it.
    pub fn forward<O: BlockOps<W>>(
        &self,
        ops: &mut O,
        hidden: O::Rows,
    ) -> Result<O::Rows, ModelError> {
        let mut hidden = hidden;
        for step in &self.steps {
            // All branches see the hidden states as they are before the step.
            let mut inner = Vec::with_capacity(step.branches.len());
            for branch in &step.branches {
                let x = branch.input(ops, &hidden)?;
                inner.push(branch.mix(ops, x)?);
            }
            for (branch, inner) in step.branches.iter().zip(inner) {
                hidden = branch.add(ops, hidden, inner, step.residual_factor)?;
            }
        }
        self.finish(ops, hidden)
    }

    /// The operations after the last step.
    pub fn finish<O: BlockOps<W>>(
        &self,
        ops: &mut O,
        hidden: O::Rows,
    ) -> Result<O::Rows, ModelError> {
        match self.output_factor {
            Some(factor) => ops.scale(hidden, factor),
            None => Ok(hidden),
        }
    }

    /// All branches, in the order of the data.
    pub fn branches(&self) -> impl Iterator<Item = &Branch<W>> {
        self.steps.iter().flat_map(|step| &step.branches)
    }
}

impl<W: Weights> Branch<W> {
    fn load(
        spec: &BranchSpec,
        norm: Option<&NormSpec>,
        block: usize,
        loader: &mut impl BlockLoader<W>,
    ) -> Result<Self, ModelError> {
        let mut optional = |norm: Option<&NormSpec>| norm.map(|norm| loader.norm(norm)).transpose();
        let mix = match &spec.mixer {
            Mixer::Attention(attention) => {
                let norms = &attention.norms;
                Mix::Attention(Box::new(Attention {
                    block,
                    spec: (**attention).clone(),
                    norms: [
                        optional(norms.query.as_ref())?,
                        optional(norms.key.as_ref())?,
                        optional(norms.value.as_ref())?,
                    ],
                }))
            }
            &Mixer::Gated(activation) => Mix::Gated(activation),
            &Mixer::Plain(activation) => Mix::Plain(activation),
            &Mixer::PerBlockInput(activation) => Mix::ByToken { activation, block },
        };
        let output = [spec.output.clone()];
        let whole = [Piece {
            linear: 0,
            columns: 0..spec.output.out_features,
        }];
        Ok(Branch {
            norm: optional(norm)?,
            mix,
            after: optional(spec.after.as_ref())?,
            input: loader.linears(&spec.input, &spec.operands)?,
            output: loader.linears(&output, &whole)?,
        })
    }

    /// Computes the rows that `input` reads.
    pub fn input<O: BlockOps<W>>(
        &self,
        ops: &mut O,
        hidden: &O::Rows,
    ) -> Result<O::Rows, ModelError> {
        ops.input(hidden, self.norm.as_ref(), &self.input)
    }

    /// Computes the rows that `output` reads from those that `input` reads.
    pub fn mix<O: BlockOps<W>>(&self, ops: &mut O, x: O::Rows) -> Result<O::Rows, ModelError> {
        let (input, reader) = (&self.input, &self.output);
        match &self.mix {
            Mix::Attention(attention) => ops.attend(x, input, attention, reader),
            &Mix::Gated(activation) => ops.gate(x, input, activation, reader),
            &Mix::Plain(activation) => ops.activate(x, input, activation, reader),
            &Mix::ByToken { activation, block } => {
                ops.gate_by_token(x, input, activation, block, reader)
            }
        }
    }

    /// The hidden states with what the branch adds to them.
    pub fn add<O: BlockOps<W>>(
        &self,
        ops: &mut O,
        hidden: O::Rows,
        inner: O::Rows,
        factor: f32,
    ) -> Result<O::Rows, ModelError> {
        ops.add(hidden, inner, &self.output, self.after.as_ref(), factor)
    }
}
