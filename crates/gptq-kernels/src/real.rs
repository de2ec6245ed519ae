//! The two precisions of the gradients: f32, in which blocks are trained, and f64, in which the formulas are
//! held against differences of the forward pass.

use std::fmt::Debug;
use std::iter::Sum;
use std::ops::{Add, AddAssign, Div, Mul, MulAssign, Neg, Sub};

use faer::{Accum, MatMut, MatRef, Par, linalg::matmul::matmul};
use half::f16;

/// `f32` or `f64`.
pub trait Real:
    Product
    + Copy
    + Debug
    + PartialOrd
    + Send
    + Sync
    + From<f32>
    + Into<f64>
    + Sum
    + Add<Output = Self>
    + AddAssign
    + Sub<Output = Self>
    + Mul<Output = Self>
    + MulAssign
    + Div<Output = Self>
    + Neg<Output = Self>
{
    /// 0.
    const ZERO: Self;
    /// 1.
    const ONE: Self;
    /// Less than all others.
    const NEG_INFINITY: Self;
    /// 1.5 times the power of two above which there are no halves: adding it rounds to whole numbers, half
    /// to even.
    const ROUND: Self;

    /// The nearest value.
    fn of(value: f64) -> Self;

    /// `e^x`; in f32 that of [`crate::exp`].
    fn exp(self) -> Self;

    /// `tanh(x)`.
    fn tanh(self) -> Self;

    /// `sqrt(x)`.
    fn sqrt(self) -> Self;

    /// The larger one; what is not a number loses.
    fn max(self, other: Self) -> Self;

    /// The nearest f16, half to even.
    fn to_f16(self) -> f16;

    /// A whole number from 0 to 255.
    fn to_code(self) -> u8;

    /// The next larger value.
    fn next_up(self) -> Self;

    /// The next smaller value.
    fn next_down(self) -> Self;
}

/// Products through faer, for each precision by its own name: nobody else has to spell faer's bounds. It has
/// no name outside of the crate, so there are no other precisions.
pub trait Product: Sized {
    /// `out = alpha a b`, or `out += alpha a b`.
    #[doc(hidden)]
    fn multiply_into(
        out: MatMut<'_, Self>,
        accum: Accum,
        alpha: Self,
        a: MatRef<'_, Self>,
        b: MatRef<'_, Self>,
        par: Par,
    );
}

macro_rules! real {
    ($real:ident, $exp:expr, $tanh:expr, $round:expr, $to_f16:expr) => {
        impl Real for $real {
            const ZERO: Self = 0.0;
            const ONE: Self = 1.0;
            const NEG_INFINITY: Self = $real::NEG_INFINITY;
            const ROUND: Self = $round;

            #[inline(always)]
            fn of(value: f64) -> Self {
                value as $real
            }

            #[inline(always)]
            fn exp(self) -> Self {
                $exp(self)
            }

            #[inline(always)]
            fn tanh(self) -> Self {
                $tanh(self)
            }

            #[inline(always)]
            fn sqrt(self) -> Self {
                $real::sqrt(self)
            }

            #[inline(always)]
            fn max(self, other: Self) -> Self {
                $real::max(self, other)
            }

            #[inline(always)]
            fn to_f16(self) -> f16 {
                $to_f16(self)
            }

            #[inline(always)]
            fn to_code(self) -> u8 {
                self as u8
            }

            #[inline(always)]
            fn next_up(self) -> Self {
                $real::next_up(self)
            }

            #[inline(always)]
            fn next_down(self) -> Self {
                $real::next_down(self)
            }
        }

        impl Product for $real {
            fn multiply_into(
                out: MatMut<'_, Self>,
                accum: Accum,
                alpha: Self,
                a: MatRef<'_, Self>,
                b: MatRef<'_, Self>,
                par: Par,
            ) {
                matmul(out, accum, a, b, alpha, par);
            }
        }
    };
}

real!(
    f32,
    crate::vector::exp,
    crate::vector::tanh,
    12_582_912.0,
    f16::from_f32
);
real!(
    f64,
    f64::exp,
    f64::tanh,
    6_755_399_441_055_744.0,
    f16::from_f64
);
