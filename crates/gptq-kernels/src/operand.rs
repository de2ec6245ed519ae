//! Where the operands of a solver lie: in host memory, or on the GPU where a forward pass left them.

use crate::cuda::DeviceMatrix;

/// The inputs of a linear, where the forward pass has them.
#[derive(Clone, Copy, Debug)]
pub enum Activations<'a> {
    /// Row-major `[tokens, in_features]` in host memory.
    Host(&'a [f32]),
    /// `[tokens, in_features]` on the GPU.
    Device(DeviceMatrix<'a>),
}

/// The weight of a linear, where the forward pass has it.
#[derive(Clone, Debug)]
pub enum Weight<'a> {
    /// `[in_features, out_features]` row-major in host memory.
    Host(Vec<f32>),
    /// `[out_features, in_features]` on the GPU; the solver may write the rounded weight over it.
    Device(DeviceMatrix<'a>),
}

/// Tokens of a stretch, see [`stretch_of`].
const STRETCH: usize = 8192;

/// The place, 0 to 7, of the stretch that the token number `start` of a pass lies in. What needs not all
/// tokens takes some of every eight stretches, so that it sees all of the text, and the same tokens on
/// every device: batches begin where windows do and are no longer than a stretch.
pub fn stretch_of(start: usize) -> usize {
    start / STRETCH % 8
}

/// Sees the inputs of the linears of one capture group, one batch of tokens after the other.
pub trait ActivationSink {
    /// `x` has `tokens` rows of `in_features`; padding is never among the tokens.
    fn observe(&mut self, x: Activations<'_>, tokens: usize, in_features: usize);

    /// The same rows with their float partners: what they would be had no linear before been rounded.
    fn observe_pair(
        &mut self,
        x: Activations<'_>,
        float: Activations<'_>,
        tokens: usize,
        in_features: usize,
    ) {
        let _ = float;
        self.observe(x, tokens, in_features);
    }
}
