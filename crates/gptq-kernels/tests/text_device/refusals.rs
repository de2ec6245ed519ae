//! Parts of views that are not there, and operands of other shapes, types and orders: each is refused by its
//! words, and nothing is written. What a recorded graph reads stays.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use gptq_kernels::cuda::{
    ActivationStore, Buffer, DeviceHessian, DeviceKeyValues, DeviceMatrix, DeviceNorm, Gpu,
    HeadNorms, PackedLinear, RawGridRule, RotaryTable, RowOrder, SweepPlan, TextRows,
};
use gptq_kernels::{Activation, AttentionShape, Pairing, Rotation};
use gptq_types::{Bits, Dtype, SolvedLayer};
use half::f16;

use super::common::gpu;
use super::views::{COLUMNS, ROWS, numbered};
use super::{matrix, poisoned, upload};

/// `work` panics, and its message has the words.
#[track_caller]
fn refused<T>(words: &str, work: impl FnOnce() -> T) {
    let Err(payload) = catch_unwind(AssertUnwindSafe(|| drop(work()))) else {
        panic!("`{words}` was not said");
    };
    let said = match payload.downcast_ref::<String>() {
        Some(said) => said.as_str(),
        None => payload.downcast_ref::<&str>().expect("a message"),
    };
    assert!(said.contains(words), "`{words}` was not said, but `{said}`");
}

#[test]
fn parts_that_are_not_there_are_refused() {
    let Some(gpu) = gpu() else { return };
    let there = numbered(&gpu, ROWS * COLUMNS);
    let all = matrix(&there, Dtype::F16, ROWS, COLUMNS);
    let reversed = |start, end| Range { start, end };
    for size in [
        [ROWS + 1, COLUMNS],
        [ROWS, COLUMNS + 1],
        [1, ROWS * COLUMNS + 1],
        [usize::MAX, COLUMNS],
        [1 << 63, 2], // no elements, were they counted in so many bits
        [1 << 62, 4],
        [1, 1 << 63], // no bytes
        [usize::MAX, usize::MAX],
    ] {
        refused("elements in", || there.matrix(size, Dtype::F16));
    }
    refused("elements in", || there.matrix([ROWS, COLUMNS], Dtype::F32));
    refused("elements in", || there.matrix([1 << 61, 1], Dtype::F64));
    for len in [ROWS * COLUMNS + 1, 1 << 63, usize::MAX] {
        refused("elements in", || there.slice::<u16>(len));
    }
    refused("elements in", || there.slice::<u32>(ROWS * COLUMNS));
    let zero = Buffer::new(&gpu, 0).unwrap();
    refused("elements in", || zero.slice::<u8>(1));
    refused("elements in", || zero.matrix([1, 1], Dtype::U8));

    for rows in [
        0..ROWS + 1,
        ROWS + 1..ROWS + 1,
        reversed(5, 4),
        reversed(usize::MAX, 1),
        3..usize::MAX,
    ] {
        refused("rows", || all.row_range(rows.clone()));
    }
    refused("rows 3..5 of 4", || all.row_range(2..6).row_range(3..5));
    for columns in [
        0..COLUMNS + 1,
        COLUMNS + 1..COLUMNS + 1,
        reversed(5, 4),
        reversed(usize::MAX, 1),
        3..usize::MAX,
    ] {
        refused("columns", || all.column_range(columns.clone()));
    }
    refused("columns 3..5 of 4", || {
        all.column_range(2..6).column_range(3..5)
    });
    let slice = there.slice::<u16>(20);
    for range in [0..21, 21..21, reversed(5, 4), 3..usize::MAX] {
        refused("elements", || slice.part(range.clone()));
    }
    refused("elements 3..5 of 4", || slice.part(2..6).part(3..5));

    refused("elements", || all.reshaped([COLUMNS, ROWS + 1]));
    refused("elements", || all.row_range(0..2).reshaped([1, COLUMNS]));
    let with_gaps = all.column_range(0..4);
    refused("gaps", || with_gaps.reshaped([4, ROWS]));
    refused("gaps", || with_gaps.reshaped([ROWS, 4]));
    refused("values in the buffer", || {
        there.to_host::<u16>(ROWS * COLUMNS + 1)
    });
    // One row has none, and an empty matrix is one.
    assert!(with_gaps.row_range(8..9).is_contiguous());
    assert_eq!(zero.matrix([0, COLUMNS], Dtype::F16).elements(), 0);
    gpu.synchronize().unwrap();
}

