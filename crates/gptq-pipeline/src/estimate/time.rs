//! Seconds of a run, phase by phase.
//!
//! Every constant is a part of a measured rate, or seconds; each says which run it is from. `seven` and `seventy`
//! are Llama-2-7B and four blocks of Llama-2-70B with 128 x 2048 tokens on an H200
//! (docs/runs/2026-12-01-h200-descent and -blocks), `smol` is SmolLM2-135M there, `two cores` are SmolLM2-135M and
//! stories260K on a processor (docs/runs/2026-11-22-cpu). On the H200 products are taken to run at 760 TFLOP/s,
//! f32 at 51, f64 at 62, copies at 4.0 TB/s. They are fitted here and nowhere else.

use gptq_model::spec::{AttentionSpec, BlockSpec};
use gptq_model::{CaptureGroup, LinearSpec, WindowRun};
use gptq_types::{ColumnOrder, Method};

use super::{GpuSpeed, SQUARED, Work, followed, streamed_passes, trained_passes};

/// Orders that `auto` tries on an input, about.
const ORDERS_TRIED: f64 = 3.5;

/// Constants of a GPU.
mod gpu {
    /// Products of the forward pass, of the rate (seven, seventy: what is left beside the terms below).
    pub const FORWARD: f64 = 0.81;
    /// Products of training: forward, gradients of inputs and of weights (`backward_device/speed.rs`).
    pub const TRAINED: f64 = 1.0;
    /// Products of the Hessian (seven 0.66, seventy 0.66).
    pub const HESSIAN: f64 = 0.66;
    /// Attention by tiles, of the rate of products (0.5 ms for 4 x 2048 tokens, 32 heads of 128).
    pub const TILES: f64 = 0.36;
    /// Widths of heads that have tiles.
    pub const TILED: [usize; 2] = [64, 128];
    /// Bytes that attention moves for a pair of query and key, where it has no tiles, and for its gradient
    /// (4.3 ms for the same).
    pub const PAIR: f64 = 30.0;
    pub const PAIR_BACKWARD: f64 = 64.0;
    /// Bytes that a column of a tape costs a row: in a pass through taps, and in one with gradients.
    pub const COLUMN: f64 = 5.0;
    pub const COLUMN_TRAINED: f64 = 6.0;
    /// Bytes that a weight costs a step: its gradient, Adam's moments, its latent and its rounding
    /// (0.19 ms for 4096 x 4096).
    pub const ADAM: f64 = 45.0;
    /// Seconds that launches take at least, for a linear: of a batch in a pass through taps, in one without, and
    /// in a step of training (smol: 4.2 ms a step of seven linears).
    pub const LAUNCHES: f64 = 0.3e-3;
    pub const LAUNCHES_MEASURED: f64 = 0.1e-3;
    pub const LAUNCHES_TRAINED: f64 = 0.58e-3;
    /// Factors: `2/3 K^3` of the f64 rate, and seconds for each (seven, seventy).
    pub const FACTOR: f64 = 0.86;
    pub const EACH_FACTOR: f64 = 7.5e-3;
    /// Sweeps: `K^2 N` of the f32 rate, and seconds for 128 channels (seven, seventy).
    pub const SWEEP: f64 = 0.6;
    pub const EACH_SWEEP: f64 = 0.17e-3;
    /// A pass of descent: `2 K^2 N` of the f32 rate (seven).
    pub const DESCENT: f64 = 0.86;
    /// Errors: `6 K^2 N`, and `8 K^2 N` against float outputs, of the rate of products (seven, seventy).
    pub const MEASURE: f64 = 0.13;
    pub const MEASURE_FLOAT: f64 = 0.45;
    /// Seconds of a linear beside all of that (smol).
    pub const EACH_LINEAR: f64 = 10.0e-3;
    /// Bytes a second from the page cache to the GPU (seven).
    pub const LOAD: f64 = 9.0e9;
    /// Bytes a second of the bus.
    pub const BUS: f64 = 50.0e9;
    /// Seconds that the writer takes for a weight, beside the GPU (seven).
    pub const WRITE: f64 = 1.2e-9;
    /// Seconds before the first block and after the last.
    pub const ENDS: f64 = 1.0;
}

