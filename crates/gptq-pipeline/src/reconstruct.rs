//! Block reconstruction: the latents and scales of a block are trained until its output on quantized inputs
//! comes as near as they can bring it to the output of the float block on float inputs.
//!
//! The sweep looks at one linear at a time, and its error is that of the linear's own output. What counts is
//! what the block passes on: here the linears of a block make up for each other (BRECQ, Li et al. 2021,
//! arXiv:2102.05426; auto-round, Cheng et al. 2023, arXiv:2309.05516). Training starts from the latents of the
//! sweep, so a few epochs of Adam are enough. After each epoch the error is measured on windows held out of it,
//! and the block keeps the best epoch, or what the solver left where none is better.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Instant;

use gptq_model::{Activations, GradientSink, Trainer};
use gptq_quantizer::{LearningRates, TrainedLinear, cosine_decay};
use gptq_types::{Bits, BlockTraining, LayerName};

use crate::PipelineError;
use crate::estimate::held_out;
use crate::layers::named;

/// Gradients at the block's output are brought near to this, over the size of the outputs: f16 has as much room
/// above as below it.
const GRADIENT: f64 = 1.0 / 16.0;

/// The linears of a block that are trained, by name.
pub(crate) type Linears<'a> = BTreeMap<&'a LayerName, &'a mut Box<dyn TrainedLinear>>;

/// Learning rates of the first step, as parts of the median scale of the block: of a few that were tried those with
/// the lowest error of the last block on held-out windows (docs/ACCURACY.md).
fn rates(bits: Bits) -> LearningRates {
    let latents = match bits {
        Bits::Two => 0.005,
        Bits::Three | Bits::Four | Bits::Eight => 0.01,
    };
    LearningRates {
        latents,
        scales: latents / 5.0,
    }
}

/// Trains the resident block, whose linears were all solved, for `epochs`, and keeps the best one. The trainer's
/// float stream is behind the block; its other stream is brought there by the caller.
pub(crate) fn reconstruct(
    trainer: &mut dyn Trainer,
    linears: Linears<'_>,
    block: usize,
    bits: Bits,
    epochs: u32,
    progress: &mut dyn FnMut(usize),
) -> Result<BlockTraining, PipelineError> {
    let start = Instant::now();
    let mut training = Training::new(trainer, linears, bits, epochs as usize)?;
    let (mut errors, mut kept, mut diverged) = (Vec::new(), 0, None);
    for epoch in 0..=epochs as usize {
        if epoch > 0 {
            training.epoch(block, epoch - 1)?;
        }
        let error = training.error()?;
        if !error.is_finite() {
            diverged = Some(epoch);
            break;
        }
        if epoch == 0 {
            training.set_factor(error);
        } else {
            progress(epoch);
        }
        errors.push(error);
        if epoch == 0 || error < errors[kept] {
            kept = epoch;
            training.keep()?;
        }
    }
    let ended_in = errors.len().checked_sub(1);
    if diverged.is_some_and(|epoch| epoch > 0) || ended_in.is_some_and(|last| last != kept) {
        training.restore()?;
    }
    Ok(BlockTraining {
        block,
        errors,
        kept,
        diverged,
        tokens: training.tokens(&training.trained),
        held_out: match training.holds_out {
            true => training.tokens(&training.measured),
            false => 0,
        },
        seconds: start.elapsed().as_secs_f64(),
    })
}

struct Training<'a> {
    trainer: &'a mut dyn Trainer,
    linears: Linears<'a>,
    /// Batches of each step, and of each that errors are measured on.
    trained: Vec<Range<usize>>,
    measured: Vec<Range<usize>>,
    holds_out: bool,
    rates: LearningRates,
    /// Steps in all.
    steps: usize,
    factor: f32,
}

/// Hands gradients to the linears that are trained.
struct Sink<'a, 'b>(&'a mut Linears<'b>);

impl GradientSink for Sink<'_, '_> {
    fn gradient(
        &mut self,
        layer: &LayerName,
        outputs: Range<usize>,
        x: Activations<'_>,
        dy: Activations<'_>,
        rows: usize,
    ) {
        if let Some(linear) = self.0.get_mut(layer) {
            linear.gradient(outputs, x, dy, rows);
        }
    }
}