/// A linear with sorted channels.
fn linear(gpu: &Arc<Gpu>, k: usize, n: usize) -> (SolvedLayer, PackedLinear) {
    let groups = k.div_ceil(64);
    let layer = SolvedLayer {
        bits: Bits::Four,
        in_features: k,
        out_features: n,
        codes: vec![3; k * n],
        scales: vec![f16::from_f32(0.01); groups * n],
        zeros: vec![8; groups * n],
        g_idx: (0..k)
            .map(|channel| (channel * 7 % k / 64) as u32)
            .collect(),
    };
    let linear = PackedLinear::new(gpu, &layer, None, Dtype::F16).unwrap();
    (layer, linear)
}

/// Operands of calls that are refused.
struct Refusing {
    gpu: Arc<Gpu>,
    /// No numbers, and nobody may write any.
    out: Buffer,
    /// Zeros.
    x: Buffer,
}

const K: usize = 200;
const N: usize = 48;
/// Elements of both buffers.
const ROOM: usize = 64 << 10;

impl Refusing {
    fn new() -> Option<Self> {
        let gpu = gpu()?;
        Some(Refusing {
            out: poisoned(&gpu, ROOM),
            x: Buffer::zeros(&gpu, ROOM * 2).unwrap(),
            gpu,
        })
    }

    fn out(&self, rows: usize, columns: usize) -> DeviceMatrix<'_> {
        matrix(&self.out, Dtype::F16, rows, columns)
    }

    fn x(&self, rows: usize, columns: usize) -> DeviceMatrix<'_> {
        matrix(&self.x, Dtype::F16, rows, columns)
    }

    /// Rows that are not behind each other.
    fn gaps(&self, rows: usize, columns: usize) -> DeviceMatrix<'_> {
        self.x(rows, columns + 1).column_range(0..columns)
    }

    fn out_gaps(&self, rows: usize, columns: usize) -> DeviceMatrix<'_> {
        self.out(rows, columns + 1).column_range(0..columns)
    }
}

/// Whatever was refused has written nothing, and the GPU goes on.
impl Drop for Refusing {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let out: Vec<u16> = self.out.to_host(ROOM).unwrap();
            assert!(out.iter().all(|&bits| bits == u16::MAX));
        }
    }
}

#[test]
fn copies_between_other_shapes_are_refused() {
    let Some(t) = Refusing::new() else { return };
    let (gpu, rows) = (&t.gpu, 5);
    let (out, x) = (t.out(rows, K), t.x(rows, K));
    refused("elements of both", || gpu.copy(out, t.x(rows, K + 1)));
    refused("elements of both", || gpu.copy(out, t.x(rows - 1, K)));
    refused("types of both", || {
        gpu.copy(out, t.x.matrix([rows, K], Dtype::BF16))
    });
    refused("gaps", || gpu.copy(t.out_gaps(rows, K), x));
    refused("gaps", || gpu.copy(out, t.gaps(rows, K)));
    refused("values for the elements", || {
        gpu.write(t.out.slice::<u16>(5), &[1, 2, 3, 4])
    });
    refused("values for the elements", || {
        gpu.write(t.out.slice::<u16>(5), &[1, 2, 3, 4, 5, 6])
    });
    let bytes = vec![0; 2 * rows * K];
    refused("bytes of the matrix", || gpu.write_stored(out, &bytes[1..]));
    refused("gaps", || gpu.write_stored(t.out_gaps(rows, K), &bytes));
    refused("elements of the matrix", || {
        gpu.upload(out, &vec![1.0; rows * K + 1])
    });
    refused("gaps", || {
        gpu.upload(t.out_gaps(rows, K), &vec![1.0; rows * K])
    });
    refused("gaps", || gpu.download(t.gaps(rows, K)));
    refused("gaps", || gpu.first_not_finite(t.gaps(rows, K)));
    refused("rows of both", || gpu.copy_columns(out, t.x(rows, K + 1)));
    refused("rows of both", || gpu.copy_columns(out, t.x(rows + 1, K)));
    refused("gaps", || gpu.copy_columns(t.out_gaps(rows, K), x));
}

