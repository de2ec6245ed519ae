//! Gradients of a decoder block's operations, for training its latents and scales.
//!
//! Each file has the backward pass of one forward file of this crate: from `dy`, the gradient of a loss with
//! respect to an operation's output, those with respect to its inputs (`d` before a name is the gradient of
//! what it names). Nothing of the forward pass is kept but its inputs: what else is needed is computed
//! again. Gradients of activations are returned or take the place of what they belong to; gradients of
//! parameters are added to, so that they sum over the batches of a step.
//!
//! All are generic over [`Real`](crate::Real). Sums have one order for any number of threads; those over
//! rows are split after a fixed number of rows.

mod activation;
mod adam;
mod attention;
#[cfg(test)]
mod definition;
mod error;
mod norm;
mod product;
mod rotation;
mod rounding;

pub use activation::{activate_backward, gated_backward};
#[cfg(feature = "cuda")]
pub(crate) use adam::AdamStep;
pub use adam::{Adam, LearningRates, cosine_decay};
pub use attention::{AttentionGradients, causal_attention_backward};
pub use error::{RowScale, output_error, output_error_backward, row_squares};
pub use norm::{NormGradients, layer_norm_backward, rms_norm_backward};
pub use product::{bias_backward, product_input_backward, product_weight_backward};
pub use rounding::{TrainedGrids, nearest_latent, stored_scale};
