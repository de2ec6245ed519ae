//! One group of linears that share an input: from Hessian to codes.

use std::sync::Arc;
use std::time::Instant;

use gptq_model::{CaptureGroup, Decoder, DeviceContext, LinearSpec, ModelSpec, Streams};
use gptq_quantizer::{
    After, FactorStats, GroupHessian, GroupSum, HostGroup, Order, PendingLayer, QuantizeError,
    RoundedLayer, TrainedLinear,
};
use gptq_types::{
    BlockTraining, ColumnOrder, LayerName, LayerRecord, Phase, PhaseTimes, QuantSpec, Warning,
};

use crate::estimate::{SQUARED, followed};
use crate::fold::Fold;
use crate::write::Output;
use crate::{Job, PipelineError, Progress};

/// Linears of a capture group that are stored once their block is trained.
struct TrainedGroup {
    linears: Vec<(LayerName, Box<dyn TrainedLinear>)>,
    fold: Option<Fold>,
    folded: Option<Arc<[u32]>>,
}

/// Quantizes the linears of a block under one setting, group by group.
pub struct LayerWork<'a> {
    spec: &'a QuantSpec,
    model: &'a ModelSpec,
    index: usize,
    writer: &'a dyn Output,
    all_tokens: usize,
    /// Rounded linears whose outputs a later group may permute.
    waiting: Vec<(LayerName, PendingLayer)>,
    trained: Vec<TrainedGroup>,
    pub layers: Vec<LayerRecord>,
    pub warnings: Vec<Warning>,
}

impl<'a> LayerWork<'a> {
    /// Starts block `index`.
    pub fn new(job: &'a Job, model: &'a ModelSpec, index: usize, writer: &'a dyn Output) -> Self {
        LayerWork {
            spec: &job.spec,
            model,
            index,
            writer,
            all_tokens: tokens(job),
            waiting: Vec::new(),
            trained: Vec::new(),
            layers: Vec::new(),
            warnings: Vec::new(),
        }
    }