#[test]
fn slots_of_a_store_refuse_what_does_not_fit() {
    let Some(t) = Refusing::new() else { return };
    // One large matrix has room on the GPU, or two small ones.
    let store = ActivationStore::new(&t.gpu, 2, [4000, 2000], 1, 1).unwrap();
    store.put(0, t.x(1, 2000)).unwrap();
    for place in 0..2 {
        refused("bytes of a place", || store.put(place, t.x(1, 2001)));
        refused("bytes of a place", || store.get(place, t.out(1, 2001)));
    }
    refused("room for the matrix", || store.put(1, t.x(1, 2000)));
    refused("gaps", || store.put(0, t.gaps(4, 100)));
    refused("gaps", || store.get(0, t.out_gaps(4, 100)));
    store.clear(2000);
    refused("bytes of a place", || store.put(0, t.x(1, 1001)));
    refused("bytes of a place", || store.clear(4001));
}

#[test]
fn rows_of_other_shapes_are_refused() {
    let Some(t) = Refusing::new() else { return };
    let (gpu, rows) = (&t.gpu, 5);
    let (out, x) = (t.out(rows, K), t.x(rows, K));
    let weight = vec![1.0; K];
    let norm = &DeviceNorm::rms(gpu, &weight, 1e-5).unwrap();
    let (_, linear) = linear(gpu, K, N);
    let (natural, own) = (RowOrder::natural(K), linear.order());
    assert!(own.width() > K, "places that are empty");
    let wider = t.out(rows, own.width());
    let silu = Activation::Silu;

    refused("elements of a row", || {
        gpu.norm_rows(out, natural, t.x(rows, K + 8), norm)
    });
    refused("rows of the order", || {
        gpu.norm_rows(t.out(rows - 1, K), natural, x, norm)
    });
    refused("rows of the order", || gpu.norm_rows(out, own, x, norm));
    refused("gaps", || {
        gpu.norm_rows(t.out_gaps(rows, K), natural, x, norm)
    });
    refused("gaps", || {
        gpu.norm_rows(out, natural, t.gaps(rows, K), norm)
    });
    refused("elements", || gpu.norm(out, t.x(rows, K - 1), norm));
    refused("whole runs", || {
        gpu.norm_outputs(t.out(rows, 2 * K + 1), norm)
    });
    refused("rows of both", || {
        gpu.add_normed(out, t.x(rows - 1, K), norm, 1.0)
    });
    refused("rows of both", || {
        gpu.add_normed(t.out(rows, K + 8), x, norm, 1.0)
    });
    refused("a bias for each weight", || {
        DeviceNorm::layer(gpu, &weight, Some(&weight[1..]), 1e-5)
    });

    for order in [natural, own] {
        let to = t.out(rows, order.width());
        let few = t.out(rows - 1, order.width());
        let another = t.out(rows, order.width() + 8);
        let less = t.x(rows, K - 8);
        refused("rows of both", || gpu.gate_rows(to, order, [x, less], silu));
        refused("rows of both", || {
            gpu.gate_rows(to, order, [x, t.x(rows + 1, K)], silu)
        });
        for to in [few, another] {
            refused("rows of the order", || {
                gpu.gate_rows(to, order, [x, x], silu)
            });
            refused("rows of the order", || {
                gpu.activate_rows(to, order, x, silu)
            });
            refused("rows of the order", || gpu.gather_rows(to, order, x));
        }
        refused("channels of the rows", || {
            gpu.gate_rows(to, order, [less, less], silu)
        });
        refused("channels of the rows", || {
            gpu.activate_rows(to, order, less, silu)
        });
        refused("channels of the rows", || gpu.gather_rows(to, order, less));
        let gaps = t.out_gaps(rows, order.width());
        refused("gaps", || gpu.gather_rows(gaps, order, x));
    }
    refused("rows of both", || gpu.gate(out, t.x(rows, K - 8), silu));

    refused("elements of both", || gpu.add(out, t.x(rows, K - 1)));
    refused("elements of both", || {
        gpu.add_scaled(out, t.x(rows + 1, K), 2.0)
    });
    refused("gaps", || gpu.add(t.out_gaps(rows, K), x));
    refused("gaps", || gpu.add_scaled(out, t.gaps(rows, K), 2.0));
    refused("gaps", || gpu.scale(t.out_gaps(rows, K), 2.0));
    refused("type of logits", || gpu.soft_cap(out, 30.0));
    let bias = Buffer::from_host(gpu, &weight).unwrap();
    refused("a bias for each column", || {
        gpu.add_bias(t.out(rows, K + 1), &bias)
    });
    refused("a bias for each column", || gpu.add_bias(wider, &bias));
}

