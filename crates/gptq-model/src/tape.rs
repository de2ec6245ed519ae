//! A block's forward pass, recorded, and its gradients.
//!
//! Reverse-mode differentiation: [`Tape`] does each operation and keeps what its gradient is made of; from the
//! gradient of a loss at the block's output, [`Tape::backward`] walks back and shows, for every linear, its
//! input and the gradient at its output: of `y = x W^T` the gradient of `W` is `dy^T x`, and who trains
//! decides what becomes of it.

use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;

use gptq_kernels::{Activation, Activations, AttentionShape};
use gptq_types::LayerName;

use crate::backend::{DecoderBackend, GradientBackend, Tensor};
use crate::operations::{Operations, Rotary};
use crate::stream::Linears;

/// Sees, for each linear of a block, the rows it read and the gradient at its outputs.
pub trait GradientSink {
    /// `x` has `rows` rows of `in_features`, `dy` as many of the outputs `outputs` of the linear `layer`. A
    /// linear whose outputs are several operands is shown several times in a pass. Each range of its outputs is
    /// shown once, however many read it, and ranges do not overlap.
    fn gradient(
        &mut self,
        layer: &LayerName,
        outputs: Range<usize>,
        x: Activations<'_>,
        dy: Activations<'_>,
        rows: usize,
    );
}

/// Rows on a tape.
#[derive(Clone)]
pub(crate) struct Recorded<B: DecoderBackend> {
    value: Tensor<B, 2>,
    id: usize,
}

/// An operation, by the ids of its operands and its result.
enum Step<B: DecoderBackend> {
    Project {
        layer: LayerName,
        weight: Tensor<B, 2>,
        outputs: Range<usize>,
        x: Recorded<B>,
    },
    Norm {
        norm: Rc<B::Norm>,
        x: Recorded<B>,
    },
    Rotate {
        rotary: Rc<Rotary<B>>,
        tokens: usize,
        x: usize,
    },
    Attend {
        of: [Recorded<B>; 3],
        tokens: usize,
        shape: AttentionShape,
    },
    Gate {
        gate: Recorded<B>,
        up: Recorded<B>,
        activation: Activation,
    },
    Activate {
        x: Recorded<B>,
        activation: Activation,
    },
    Add {
        x: usize,
        y: usize,
        factor: f32,
    },
    Scale {
        x: usize,
        factor: f32,
    },
}

/// The operations of a pass, in their order.
pub(crate) struct Tape<'a, B: GradientBackend> {
    on: &'a B::Context,
    steps: Vec<(usize, Step<B>)>, // with the id of the result
    ids: usize,
}

impl<'a, B: GradientBackend> Tape<'a, B> {
    pub fn new(on: &'a B::Context) -> Self {
        Tape {
            on,
            steps: Vec::new(),
            ids: 0,
        }
    }

    fn next(&mut self, value: Tensor<B, 2>) -> Recorded<B> {
        self.ids += 1;
        Recorded {
            value,
            id: self.ids,
        }
    }

    fn push(&mut self, value: Tensor<B, 2>, step: Step<B>) -> Recorded<B> {
        let result = self.next(value);
        self.steps.push((result.id, step));
        result
    }

    /// Walks back from `dy`, the gradient at `output`.
    pub fn backward(self, output: &Recorded<B>, dy: Tensor<B, 2>, sink: &mut dyn GradientSink) {
        let on = self.on;
        let mut gradients = Gradients::<B> {
            on,
            by_id: BTreeMap::from([(output.id, dy)]),
        };
        for (result, step) in self.steps.into_iter().rev() {
            let Some(dy) = gradients.by_id.remove(&result) else {
                continue; // nothing that counts came of it
            };
            match step {
                Step::Project {
                    layer,
                    weight,
                    outputs,
                    x,
                } => {
                    let rows = dy.dims()[0];
                    B::show(&x.value, &mut |x| {
                        B::show(&dy, &mut |dy| {
                            sink.gradient(&layer, outputs.clone(), x, dy, rows);
                        });
                    });
                    let dx = B::project_backward(on, &dy, &weight, outputs);
                    gradients.add(x.id, dx);
                }
                Step::Norm { norm, x } => {
                    let dx = B::norm_backward(on, &dy, &x.value, &norm);
                    gradients.add(x.id, dx);
                }
                Step::Rotate { rotary, tokens, x } => {
                    let transposed = rotary.transposed.as_ref();
                    let transposed = transposed.expect("tables of gradients have transposes");
                    gradients.add(x, B::rotate(on, dy, transposed, tokens));
                }
                Step::Attend { of, tokens, shape } => {
                    let [q, k, v] = of.each_ref().map(|operand| &operand.value);
                    let gradient = B::attend_backward(on, &dy, [q, k, v], tokens, shape);
                    for (operand, gradient) in of.iter().zip(gradient) {
                        gradients.add(operand.id, gradient);
                    }
                }
                Step::Gate {
                    gate,
                    up,
                    activation,
                } => {
                    let of = [gate.value, up.value];
                    let [d_gate, d_up] = B::gate_backward(on, &dy, of, activation);
                    gradients.add(gate.id, d_gate);
                    gradients.add(up.id, d_up);
                }
                Step::Activate { x, activation } => {
                    let dx = B::activate_backward(on, &dy, x.value, activation);
                    gradients.add(x.id, dx);
                }
                Step::Add { x, y, factor } => {
                    let scaled = match factor == 1.0 {
                        true => B::duplicate(on, &dy),
                        false => B::scale(on, B::duplicate(on, &dy), factor),
                    };
                    gradients.add(y, scaled);
                    gradients.add(x, dy);
                }
                Step::Scale { x, factor } => gradients.add(x, B::scale(on, dy, factor)),
            }
        }
    }
}

