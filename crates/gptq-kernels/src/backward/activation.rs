//! Gradients of the nonlinearities of a feed-forward.

use pulp::Simd;
use rayon::prelude::*;

use crate::elementwise::Activation;
use crate::real::Real;
use crate::vector::{Kernel, run_widest};

/// Elements handed to one task.
const CHUNK: usize = 1 << 14;

/// The gradients of [`gated`](crate::gated), in the place of its inputs: `gate` and `up`, as they were
/// before it, become `dy up f'(gate)` and `dy f(gate)`. All are equally long (SwiGLU, GeGLU: Shazeer 2020).
///
/// # Panics
/// If they are not.
pub fn gated_backward<R: Real>(dy: &[R], gate: &mut [R], up: &mut [R], activation: Activation) {
    assert_eq!((dy.len(), up.len()), (gate.len(), gate.len()), "elements");
    (gate.par_chunks_mut(CHUNK))
        .zip(up.par_chunks_mut(CHUNK))
        .zip(dy.par_chunks(CHUNK))
        .for_each(|((gate, up), dy)| {
            run_widest(Gated {
                dy,
                gate,
                up,
                activation,
            });
        });
}

/// The gradient of [`activate`](crate::activate), in the place of its input: `x`, as it was before it,
/// becomes `dy f'(x)`.
///
/// # Panics
/// If `dy` is not as long as `x`.
pub fn activate_backward<R: Real>(dy: &[R], x: &mut [R], activation: Activation) {
    assert_eq!(dy.len(), x.len(), "elements");
    (x.par_chunks_mut(CHUNK))
        .zip(dy.par_chunks(CHUNK))
        .for_each(|(x, dy)| run_widest(Activated { dy, x, activation }));
}

/// `x sigmoid(x)` and its derivative.
#[inline(always)]
fn silu<R: Real>(x: R) -> (R, R) {
    let sigmoid = R::ONE / (R::ONE + (-x).exp());
    let value = x * sigmoid;
    (value, sigmoid + value * (R::ONE - sigmoid))
}

/// `0.5 x (1 + tanh(u))` with `u = sqrt(2 / pi) (x + 0.044715 x^3)`, and its derivative.
#[inline(always)]
fn gelu_tanh<R: Real>(x: R) -> (R, R) {
    let root = R::of(0.797_884_560_802_865_4); // sqrt(2 / pi)
    let cubic = R::of(0.044_715);
    let half = R::of(0.5);
    // Beyond, tanh is 1 to the last bit, and the square of a larger x might be infinite.
    let far = R::of(30.0);
    let bounded = if x < -far { -far } else { x };
    let bounded = if bounded > far { far } else { bounded };
    let square = bounded * bounded;
    let tanh = (root * bounded * (R::ONE + cubic * square)).tanh();
    let inner = root * (R::ONE + R::of(3.0) * cubic * square);
    let share = half * (R::ONE + tanh);
    let slope = share + half * bounded * (R::ONE - tanh * tanh) * inner;
    (x * share, slope)
}

struct Gated<'a, R> {
    dy: &'a [R],
    gate: &'a mut [R],
    up: &'a mut [R],
    activation: Activation,
}

impl<R: Real> Kernel for Gated<'_, R> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let places = self.gate.iter_mut().zip(self.up).zip(self.dy);
        match self.activation {
            Activation::Silu => {
                for ((gate, up), &dy) in places {
                    let (value, slope) = silu(*gate);
                    (*gate, *up) = (dy * *up * slope, dy * value);
                }
            }
            Activation::GeluTanh => {
                for ((gate, up), &dy) in places {
                    let (value, slope) = gelu_tanh(*gate);
                    (*gate, *up) = (dy * *up * slope, dy * value);
                }
            }
        }
    }
}

struct Activated<'a, R> {
    dy: &'a [R],
    x: &'a mut [R],
    activation: Activation,
}

impl<R: Real> Kernel for Activated<'_, R> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let places = self.x.iter_mut().zip(self.dy);
        match self.activation {
            Activation::Silu => {
                for (x, &dy) in places {
                    *x = dy * silu(*x).1;
                }
            }
            Activation::GeluTanh => {
                for (x, &dy) in places {
                    *x = dy * gelu_tanh(*x).1;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backward::definition::{
        SINGLE, activate, assert_derivative, assert_near, gated, on_threads, random, single,
    };

    const ALL: [Activation; 2] = [Activation::Silu, Activation::GeluTanh];
    /// More than a task.
    const LONG: usize = 2 * CHUNK + 77;

    /// From -6 to 6.
    fn inputs(seed: u64) -> Vec<f64> {
        random(LONG, seed).iter().map(|x| 6.0 * x).collect()
    }

    #[test]
    fn gradients_of_every_activation_are_its_derivatives() {
        let (x, dy) = (inputs(1), random(LONG, 2));
        for activation in ALL {
            let mut y = single(&x);
            crate::activate(&mut y, activation);
            assert_near(&y, &activate(&x, activation), 1e-5, "the forward pass");
            let mut dx = x.clone();
            activate_backward(&dy, &mut dx, activation);
            let name = format!("{activation:?}");
            assert_derivative(|x| activate(x, activation), &x, &dy, &dx, &name);
            let run = |threads| {
                on_threads(threads, || {
                    let mut dx = single(&x);
                    activate_backward(&single(&dy), &mut dx, activation);
                    dx
                })
            };
            let one = run(1);
            assert_near(&one, &dx, SINGLE, &name);
            assert_eq!(one, run(2));
        }
    }

    #[test]
    fn gradients_of_every_gate_are_its_derivatives() {
        let (gate, up, dy) = (inputs(3), random(LONG, 4), random(LONG, 5));
        for activation in ALL {
            let mut y = single(&gate);
            crate::gated(&mut y, &single(&up), activation);
            let want = gated(&gate, &up, activation);
            assert_near(&y, &want, 1e-5, "the forward pass");
            let (mut d_gate, mut d_up) = (gate.clone(), up.clone());
            gated_backward(&dy, &mut d_gate, &mut d_up, activation);
            let name = format!("{activation:?}");
            assert_derivative(
                |gate| gated(gate, &up, activation),
                &gate,
                &dy,
                &d_gate,
                &name,
            );
            assert_derivative(|up| gated(&gate, up, activation), &up, &dy, &d_up, &name);
            let run = |threads| {
                on_threads(threads, || {
                    let (mut d_gate, mut d_up) = (single(&gate), single(&up));
                    gated_backward(&single(&dy), &mut d_gate, &mut d_up, activation);
                    (d_gate, d_up)
                })
            };
            let one = run(1);
            assert_near(&one.0, &d_gate, SINGLE, &name);
            assert_near(&one.1, &d_up, SINGLE, &name);
            assert_eq!(one, run(2));
        }
    }

    /// Far from 0 an activation is a line, and nothing overflows on the way there.
    #[test]
    fn far_from_zero_slopes_are_one_and_zero() {
        for activation in ALL {
            let mut x = [0.0f32, 40.0, -40.0, 1e10, -1e10, 1e30, -1e30];
            activate_backward(&[1.0; 7], &mut x, activation);
            for (got, want) in x.iter().zip([0.5, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0]) {
                assert!((got - want).abs() < 1e-6, "{activation:?}: {x:?}");
            }
        }
    }
}