    /// Solves the linears of a group whose inputs were observed.
    pub fn solve(
        &mut self,
        decoder: &mut dyn Decoder,
        group: &CaptureGroup,
        hessian: &mut dyn GroupHessian,
        after: After,
        times: &mut PhaseTimes,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<(), PipelineError> {
        let linears = &group.linears;
        let (first, in_features) = (&linears[0].name, group.in_features());
        let fold = match self.spec.order.may_fold() {
            true => Fold::of(self.model, self.index, group.tap, self.spec.group_size),
            false => None,
        };
        let (name, order) = self.order(decoder, linears, hessian, fold.as_ref(), times)?;
        let folded = match (name, &fold) {
            (ColumnOrder::Folded, Some(_)) => {
                Some((order.channels.iter().map(|&c| c as u32)).collect::<Arc<[u32]>>())
            }
            _ => None,
        };
        let solver = hessian.factor_in(order, self.spec, times);
        let solver = solver.map_err(named(first))?;
        let stats = solver.stats();
        let mut trained = Vec::new();
        self.warn_about(stats, first, in_features);

        for linear in linears {
            let LinearSpec {
                name: layer,
                in_features,
                out_features,
                ..
            } = linear;
            let weight = decoder.weight(layer)?;
            let start = Instant::now();
            let rounded = solver
                .round(weight, *out_features, self.spec, after, times)
                .map_err(named(layer))?;
            if let Some(values) = rounded.replacement {
                decoder.replace_weight(layer, values)?;
            }
            let record = LayerRecord {
                layer: layer.clone(),
                in_features: *in_features,
                out_features: *out_features,
                tokens: stats.tokens,
                token_share: stats.tokens as f64 / self.all_tokens as f64,
                loss: Some(rounded.loss),
                solve_seconds: start.elapsed().as_secs_f64(),
                order: (self.spec.order == ColumnOrder::Auto).then_some(name),
                folded: folded.as_ref().map(|channels| channels.to_vec()),
            };
            match rounded.layer {
                RoundedLayer::Final(pending) => self.store(layer, pending, folded.clone())?,
                RoundedLayer::Trained(linear) => trained.push((layer.clone(), linear)),
            }
            if record.is_worse_than_rtn() {
                let text = "the GPTQ error is above that of rounding to nearest".to_string();
                self.warn(&record.layer, text);
            }
            progress(Progress::Layer { record: &record });
            self.layers.push(record);
        }
        if after == After::Train {
            self.trained.push(TrainedGroup {
                linears: trained,
                fold,
                folded,
            });
            return Ok(());
        }
        match fold {
            Some(fold) => self.store_waiting(&fold, folded.as_deref()),
            None => Ok(()),
        }
    }

    /// The block.
    pub fn index(&self) -> usize {
        self.index
    }

    /// Warns of a block that training did not improve, or whose epochs could not be told apart on other windows.
    pub fn judge(&mut self, training: &BlockTraining) {
        let block = self.model.blocks[self.index].linears().next();
        let Some(first) = block.map(|linear| linear.name.clone()) else {
            return;
        };
        if training.held_out == 0 && self.index == 0 {
            let text = "the windows are too few to hold any out of training: epochs were chosen on trained ones";
            self.warn(&first, text.to_string());
        }
        if training.diverged == Some(0) {
            let text = format!(
                "the output of block {} is not finite: it was not trained",
                training.block
            );
            self.warn(&first, text);
        } else if let Some(epoch) = training.diverged {
            let text = format!(
                "training of block {} diverged in epoch {epoch}: epoch {} was kept",
                training.block, training.kept
            );
            self.warn(&first, text);
        } else if training.kept == 0 {
            let text = format!(
                "no epoch of training lowered the error of block {}: it is as the solver left it",
                training.block
            );
            self.warn(&first, text);
        }
    }

    /// The linears that were solved with [`After::Train`].
    pub fn trained(&mut self) -> impl Iterator<Item = (&LayerName, &mut Box<dyn TrainedLinear>)> {
        let linears = self.trained.iter_mut().flat_map(|group| &mut group.linears);
        linears.map(|(layer, linear)| (&*layer, linear))
    }

    /// Hands over the linears of a trained block.
    pub fn store_trained(&mut self) -> Result<(), PipelineError> {
        for group in std::mem::take(&mut self.trained) {
            for (layer, linear) in group.linears {
                let solved = linear.finish().map_err(named(&layer))?;
                self.store(&layer, Box::new(|| Ok(solved)), group.folded.clone())?;
            }
            if let Some(fold) = group.fold {
                self.store_waiting(&fold, group.folded.as_deref())?;
            }
        }
        Ok(())
    }

    /// The order of a group under the name of what was chosen.
    fn order(
        &mut self,
        decoder: &dyn Decoder,
        linears: &[LinearSpec],
        hessian: &mut dyn GroupHessian,
        fold: Option<&Fold>,
        times: &mut PhaseTimes,
    ) -> Result<(ColumnOrder, Order), PipelineError> {
        let (spec, diagonal) = (self.spec, hessian.diagonal());
        let simple = |order| (order, Order::new(order, spec.group_size, &diagonal));
        let folded = |fold: &Fold| {
            let order = fold.order(spec.group_size, &diagonal);
            (ColumnOrder::Folded, order)
        };
        match spec.order {
            ColumnOrder::Folded => Ok(fold.map_or(simple(ColumnOrder::Natural), folded)),
            ColumnOrder::Auto => {
                let trivial = [
                    ColumnOrder::Natural,
                    ColumnOrder::ActOrderStaticGroups,
                    ColumnOrder::GroupAware,
                ];
                let mut candidates: Vec<_> = trivial.map(simple).into();
                candidates.extend(fold.map(folded));
                let at = self.choose(decoder, linears, hessian, &candidates, times)?;
                // Names stay; the diagonal is now that of all tokens.
                let (name, _) = candidates.swap_remove(at);
                let diagonal = hessian.diagonal();
                Ok(match (name, fold) {
                    (ColumnOrder::Folded, Some(fold)) => {
                        (name, fold.order(spec.group_size, &diagonal))
                    }
                    _ => (name, Order::new(name, spec.group_size, &diagonal)),
                })
            }
            order => Ok(simple(order)),
        }
    }

    /// Picks the best order on held-out tokens; without any, the first one, with a warning.
    fn choose(
        &mut self,
        decoder: &dyn Decoder,
        linears: &[LinearSpec],
        hessian: &mut dyn GroupHessian,
        candidates: &[(ColumnOrder, Order)],
        times: &mut PhaseTimes,
    ) -> Result<usize, PipelineError> {
        let first = &linears[0].name;
        let orders: Vec<Order> = candidates.iter().map(|(_, order)| order.clone()).collect();
        let weights = (linears.iter())
            .map(|linear| Ok((decoder.weight(&linear.name)?, linear.out_features)))
            .collect::<Result<Vec<_>, PipelineError>>()?;
        let chosen = hessian.choose(&orders, &weights, self.spec, times);
        let chosen = chosen.map_err(named(first))?;
        if chosen.is_none() {
            let text = "too few calibration tokens to hold any out: natural order".to_string();
            self.warn(first, text);
        }
        Ok(chosen.unwrap_or(0))
    }

    /// Hands a linear over, its input channels permuted, unless its outputs may be too.
    fn store(
        &mut self,
        layer: &LayerName,
        solved: PendingLayer,
        folded: Option<Arc<[u32]>>,
    ) -> Result<(), PipelineError> {
        let solved: PendingLayer = match folded {
            None => solved,
            Some(channels) => Box::new(move || {
                let mut solved = solved()?;
                solved.permute_inputs(&channels);
                Ok(solved)
            }),
        };
        let waits = self.spec.order.may_fold()
            && Fold::all_before(self.model, self.index, self.spec.group_size).contains(layer);
        match waits {
            true => self.waiting.push((layer.clone(), solved)),
            false => self.writer.store(layer.clone(), solved)?,
        }
        Ok(())
    }

    /// Hands over the linears before a group, now that it is known how its inputs are permuted.
    fn store_waiting(&mut self, fold: &Fold, folded: Option<&[u32]>) -> Result<(), PipelineError> {
        let outputs = folded.map(|channels| fold.outputs(channels).expect("the fold's own order"));
        let of = |layer: &LayerName| -> Option<Vec<u32>> {
            let before = fold.before.iter().find(|before| before.layer == *layer)?;
            Some(before.outputs(outputs.as_ref()?))
        };
        type Waiting = Vec<(LayerName, PendingLayer)>;
        let (ready, waiting): (Waiting, Waiting) = (self.waiting.drain(..))
            .partition(|(layer, _)| fold.before.iter().any(|before| before.layer == *layer));
        self.waiting = waiting;
        for (layer, solved) in ready {
            let outputs = of(&layer);
            let permuted = move || {
                let mut solved = solved()?;
                if let Some(outputs) = outputs {
                    solved.permute_outputs(&outputs);
                }
                Ok(solved)
            };
            self.writer.store(layer, Box::new(permuted))?;
        }
        for before in &fold.before {
            let name = before.layer.tensor("bias");
            self.writer.copy_permuted(name, of(&before.layer))?;
        }
        Ok(())
    }

    fn warn_about(&mut self, stats: FactorStats, layer: &LayerName, in_features: usize) {
        if stats.tokens < in_features {
            let text = format!(
                "{} calibration tokens are fewer than the {in_features} input channels: \
                 the Hessian is singular but for damping",
                stats.tokens
            );
            self.warn(layer, text);
        }
        if stats.escalations > 0 {
            let text = format!(
                "the Hessian was singular: damp percent {} instead of {}",
                stats.damp_used, self.spec.damp_percent
            );
            self.warn(layer, text);
        }
        if stats.dead_channels > 0 {
            let text = format!(
                "{} input channels were zero on every calibration token",
                stats.dead_channels
            );
            self.warn(layer, text);
        }
    }

    fn warn(&mut self, layer: &LayerName, text: String) {
        self.warnings.push(Warning {
            module: layer.to_string(),
            text,
        });
    }
}

pub(crate) fn named(layer: &LayerName) -> impl FnOnce(QuantizeError) -> PipelineError + use<> {
    let layer = layer.clone();
    move |source| PipelineError::Quantize { layer, source }
}

fn tokens(job: &Job) -> usize {
    job.windows.iter().map(Vec::len).sum()
}

/// Shows the inputs of a group to a Hessian.
pub fn observe(
    decoder: &mut dyn Decoder,
    job: &Job,
    group: &CaptureGroup,
    times: &mut PhaseTimes,
) -> Result<Box<dyn GroupHessian>, PipelineError> {
    let in_features = group.in_features();
    let named = |source| PipelineError::Quantize {
        layer: group.linears[0].name.clone(),
        source,
    };
    let mut sum = group_sum(decoder.device(), job, in_features).map_err(named)?;
    let start = Instant::now();
    decoder.capture(group.tap, sum.as_mut())?;
    let inside = sum.elapsed().map_err(named)?;
    times.add(Phase::Forward, start.elapsed().saturating_sub(inside));
    times.add(Phase::Hessian, inside);
    // A symmetric product needs half the operations of a full one.
    let flop = tokens(job) as f64 * in_features as f64 * (in_features as f64 + 1.0);
    // Beside a float stream a full product and another symmetric one, each of some of the tokens.
    let products = match job.streams() {
        Streams::One => 1.0,
        Streams::BesideFloat => 1.0 + 2.0 * followed(&job.spec) + SQUARED,
    };
    times.add_flop(Phase::Hessian, flop * products);
    sum.finish(times).map_err(named)
}

/// The sum of a group on the decoder's device; of pairs where the job has a float stream.
fn group_sum(
    device: &DeviceContext,
    job: &Job,
    in_features: usize,
) -> Result<Box<dyn GroupSum>, QuantizeError> {
    let beside_float = job.streams() == Streams::BesideFloat;
    let holding_out = job.holds_out();
    match device {
        DeviceContext::Cpu => {
            let sum = match beside_float {
                false => HostGroup::new(in_features),
                true => HostGroup::beside_float(in_features),
            };
            Ok(Box::new(match holding_out {
                false => sum,
                true => sum.holding_out(),
            }))
        }
        #[cfg(feature = "cuda")]
        DeviceContext::Cuda(gpu) => {
            let gpu = gpu.gpu();
            let sum = gptq_quantizer::DeviceSum::new(gpu, in_features, beside_float, holding_out)?;
            Ok(Box::new(sum))
        }
    }
}