#[test]
fn products_of_other_shapes_are_refused() {
    let Some(t) = Refusing::new() else { return };
    let (gpu, rows) = (&t.gpu, 5);
    let (layer, linear) = linear(gpu, K, N);
    let (out, x, places) = (t.out(rows, N), t.x(rows, K), linear.order().width());
    let ordered = t.x(rows, places);
    let weight = t.x(N, K);

    refused("in_features", || gpu.project(out, t.x(rows, K - 1), weight));
    refused("rows of the product", || {
        gpu.project(t.out(rows - 1, N), x, weight)
    });
    refused("rows of the product", || {
        gpu.project(t.out(rows, N + 1), x, weight)
    });
    refused("gaps", || gpu.project(out, t.gaps(rows, K), weight));
    refused("gaps", || gpu.project_onto(out, x, t.gaps(N, K), true));

    for add in [false, true] {
        refused("in_features", || linear.multiply(out, ordered, add));
        refused("in_features", || linear.multiply(out, t.x(0, K + 1), add));
        refused("places of the order", || {
            linear.multiply_ordered(out, x, add)
        });
        for out in [t.out(rows - 1, N), t.out(rows + 1, N), t.out(rows, N - 1)] {
            refused("rows of the product", || linear.multiply(out, x, add));
            refused("rows of the product", || {
                linear.multiply_ordered(out, ordered, add)
            });
        }
        refused("gaps", || linear.multiply(out, t.gaps(rows, K), add));
        refused("gaps", || linear.multiply(t.out_gaps(rows, N), x, add));
        let other = |rows, columns| t.x.matrix([rows, columns], Dtype::BF16);
        refused("type of the rows", || {
            linear.multiply(out, other(rows, K), add)
        });
        refused("type of the rows", || {
            linear.multiply(t.out.matrix([rows, N], Dtype::BF16), x, add)
        });
        refused("type of the rows", || {
            linear.multiply_ordered(out, other(rows, places), add)
        });
    }
    refused("rows are outputs", || gpu.dequantize(t.out(K, N), &layer));
    refused("gaps", || gpu.dequantize(t.out_gaps(N, K), &layer));

    let ids = Buffer::from_host(gpu, &[0u32, 1, 2, 3]).unwrap();
    let (table, found) = (t.x(10, K), t.out(4, K));
    refused("a row for each id", || {
        gpu.look_up(found, table, ids.slice(3), 1.0)
    });
    refused("a row for each id", || {
        gpu.look_up(t.out(4, K + 1), table, ids.slice(4), 1.0)
    });
    refused("gaps", || {
        gpu.look_up(found, t.gaps(10, K), ids.slice(4), 1.0)
    });
    refused("gaps", || {
        gpu.look_up(t.out_gaps(4, K), table, ids.slice(4), 1.0)
    });
    refused("ids inside the table", || {
        gpu.embed(found, table, &[0, 1, 2, 10], 1.0)
    });
    refused("a row for each id", || {
        gpu.embed(found, table, &[0, 1, 2], 1.0)
    });
}