/// Constants of a processor: `products` is its rate in f32.
mod processor {
    /// Products of a forward pass and of its gradients, of the rate.
    pub const FORWARD: f64 = 0.95;
    /// Operations of a product in the time that an element of a tape, or a score, takes (1.6 ns at 134 GFLOP/s;
    /// two cores).
    pub const ELEMENT: f64 = 210.0;
    /// Likewise of a weight in a step: rounding, its gradient and Adam.
    pub const ADAM: f64 = 1000.0;
    /// Products of the Hessian (two cores: 0.61).
    pub const HESSIAN: f64 = 0.6;
    /// `2/3 K^3` of half the rate (two cores: 0.37).
    pub const FACTOR: f64 = 0.37;
    /// `K^2 N`, and `2 K^2 N` for a pass of descent (two cores: 0.23).
    pub const SWEEP: f64 = 0.25;
    /// `6 K^2 N`, and `8 K^2 N` against float outputs (two cores: 0.71).
    pub const MEASURE: f64 = 0.7;
    /// Bytes a second of the check of all weights, and of reading a block.
    pub const READ: f64 = 0.8e9;
    /// Seconds that packing, writing and reading back a weight take, and rounding it to nearest.
    pub const WRITE: f64 = 4.0e-9;
    pub const ROUND: f64 = 17.0e-9;
    /// Seconds in which a block's files reach the disk.
    pub const EACH_BLOCK: f64 = 0.04;
    /// Seconds before the first block and after the last.
    pub const ENDS: f64 = 0.1;
}

/// Operations of a capture group.
struct GroupWork {
    /// `K`, and outputs of all its linears together.
    features: f64,
    outputs: f64,
    linears: f64,
    /// Rows of the sums: of the Hessian, and beside a float stream.
    hessian: f64,
}

impl GroupWork {
    fn of(group: &CaptureGroup, work: &Work<'_>) -> Self {
        let k = group.in_features() as f64;
        // X^T X is symmetric. Beside a float stream a full product and a symmetric one.
        let products = match work.aims() {
            false => 1.0,
            true => 1.0 + 2.0 * followed(work.spec) + SQUARED,
        };
        GroupWork {
            features: k,
            outputs: group
                .linears
                .iter()
                .map(|linear| linear.out_features as f64)
                .sum(),
            linears: group.linears.len() as f64,
            hessian: products * work.tokens() * k * k,
        }
    }

    /// `K^2 N`.
    fn square(&self) -> f64 {
        self.features * self.features * self.outputs
    }

    /// A Cholesky factorization and a triangular inverse.
    fn factor(&self) -> f64 {
        2.0 / 3.0 * self.features.powi(3)
    }
}

/// Factors of a group, and sweeps over all its outputs.
fn factors_and_sweeps(work: &Work<'_>) -> [f64; 2] {
    match work.spec.order {
        // A factor for each order, and a share of the outputs.
        ColumnOrder::Auto => [1.0 + ORDERS_TRIED, 1.0 + ORDERS_TRIED / 8.0],
        _ => [1.0; 2],
    }
}

/// Operations of errors against rounding to nearest; four products with each weight against float outputs.
fn measure(group: &GroupWork, work: &Work<'_>) -> [f64; 2] {
    let float = if work.aims() { 8.0 } else { 0.0 };
    [6.0 * group.square(), float * group.square()]
}

/// Floating-point operations of all phases.
pub(super) fn flop(work: &Work<'_>) -> f64 {
    if work.spec.method == Method::Rtn {
        return 0.0;
    }
    let descent = 1.0 + 2.0 * f64::from(work.spec.descent_passes);
    let [factors, sweeps] = factors_and_sweeps(work);
    let block = |(index, block): (usize, &BlockSpec)| {
        let forward = |run: &WindowRun| {
            let [gradients, plain] = trained_passes(work.spec.training_epochs, run.steps());
            let again = if work.spec.trains() { 1.0 } else { 0.0 };
            let passes = streamed_passes(work.spec) + again + 3.0 * gradients + plain;
            passes * work.model.block_flop(index, run.windows, run.tokens)
        };
        let solving = block.groups().into_iter().map(|group| {
            let group = GroupWork::of(&group, work);
            let measure: f64 = measure(&group, work).iter().sum();
            group.hessian + factors * group.factor() + sweeps * descent * group.square() + measure
        });
        work.windows.iter().map(forward).sum::<f64>() + solving.sum::<f64>()
    };
    work.model.blocks.iter().enumerate().map(block).sum()
}

