//! The choice of an order, against doing by hand what it says: solve on some batches, measure on the others.

#[path = "../../../tests/support/random.rs"]
mod random;

use gptq_quantizer::{
    ActivationSink, Activations, Factor, GroupSum, HessianSum, HostGroup, Order, Weight,
    output_error, solve,
};
use gptq_types::{Bits, ColumnOrder, GroupSize, PhaseTimes, QuantSpec};

use random::Random;

const K: usize = 64;
const N: usize = 40;
/// Outputs that are tried: an eighth, but at least 32.
const TRIED: usize = 32;
const ROWS: usize = 90;

#[test]
fn the_order_of_least_error_on_held_out_batches_is_taken() {
    let mut random = Random::new(5);
    let size: Vec<f32> = (0..K).map(|_| (0.9 * random.normal()).exp()).collect();
    let batches: Vec<Vec<f32>> = (0..10)
        .map(|_| {
            let mut rows = Vec::new();
            for _ in 0..ROWS {
                let shared = random.normal();
                rows.extend(size.iter().map(|s| s * (random.normal() + 0.7 * shared)));
            }
            rows
        })
        .collect();
    let weight: Vec<f32> = (0..K * N).map(|_| 0.05 * random.normal()).collect();
    let part: Vec<f32> = (weight.chunks_exact(N))
        .flat_map(|row| row[..TRIED].to_vec())
        .collect();
    let spec = QuantSpec {
        bits: Bits::Three,
        group_size: GroupSize::Channels(16),
        full_range: true,
        ..QuantSpec::published()
    };
    let sum = |held_out: Option<bool>| {
        let mut sum = HessianSum::new(K);
        for (at, batch) in batches.iter().enumerate() {
            if held_out.is_none_or(|held_out| held_out == (at % 8 == 1)) {
                sum.observe(Activations::Host(batch), ROWS, K);
            }
        }
        sum.finish().unwrap()
    };
    let (seen, held_out, all) = (sum(Some(false)), sum(Some(true)), sum(None));
    let orders = [
        ColumnOrder::ActOrder,
        ColumnOrder::Natural,
        ColumnOrder::ActOrderStaticGroups,
        ColumnOrder::GroupAware,
    ]
    .map(|order| Order::new(order, spec.group_size, &seen.diagonal()));
    let errors = orders.clone().map(|order| {
        let factor = Factor::in_order(&seen, order, spec.damp_percent).unwrap();
        let solved = solve(&part, TRIED, &factor, &spec).unwrap();
        output_error(&held_out, &part, &solved.layer)
    });
    let mut places: Vec<usize> = (0..orders.len()).collect();
    places.sort_by(|&a, &b| errors[a].total_cmp(&errors[b]));

    // The choice does not depend on which order comes first.
    for first in 0..orders.len() {
        let mut rotated = orders.clone();
        rotated.rotate_left(first);
        let mut stage = Box::new(HostGroup::new(K).holding_out());
        for batch in &batches {
            stage.observe(Activations::Host(batch), ROWS, K);
        }
        let mut times = PhaseTimes::default();
        let mut hessian = stage.finish(&mut times).unwrap();
        let linears = [(Weight::Host(weight.clone()), N)];
        let chosen = hessian.choose(&rotated, &linears, &spec, &mut times);
        let chosen = chosen.unwrap().expect("a batch is held out");
        assert_eq!((chosen + first) % orders.len(), places[0], "{errors:?}");
        // Held-out tokens are part of the Hessian from now on.
        for (got, want) in hessian.diagonal().iter().zip(all.diagonal()) {
            assert!((got / want - 1.0).abs() < 1e-5, "{got} against {want}");
        }
    }
}