#[test]
fn heads_of_other_shapes_are_refused() {
    let Some(t) = Refusing::new() else { return };
    let (gpu, dtype, d) = (&t.gpu, Dtype::F16, 16);
    let shape = AttentionShape::new(4, 2, d);
    let (sequences, capacity, rows) = (3, 10, 5);
    let cache = DeviceKeyValues::new(gpu, sequences, capacity, shape, dtype).unwrap();
    let (queries, keys) = (4 * d, 2 * d);
    let rotary = |positions: usize, head_dim: usize| {
        let frequencies: Vec<f32> = (0..d / 2).map(|i| 1.0 / (1.0 + i as f32)).collect();
        let pairing = Pairing::Halves;
        let of = Rotation::new(&frequencies, 0..positions, 1.0, head_dim, pairing);
        RotaryTable::new(gpu, &of).unwrap()
    };
    let (fits, short, wide) = (
        rotary(capacity, d),
        rotary(capacity - 1, d),
        rotary(capacity, 2 * d),
    );
    refused("whole heads", || {
        gpu.rotate(t.out(rows, d + 8), &fits, rows)
    });
    refused("positions of the table", || {
        gpu.rotate(t.out(rows, d), &fits, capacity + 1)
    });
    refused("gaps", || gpu.rotate(t.out_gaps(rows, d), &fits, rows));

    let norms = HeadNorms::default();
    let prompt = |sequence, first| TextRows::Prompt { sequence, first };
    let (out, q, kv) = (t.out(rows, queries), t.x(rows, queries), t.x(rows, keys));
    let store = |out, q, kv, of| cache.store(out, q, Some(kv), of, &norms, None);
    let first = prompt(0, 0);
    refused("whole heads of queries", || {
        let (out, q) = (t.out(rows, queries + 8), t.x(rows, queries + 8));
        store(out, q, [kv; 2], first)
    });
    for out in [t.out(rows - 1, queries), t.out(rows, queries - d)] {
        refused("heads of queries", || store(out, q, [kv; 2], first));
    }
    refused("gaps", || {
        store(t.out_gaps(rows, queries), q, [kv; 2], first)
    });
    for other in [
        t.x(rows - 1, keys),
        t.x(rows, keys - d),
        t.x(rows, keys + 1),
    ] {
        refused("heads of keys and values", || {
            store(out, q, [other, kv], first)
        });
        refused("heads of keys and values", || {
            store(out, q, [kv, other], first)
        });
    }
    refused("sequences of the cache", || {
        store(out, q, [kv; 2], prompt(sequences, 0))
    });
    refused("tokens of the cache", || {
        store(out, q, [kv; 2], prompt(2, capacity - rows + 1))
    });
    for (tables, words) in [
        ([&short, &fits], "positions of the table"),
        ([&fits, &short], "positions of the table"),
        ([&wide, &fits], "heads that are rotated"),
        ([&fits, &wide], "heads that are rotated"),
    ] {
        refused(words, || {
            cache.store(out, q, Some([kv; 2]), first, &norms, Some(tables))
        });
    }

    let held = Buffer::from_host(gpu, &[1i32; 4]).unwrap();
    let newest = |count| TextRows::Newest(held.slice(count));
    let (out, q, kv) = (
        t.out(sequences, queries),
        t.x(sequences, queries),
        t.x(sequences, keys),
    );
    for count in [sequences - 1, sequences + 1] {
        refused("sequences of the cache", || {
            store(out, q, [kv; 2], newest(count))
        });
    }
    refused("sequences of the cache", || {
        let (out, q, kv) = (t.out(2, queries), t.x(2, queries), t.x(2, keys));
        store(out, q, [kv; 2], newest(sequences))
    });
    let attend = |out, order, q, count: usize, shape| {
        cache.attend_newest(out, order, q, held.slice(count), shape)
    };
    let natural = RowOrder::natural(queries);
    for count in [sequences - 1, sequences + 1] {
        refused("sequences of the cache", || {
            attend(out, natural, q, count, shape)
        });
    }
    refused("heads of queries", || {
        attend(out, natural, t.x(sequences, keys), sequences, shape)
    });
    refused("heads of queries", || {
        attend(out, natural, t.x(sequences + 1, queries), sequences, shape)
    });
    refused("rows of the order", || {
        attend(t.out(sequences, keys), natural, q, sequences, shape)
    });
    refused("channels of the rows", || {
        let to = t.out(sequences, keys);
        attend(to, RowOrder::natural(keys), q, sequences, shape)
    });
    let (_, linear) = linear(gpu, queries + 8, N);
    refused("channels of the rows", || {
        let to = t.out(sequences, linear.order().width());
        attend(to, linear.order(), q, sequences, shape)
    });
    refused("gaps", || {
        attend(out, natural, t.gaps(sequences, queries), sequences, shape)
    });
    let more = AttentionShape::new(4, 4, d);
    refused("heads of keys in the cache", || {
        attend(out, natural, q, sequences, more)
    });

    let (out, q) = (t.out(rows, queries), t.x(rows, queries));
    let attend = |out, q, sequence, first| cache.attend_prompt(out, q, sequence, first, shape);
    refused("sequences of the cache", || attend(out, q, sequences, 0));
    refused("tokens of the cache", || {
        attend(out, q, 2, capacity - rows + 1)
    });
    refused("heads of queries", || attend(out, t.x(rows, keys), 0, 0));
    refused("heads of attention", || {
        attend(t.out(rows - 1, queries), q, 0, 0)
    });
    refused("gaps", || attend(out, t.gaps(rows, queries), 0, 0));
    refused("heads of keys in the cache", || {
        cache.attend_prompt(out, q, 0, 0, more)
    });

    let kv = t.x(rows, keys);
    let attend = |out, q, k, v| gpu.attend(out, q, k, v, rows, shape);
    for other in [t.x(rows - 1, keys), t.x(rows, queries)] {
        refused("heads of keys and values", || attend(out, q, other, kv));
        refused("heads of keys and values", || attend(out, q, kv, other));
    }
    refused("heads of queries", || attend(out, kv, kv, kv));
    refused("heads of attention", || {
        attend(t.out(rows, keys), q, kv, kv)
    });
    refused("gaps", || attend(out, q, t.gaps(rows, keys), kv));
    refused("gaps", || attend(t.out_gaps(rows, queries), q, kv, kv));
}