/// Pairs of query and key that an attention sees.
fn pairs(attention: &AttentionSpec, run: &WindowRun) -> f64 {
    let seen = attention.shape.window.unwrap_or(run.tokens).min(run.tokens) as f64;
    let keys = seen - seen * (seen - 1.0) / (2.0 * run.tokens as f64);
    run.all_tokens() as f64 * keys * attention.shape.heads as f64
}

/// Operations of one pass of a run through the linears of a block.
fn linear_flop(block: &BlockSpec, run: &WindowRun) -> f64 {
    2.0 * run.all_tokens() as f64 * block.elements() as f64
}

fn trained_elements(block: &BlockSpec) -> f64 {
    let trained = block.linears().filter(|linear| linear.quantized);
    trained.map(|linear| linear.elements() as f64).sum()
}

/// Seconds on a GPU. `fetched` is the share of what a step reads that comes from host memory.
pub(super) fn on_gpu(work: &Work<'_>, speed: &GpuSpeed, fetched: f64) -> f64 {
    let block = |block: &BlockSpec| {
        let forward = work
            .windows
            .iter()
            .map(|run| forward_on_gpu(block, run, work, speed));
        let train = work
            .windows
            .iter()
            .map(|run| train_on_gpu(block, run, work, speed, fetched));
        let solving = block
            .groups()
            .into_iter()
            .map(|group| solve_on_gpu(&group, work, speed));
        forward.sum::<f64>() + train.sum::<f64>() + solving.sum::<f64>()
    };
    let elements = work.model.elements() as f64;
    let load = 2.0 * elements / gpu::LOAD;
    let computed = load + work.model.blocks.iter().map(block).sum::<f64>();
    gpu::ENDS + computed.max(gpu::WRITE * elements)
}

/// Batches of a run on a GPU.
fn batches(run: &WindowRun, work: &Work<'_>) -> f64 {
    match work.spec.trains() {
        true => run.steps() as f64,
        false => (run.all_tokens() as f64 / 8192.0).ceil(),
    }
}

/// All passes through taps, and the pass through a trained block.
fn forward_on_gpu(block: &BlockSpec, run: &WindowRun, work: &Work<'_>, speed: &GpuSpeed) -> f64 {
    let columns = block.tape_columns(work.model.hidden_size) as f64;
    let moved = gpu::COLUMN * columns * run.all_tokens() as f64 / speed.bytes;
    let computed = linear_flop(block, run) / (gpu::FORWARD * speed.products)
        + attention_on_gpu(block, run, speed)
        + moved;
    let linears = block.linears().count() as f64;
    let again = if work.spec.trains() { 1.0 } else { 0.0 };
    let passes = streamed_passes(work.spec) + again;
    passes * computed.max(batches(run, work) * linears * gpu::LAUNCHES)
}

fn attention_on_gpu(block: &BlockSpec, run: &WindowRun, speed: &GpuSpeed) -> f64 {
    let seconds = |attention: &AttentionSpec| {
        let (pairs, d) = (pairs(attention, run), attention.shape.head_dim);
        match gpu::TILED.contains(&d) {
            true => 4.0 * pairs * d as f64 / (gpu::TILES * speed.products),
            false => gpu::PAIR * pairs / speed.bytes,
        }
    };
    block.attention().map(seconds).sum()
}

/// All epochs.
fn train_on_gpu(
    block: &BlockSpec,
    run: &WindowRun,
    work: &Work<'_>,
    speed: &GpuSpeed,
    fetched: f64,
) -> f64 {
    let [gradients, plain] = trained_passes(work.spec.training_epochs, run.steps());
    let (tokens, steps) = (run.all_tokens() as f64, run.steps() as f64);
    let products = linear_flop(block, run) / (gpu::TRAINED * speed.products);
    let attention = attention_on_gpu(block, run, speed);
    let pairs: f64 = block
        .attention()
        .map(|attention| pairs(attention, run))
        .sum();
    let columns = block.tape_columns(work.model.hidden_size) as f64 * tokens;
    let weights = steps * trained_elements(block);
    let bus = fetched * 2.0 * 2.0 * tokens * work.model.hidden_size as f64 / gpu::BUS;
    let moved = gpu::PAIR_BACKWARD * pairs + gpu::COLUMN_TRAINED * columns + gpu::ADAM * weights;
    let step = 3.0 * products + attention + moved / speed.bytes + bus;
    let measured = products + attention + gpu::COLUMN / 2.0 * columns / speed.bytes + bus;
    let linears = block.linears().count() as f64 * steps;
    gradients * step.max(linears * gpu::LAUNCHES_TRAINED)
        + plain * measured.max(linears * gpu::LAUNCHES_MEASURED)
}