impl<'a> Training<'a> {
    fn new(
        trainer: &'a mut dyn Trainer,
        linears: Linears<'a>,
        bits: Bits,
        epochs: usize,
    ) -> Result<Self, PipelineError> {
        let mut trained = trainer.steps();
        let held_out = held_out(trained.len());
        let measured = trained.split_off(trained.len() - held_out);
        let median = median_scale(&linears)?;
        let rates = rates(bits);
        Ok(Training {
            trainer,
            linears,
            steps: epochs * trained.len(),
            measured: match held_out {
                0 => trained.clone(),
                _ => measured,
            },
            trained,
            holds_out: held_out != 0,
            rates: LearningRates {
                latents: rates.latents * median,
                scales: rates.scales * median,
            },
            factor: 1.0,
        })
    }

    fn tokens(&self, steps: &[Range<usize>]) -> usize {
        let windows = steps.iter().cloned().flatten();
        let windows = windows.flat_map(|batch| self.trainer.batch_windows(batch));
        windows.map(Vec::len).sum()
    }

    /// Brings gradients near to [`GRADIENT`]; Adam does not see a factor.
    fn set_factor(&mut self, error: f64) {
        let factor = (GRADIENT / error.sqrt()).log2().round();
        self.factor = factor.clamp(-40.0, 40.0).exp2() as f32;
    }

    /// Puts the rounded weights into the block.
    fn round(&mut self) -> Result<(), PipelineError> {
        for (layer, linear) in &self.linears {
            let weight = self.trainer.weight(layer)?;
            let values = linear.rounded(&weight).map_err(named(layer))?;
            if let Some(values) = values {
                self.trainer.replace_weight(layer, values)?;
            }
        }
        Ok(())
    }

    /// One pass over the trained windows in an order of its own.
    fn epoch(&mut self, block: usize, epoch: usize) -> Result<(), PipelineError> {
        let count = self.trained.len();
        let order = shuffled(count, ((block as u64) << 32) | epoch as u64);
        for (done, step) in order.into_iter().enumerate() {
            let decay = cosine_decay(epoch * count + done, self.steps);
            let rates = LearningRates {
                latents: decay * self.rates.latents,
                scales: decay * self.rates.scales,
            };
            self.round()?;
            (self.linears.values_mut()).for_each(|linear| linear.begin_step(rates));
            for batch in self.trained[step].clone() {
                let mut sink = Sink(&mut self.linears);
                self.trainer.train(batch, self.factor, &mut sink)?;
            }
            for (layer, linear) in &mut self.linears {
                linear.end_step().map_err(named(layer))?;
            }
        }
        Ok(())
    }

    /// Error of the block's output, relative to the float block's.
    fn error(&mut self) -> Result<f64, PipelineError> {
        self.round()?;
        let mut error = 0.0;
        for batch in self.measured.iter().cloned().flatten() {
            error += self.trainer.output_error(batch)?;
        }
        let elements = self.tokens(&self.measured) * self.trainer.spec().hidden_size;
        Ok(error / elements as f64)
    }

    fn keep(&mut self) -> Result<(), PipelineError> {
        for (layer, linear) in &mut self.linears {
            linear.keep().map_err(named(layer))?;
        }
        Ok(())
    }

    fn restore(&mut self) -> Result<(), PipelineError> {
        for (layer, linear) in &mut self.linears {
            linear.restore().map_err(named(layer))?;
        }
        self.round()
    }
}

/// The median of the absolute scales of all linears, the lower one of two.
fn median_scale(linears: &Linears<'_>) -> Result<f64, PipelineError> {
    let mut scales = Vec::new();
    for (layer, linear) in linears {
        let of_layer = linear.scales().map_err(named(layer))?;
        scales.extend(of_layer.into_iter().map(f32::abs));
    }
    let middle = scales.len().saturating_sub(1) / 2;
    let (_, median, _) = scales.select_nth_unstable_by(middle, f32::total_cmp);
    Ok(f64::from(*median))
}

/// The numbers below `count` in an order that `seed` decides (Fisher and Yates, on SplitMix64).
fn shuffled(count: usize, seed: u64) -> Vec<usize> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    };
    let mut order: Vec<usize> = (0..count).collect();
    for last in (1..count).rev() {
        order.swap(last, (next() % (last as u64 + 1)) as usize);
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_epoch_of_every_block_takes_all_steps_in_an_order_of_its_own() {
        let mut seen = std::collections::BTreeSet::new();
        for seed in (0..4u64).flat_map(|block| (0..4).map(move |epoch| (block << 32) | epoch)) {
            let order = shuffled(28, seed);
            let mut sorted = order.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..28).collect::<Vec<_>>());
            assert_eq!(order, shuffled(28, seed));
            seen.insert(order);
        }
        assert_eq!(seen.len(), 16);
        assert_eq!(shuffled(1, 7), [0]);
        assert!(shuffled(0, 7).is_empty());
    }
}