#[test]
fn solvers_refuse_other_shapes() {
    let Some(t) = Refusing::new() else { return };
    let (gpu, k, n, rows) = (&t.gpu, 64, 16, 100);
    let mut hessian = DeviceHessian::beside_float(gpu, k).unwrap();
    refused("in_features", || hessian.add(t.x(rows, k + 1)));
    refused("gaps", || hessian.add(t.gaps(rows, k)));
    refused("rows of both streams", || {
        hessian.add_pair(t.x(rows, k), t.x(rows - 1, k), false)
    });
    let mut hessian = DeviceHessian::new(gpu, k).unwrap();
    hessian.add(t.x(rows, k)).unwrap();
    hessian.finish(2.0 / rows as f32).unwrap();
    let order: Vec<u32> = (0..k as u32).rev().collect();
    let plan = |channels: usize| {
        let channels: Vec<u32> = (0..channels as u32).rev().collect();
        let groups = vec![0; channels.len()];
        SweepPlan::new(gpu, &channels, &groups, 1, true, Vec::new()).unwrap()
    };
    let (own, narrow) = (plan(k), plan(k - 1));
    let rule = RawGridRule {
        max_code: 15.0,
        min_zero: 1.0,
        min_share: 0.55,
        sym: 1,
        full_range: 0,
        shares: 1,
        variants: 1,
    };
    refused("in_features", || {
        hessian.rounding_cost(t.x(n, k + 1), k, rule)
    });
    refused("gaps", || hessian.rounding_cost(t.gaps(n, k), k, rule));
    let factor = hessian
        .factor(&order, &vec![1.0; k], &vec![1.0; k])
        .unwrap();
    let sweep = |weight, plan| factor.sweep(weight, plan, rule, None, None, None);
    refused("in_features", || sweep(t.x(n, k - 1), &own));
    refused("in_features", || sweep(t.x(n, k), &narrow));
    refused("gaps", || sweep(t.gaps(n, k), &own));
    let swept = sweep(t.x(n, k), &own).unwrap();
    let write_back = |weight, plan| hessian.write_back(weight, &swept, plan, None);
    for weight in [t.out(n + 1, k), t.out(n - 1, k), t.out(n, k + 1)] {
        refused("the weight that was swept", || write_back(weight, &own));
    }
    refused("in_features", || write_back(t.out(n, k), &narrow));
    refused("gaps", || write_back(t.out_gaps(n, k), &own));
}