/// Hessian, factors, sweeps and errors of a group.
fn solve_on_gpu(group: &CaptureGroup, work: &Work<'_>, speed: &GpuSpeed) -> f64 {
    let of = GroupWork::of(group, work);
    let [factors, sweeps] = factors_and_sweeps(work);
    let passes = f64::from(work.spec.descent_passes);
    let hessian = of.hessian / (gpu::HESSIAN * speed.products);
    let factor = of.factor() / (gpu::FACTOR * speed.f64) + gpu::EACH_FACTOR;
    let swept = of.square() / speed.f32;
    let sweep = swept / gpu::SWEEP + passes * 2.0 * swept / gpu::DESCENT;
    // Channels follow each other however few outputs there are.
    let channels = factors * of.linears * (of.features / 128.0).ceil();
    let [rounding, float] = measure(&of, work);
    let measure = rounding / gpu::MEASURE + float / gpu::MEASURE_FLOAT;
    hessian
        + factors * factor
        + sweeps * sweep
        + channels * gpu::EACH_SWEEP
        + measure / speed.products
        + of.linears * gpu::EACH_LINEAR
}

/// Seconds on a processor whose products run at `products` FLOP/s.
pub(super) fn on_processor(work: &Work<'_>, products: f64) -> f64 {
    if work.spec.method == Method::Rtn {
        return rounding(work);
    }
    let block = |block: &BlockSpec| {
        let passes = work
            .windows
            .iter()
            .map(|run| passes_on_processor(block, run, work));
        let solving = block
            .groups()
            .into_iter()
            .map(|group| solve_on_processor(&group, work));
        (passes.sum::<f64>() + solving.sum::<f64>()) / products + processor::EACH_BLOCK
    };
    let elements = work.model.elements() as f64;
    let files = 2.0 * 2.0 * elements / processor::READ + processor::WRITE * elements;
    processor::ENDS + files + work.model.blocks.iter().map(block).sum::<f64>()
}

/// Operations of a product in whose time the passes through a block go.
fn passes_on_processor(block: &BlockSpec, run: &WindowRun, work: &Work<'_>) -> f64 {
    let [gradients, plain] = trained_passes(work.spec.training_epochs, run.steps());
    let again = if work.spec.trains() { 1.0 } else { 0.0 };
    let passes = streamed_passes(work.spec) + again + 3.0 * gradients + plain;
    let columns = block.tape_columns(work.model.hidden_size) as f64;
    let mut flop = linear_flop(block, run);
    let mut elements = columns * run.all_tokens() as f64;
    for attention in block.attention() {
        let pairs = pairs(attention, run);
        flop += 4.0 * pairs * attention.shape.head_dim as f64;
        elements += pairs;
    }
    let pass = flop / processor::FORWARD + processor::ELEMENT * elements;
    let rounded = (gradients + plain / run.steps().max(1) as f64) * run.steps() as f64;
    passes * pass + processor::ADAM * rounded * trained_elements(block)
}

/// Likewise of solving a group.
fn solve_on_processor(group: &CaptureGroup, work: &Work<'_>) -> f64 {
    let of = GroupWork::of(group, work);
    let [factors, sweeps] = factors_and_sweeps(work);
    let descent = 1.0 + 2.0 * f64::from(work.spec.descent_passes);
    let measure: f64 = measure(&of, work).iter().sum();
    of.hessian / processor::HESSIAN
        + factors * 2.0 * of.factor() / processor::FACTOR
        + sweeps * descent * of.square() / processor::SWEEP
        + measure / processor::MEASURE
}

/// Seconds of rounding to nearest, which looks at weights alone.
pub(super) fn rounding(work: &Work<'_>) -> f64 {
    let linears = work.model.blocks.iter().flat_map(BlockSpec::linears);
    let elements: f64 = linears
        .map(LinearSpec::elements)
        .map(|count| count as f64)
        .sum();
    processor::ENDS + elements * (2.0 * 2.0 / processor::READ + processor::WRITE + processor::ROUND)
}