/// Gradients of results whose operations were not walked back yet.
struct Gradients<'a, B: DecoderBackend> {
    on: &'a B::Context,
    by_id: BTreeMap<usize, Tensor<B, 2>>,
}

impl<B: DecoderBackend> Gradients<'_, B> {
    /// Adds to the gradient of a result: it may have several readers.
    fn add(&mut self, id: usize, gradient: Tensor<B, 2>) {
        let sum = match self.by_id.remove(&id) {
            Some(before) => B::add(self.on, before, gradient, 1.0),
            None => gradient,
        };
        self.by_id.insert(id, sum);
    }
}

impl<B: GradientBackend> Operations<B> for Tape<'_, B> {
    type Value = Recorded<B>;

    fn constant(&mut self, x: Tensor<B, 2>) -> Recorded<B> {
        self.next(x)
    }

    fn tensor(value: &Recorded<B>) -> &Tensor<B, 2> {
        &value.value
    }

    fn operands(&mut self, linears: &Linears<B>, x: &Recorded<B>) -> Vec<Recorded<B>> {
        let values = linears.project(self.on, &x.value);
        let mut operands: Vec<Recorded<B>> = Vec::with_capacity(values.len());
        for (at, value) in values.into_iter().enumerate() {
            let piece = &linears.operands[at];
            let before = &linears.operands[..at];
            // Keys may also be values: one product, whose gradient is that of both.
            if let Some(first) = before.iter().position(|other| other == piece) {
                let id = operands[first].id;
                operands.push(Recorded { value, id });
                continue;
            }
            let linear = &linears.linears[piece.linear];
            let step = Step::Project {
                layer: linear.spec.name.clone(),
                weight: linear.weight.clone(),
                outputs: piece.columns.clone(),
                x: x.clone(),
            };
            operands.push(self.push(value, step));
        }
        operands
    }

    fn norm(&mut self, x: &Recorded<B>, norm: &Rc<B::Norm>) -> Recorded<B> {
        let value = B::norm(self.on, &x.value, norm);
        let (norm, x) = (norm.clone(), x.clone());
        self.push(value, Step::Norm { norm, x })
    }

    // The rows of a rotation come from a product or a norm, whose gradients do not need them.
    fn rotate(&mut self, x: Recorded<B>, rotary: &Rc<Rotary<B>>, tokens: usize) -> Recorded<B> {
        let value = B::rotate(self.on, x.value, &rotary.table, tokens);
        let (rotary, x) = (rotary.clone(), x.id);
        self.push(value, Step::Rotate { rotary, tokens, x })
    }

    fn attend(
        &mut self,
        q: &Recorded<B>,
        k: &Recorded<B>,
        v: &Recorded<B>,
        tokens: usize,
        shape: AttentionShape,
    ) -> Recorded<B> {
        let value = B::attend(self.on, &q.value, &k.value, &v.value, tokens, shape);
        let of = [q, k, v].map(Recorded::clone);
        self.push(value, Step::Attend { of, tokens, shape })
    }

    fn gate(&mut self, gate: Recorded<B>, up: &Recorded<B>, activation: Activation) -> Recorded<B> {
        let value = B::gate(
            self.on,
            B::duplicate(self.on, &gate.value),
            &up.value,
            activation,
        );
        let up = up.clone();
        let step = Step::Gate {
            gate,
            up,
            activation,
        };
        self.push(value, step)
    }

    fn activate(&mut self, x: Recorded<B>, activation: Activation) -> Recorded<B> {
        let value = B::activate(self.on, B::duplicate(self.on, &x.value), activation);
        self.push(value, Step::Activate { x, activation })
    }

    fn add(&mut self, x: Recorded<B>, y: Recorded<B>, factor: f32) -> Recorded<B> {
        let value = B::add(self.on, B::duplicate(self.on, &x.value), y.value, factor);
        let (x, y) = (x.id, y.id);
        self.push(value, Step::Add { x, y, factor })
    }

    fn scale(&mut self, x: Recorded<B>, factor: f32) -> Recorded<B> {
        let value = B::scale(self.on, B::duplicate(self.on, &x.value), factor);
        self.push(value, Step::Scale { x: x.id, factor })
    }
}