/// A kernel for sixteen-bit floats would read or write twice the bytes of a matrix of bytes, and take the bits
/// of one type for those of the other.
#[test]
fn elements_of_other_types_are_refused() {
    let Some(t) = Refusing::new() else { return };
    let gpu = &t.gpu;
    let bytes = |buffer| matrix(buffer, Dtype::U8, ROWS, COLUMNS);
    let (of_bytes, to_bytes) = (bytes(&t.x), bytes(&t.out));
    let brain = matrix(&t.x, Dtype::BF16, ROWS, COLUMNS);
    let (x, out) = (t.x(ROWS, COLUMNS), t.out(ROWS, COLUMNS));
    let norm = DeviceNorm::rms(gpu, &[1.0; COLUMNS], 1e-6).unwrap();
    let order = RowOrder::natural(COLUMNS);
    refused("sixteen-bit floats, not", || {
        gpu.upload(to_bytes, &[0.0; ROWS * COLUMNS])
    });
    refused("sixteen-bit floats, not", || gpu.download(of_bytes));
    refused("sixteen-bit floats, not", || gpu.scale(to_bytes, 2.0));
    refused("sixteen-bit floats, not", || gpu.first_not_finite(of_bytes));
    refused("sixteen-bit floats, not", || gpu.add(to_bytes, of_bytes));
    refused("sixteen-bit floats, not", || {
        gpu.copy_columns(to_bytes, of_bytes)
    });
    refused("sixteen-bit floats, not", || {
        gpu.norm_rows(out, order, of_bytes, &norm)
    });
    refused("type of both", || gpu.add(out, brain));
    refused("type of both", || gpu.copy_columns(out, brain));
    refused("type of both", || gpu.norm_rows(out, order, brain, &norm));
    refused("type of both", || gpu.gather_rows(out, order, brain));
    refused("type of both", || gpu.gate(out, brain, Activation::Silu));
    refused("type of both", || gpu.project(t.out(ROWS, ROWS), x, brain));
    refused("type of the product", || {
        gpu.project(matrix(&t.out, Dtype::BF16, ROWS, ROWS), x, x)
    });
    let mut hessian = DeviceHessian::new(gpu, COLUMNS).unwrap();
    refused("sixteen-bit floats, not", || hessian.add(of_bytes));
}

#[test]
fn orders_of_other_rows_and_counts_that_wrap_are_refused() {
    let Some(t) = Refusing::new() else { return };
    let gpu = &t.gpu;
    let norm = DeviceNorm::rms(gpu, &[1.0; COLUMNS], 1e-6).unwrap();
    refused("channels of the rows", || {
        let order = RowOrder::natural(COLUMNS + 1);
        gpu.norm_rows(t.out(ROWS, COLUMNS + 1), order, t.x(ROWS, COLUMNS), &norm)
    });
    refused("elements", || t.x(0, 0).reshaped([1 << 63, 2]));
    let shape = AttentionShape::new(2, 1, 16);
    let cache = DeviceKeyValues::new(gpu, 1, 10, shape, Dtype::F16).unwrap();
    refused("tokens of the cache", || {
        let first = usize::MAX;
        cache.attend_prompt(t.out(2, 32), t.x(2, 32), 0, first, shape)
    });
    let uncounted = DeviceKeyValues::new(gpu, 1 << 40, 1 << 40, shape, Dtype::F16);
    assert!(
        uncounted.is_err(),
        "a cache of more bytes than can be counted"
    );
    let store = ActivationStore::new(gpu, 2, [4000, 2000], 0, 1).unwrap();
    refused("room for the matrix", || store.get(0, t.out(1, 2000)));
    refused("whole windows", || {
        let (q, kv) = (t.x(5, 32), t.x(5, 16));
        gpu.attend(t.out(5, 32), q, kv, kv, 2, shape)
    });
}

/// A graph knows the addresses of buffers: those that are dropped while it exists stay where they are.
#[test]
fn recorded_work_outlives_the_buffers_of_its_operands() {
    let Some(gpu) = gpu() else { return };
    let out = Buffer::zeros(&gpu, 2 * COLUMNS).unwrap();
    let x = upload(&gpu, Dtype::F16, &[1.0; COLUMNS]);
    let work = || {
        gpu.add(
            matrix(&out, Dtype::F16, 1, COLUMNS),
            matrix(&x, Dtype::F16, 1, COLUMNS),
        )
    };
    work().unwrap();
    let recorded = gpu.record(work).unwrap();
    drop(x);
    // Memory of just that size, which the pool would give again.
    let others: Vec<Buffer> = (0..8).map(|_| poisoned(&gpu, COLUMNS)).collect();
    recorded.run().unwrap();
    let sums = gpu.download(matrix(&out, Dtype::F16, 1, COLUMNS)).unwrap();
    assert!(sums.iter().all(|sum| *sum == 2.0), "{sums:?}");
    drop((recorded, others));
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        gpu.record(|| panic!("while work is recorded"))
    }));
    assert!(panicked.is_err());
    work_after_a_panic(&gpu);
}

/// The stream records no more.
fn work_after_a_panic(gpu: &Arc<Gpu>) {
    let there = upload(gpu, Dtype::F16, &[3.0]);
    let got = gpu.download(matrix(&there, Dtype::F16, 1, 1)).unwrap();
    assert_eq!(got, [3.0]);
}
