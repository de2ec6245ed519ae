//! Parts of matrices and slices: where they lie, what is written through them, and which are refused, as
//! are operands of other shapes.

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
use super::{BOTH, bits, matrix, poisoned, upload};

const ROWS: usize = 9;
const COLUMNS: usize = 23;

/// Sixteen-bit elements whose bits are their places.
fn numbered(gpu: &Arc<Gpu>, count: usize) -> Buffer {
    let places: Vec<u16> = (0..count as u16).collect();
    Buffer::from_host(gpu, &places).unwrap()
}

/// Places of a part of a matrix with rows of `COLUMNS`.
fn places(rows: Range<usize>, columns: Range<usize>) -> Vec<u16> {
    let columns = || columns.clone();
    rows.flat_map(|row| columns().map(move |column| (row * COLUMNS + column) as u16))
        .collect()
}

/// The bits of a sixteen-bit matrix, which may have gaps.
fn bits_of(gpu: &Arc<Gpu>, x: DeviceMatrix<'_>) -> Vec<u16> {
    let out = poisoned(gpu, x.elements() + 1);
    let to = matrix(&out, x.dtype(), x.rows(), x.columns());
    gpu.copy_columns(to, x).unwrap();
    let mut got: Vec<u16> = out.to_host(x.elements() + 1).unwrap();
    assert_eq!(got.pop(), Some(u16::MAX), "behind {x:?}");
    got
}

#[test]
fn parts_of_a_matrix_lie_where_they_should() {
    let Some(gpu) = gpu() else { return };
    // One more row in the buffer than in the matrix.
    let there = numbered(&gpu, (ROWS + 1) * COLUMNS);
    for dtype in BOTH {
        let all = matrix(&there, dtype, ROWS, COLUMNS);
        for (rows, columns) in [
            (0..ROWS, 0..COLUMNS),
            (2..5, 0..COLUMNS),
            (0..ROWS, 7..8),
            (3..ROWS, 8..COLUMNS),
            (1..7, 0..16),
            (8..9, 3..22),
            (8..9, 22..23),
            (4..4, 3..9),
            (1..3, 5..5),
            (ROWS..ROWS, COLUMNS..COLUMNS),
        ] {
            let what = format!("rows {rows:?}, columns {columns:?}");
            let part = all.row_range(rows.clone()).column_range(columns.clone());
            let other = all.column_range(columns.clone()).row_range(rows.clone());
            assert_eq!(part, other, "{what}");
            let size = [rows.len(), columns.len()];
            assert_eq!([part.rows(), part.columns()], size, "{what}");
            assert_eq!(part.elements(), size[0] * size[1], "{what}");
            assert_eq!(part.dtype(), dtype, "{what}");
            let whole = rows.len() <= 1 || columns.len() == COLUMNS;
            assert_eq!(part.is_contiguous(), whole, "{what}");
            let want = places(rows, columns);
            assert_eq!(bits_of(&gpu, part), want, "{what}");
            // Without gaps it is copied as it lies, and its rows may have another length.
            if whole && !want.is_empty() {
                let out = poisoned(&gpu, want.len());
                let to = matrix(&out, dtype, want.len(), 1);
                gpu.copy(to, part).unwrap();
                assert_eq!(out.to_host::<u16>(want.len()).unwrap(), want, "{what}");
                let column = part.reshaped([want.len(), 1]);
                assert_eq!(bits_of(&gpu, column), want, "{what}");
            }
        }
        // Parts of parts.
        let part = all.row_range(2..8).row_range(1..4);
        assert_eq!(part, all.row_range(3..6));
        let part = part.column_range(5..20).column_range(4..9);
        assert_eq!(part, all.column_range(9..14).row_range(3..6));
        assert_eq!(bits_of(&gpu, part), places(3..6, 9..14));
        let long = all.row_range(2..6).reshaped([2, 2 * COLUMNS]);
        let of_long = long.row_range(1..2).column_range(COLUMNS..COLUMNS + 4);
        assert_eq!(bits_of(&gpu, of_long), places(5..6, 0..4));
        assert_eq!(matrix(&there, dtype, 4, COLUMNS), all.row_range(0..4));
    }
}

/// Elements of four bytes, and of one.
#[test]
fn parts_of_other_types_lie_where_they_should() {
    let Some(gpu) = gpu() else { return };
    let values: Vec<f32> = (0..ROWS * COLUMNS).map(|place| place as f32).collect();
    let there = Buffer::from_host(&gpu, &values).unwrap();
    let all = there.matrix([ROWS, COLUMNS], Dtype::F32);
    let one_row = all.row_range(4..5).column_range(3..8);
    for (part, first) in [
        (all.row_range(2..5), 2 * COLUMNS),
        (one_row, 4 * COLUMNS + 3),
    ] {
        let out = Buffer::zeros(&gpu, part.elements() * 4).unwrap();
        gpu.copy(out.matrix([1, part.elements()], Dtype::F32), part)
            .unwrap();
        let got: Vec<f32> = out.to_host(part.elements()).unwrap();
        assert_eq!(got, values[first..][..part.elements()]);
    }
    let bytes: Vec<u8> = (0..(ROWS * COLUMNS) as u8).collect();
    let there = Buffer::from_host(&gpu, &bytes).unwrap();
    let all = there.matrix([ROWS, COLUMNS], Dtype::U8);
    let out = Buffer::zeros(&gpu, 2 * COLUMNS).unwrap();
    let to = out.matrix([2, COLUMNS], Dtype::U8);
    gpu.copy(to, all.row_range(6..8)).unwrap();
    let got: Vec<u8> = out.to_host(2 * COLUMNS).unwrap();
    assert_eq!(got, bytes[6 * COLUMNS..8 * COLUMNS]);
}

#[test]
fn parts_of_a_slice_lie_where_they_should() {
    let Some(gpu) = gpu() else { return };
    let mut want: Vec<i32> = (0..40).collect();
    let there = Buffer::from_host(&gpu, &want).unwrap();
    let all = there.slice::<i32>(30); // of forty
    assert_eq!((all.len(), all.is_empty()), (30, false));
    let part = all.part(7..19);
    gpu.write(part.part(2..6), &[-1, -2, -3, -4]).unwrap();
    want[9..13].copy_from_slice(&[-1, -2, -3, -4]);
    assert_eq!(there.to_host::<i32>(40).unwrap(), want);
    assert_eq!((part.len(), part.part(12..12).is_empty()), (12, true));
    // Elements are as long as their type says.
    gpu.write(there.slice::<u64>(20).part(15..17), &[0, u64::MAX])
        .unwrap();
    want[30..34].copy_from_slice(&[0, 0, -1, -1]);
    assert_eq!(there.to_host::<i32>(40).unwrap(), want);
    // Kernels begin where the part does.
    let table = numbered(&gpu, ROWS * COLUMNS);
    let ids = Buffer::from_host(&gpu, &[1000u32, 7, 0, 8, 1000]).unwrap();
    let out = poisoned(&gpu, 3 * COLUMNS);
    let dtype = Dtype::F16;
    let from = matrix(&table, dtype, ROWS, COLUMNS);
    let to = matrix(&out, dtype, 3, COLUMNS);
    gpu.look_up(to, from, ids.slice(5).part(1..4), 1.0).unwrap();
    let want = [7, 0, 8].map(|row| places(row..row + 1, 0..COLUMNS));
    assert_eq!(out.to_host::<u16>(3 * COLUMNS).unwrap(), want.concat());
}

/// Bits behind a matrix, before its first column and behind its last are as they were.
#[test]
fn what_is_written_to_a_part_stays_inside_it() {
    let Some(gpu) = gpu() else { return };
    let dtype = Dtype::F16;
    let (count, rows, columns) = (ROWS * COLUMNS, 2..5, 6..22);
    let numbers = numbered(&gpu, count);
    let some = matrix(&numbers, dtype, ROWS, COLUMNS).row_range(rows.clone());
    let check = |what: &str, columns: Range<usize>, want: &[u16], write: &dyn Fn(DeviceMatrix)| {
        let there = poisoned(&gpu, count);
        let all = matrix(&there, dtype, ROWS, COLUMNS);
        write(all.row_range(rows.clone()).column_range(columns.clone()));
        let mut all = vec![u16::MAX; count];
        for (row, want) in rows.clone().zip(want.chunks(columns.len())) {
            all[row * COLUMNS..][columns.clone()].copy_from_slice(want);
        }
        assert_eq!(there.to_host::<u16>(count).unwrap(), all, "{what}");
    };
    let whole = places(rows.clone(), 0..COLUMNS);
    check("a copy", 0..COLUMNS, &whole, &|to| {
        gpu.copy(to, some).unwrap();
    });
    check("copied columns", 0..COLUMNS, &whole, &|to| {
        gpu.copy_columns(to, some).unwrap();
    });
    check("rows in order", 0..COLUMNS, &whole, &|to| {
        gpu.gather_rows(to, RowOrder::natural(COLUMNS), some)
            .unwrap();
    });
    let stored: Vec<u8> = whole.iter().flat_map(|bits| bits.to_le_bytes()).collect();
    check("stored bytes", 0..COLUMNS, &whole, &|to| {
        gpu.write_stored(to, &stored).unwrap();
    });
    let values: Vec<f32> = (0..whole.len()).map(|place| place as f32).collect();
    let halves: Vec<u16> = values.iter().map(|x| f16::from_f32(*x).to_bits()).collect();
    check("uploaded values", 0..COLUMNS, &halves, &|to| {
        gpu.upload(to, &values).unwrap();
    });

    // A product with rows of the unit matrix, twice: exact in every type.
    let (k, n) = (8, columns.len());
    let x: Vec<f64> = (0..rows.len() * k).map(|i| i as f64 - 9.0).collect();
    let unit: Vec<f64> = (0..n * k)
        .map(|i| if i / k % k == i % k { 1.0 } else { 0.0 })
        .collect();
    let [of_x, of_unit] = [&x, &unit].map(|values| upload(&gpu, dtype, values));
    let product: Vec<f64> = (x.chunks(k))
        .flat_map(|row| row.iter().cycle().take(n).copied())
        .collect();
    let (x, weight) = (
        matrix(&of_x, dtype, rows.len(), k),
        matrix(&of_unit, dtype, n, k),
    );
    let once: Vec<u16> = product.iter().map(|x| bits(dtype, *x)).collect();
    check("a product", columns.clone(), &once, &|to| {
        gpu.project(to, x, weight).unwrap();
    });
    let twice: Vec<u16> = product.iter().map(|x| bits(dtype, 2.0 * x)).collect();
    check("a sum of products", columns.clone(), &twice, &|to| {
        gpu.project(to, x, weight).unwrap();
        gpu.project_onto(to, x, weight, true).unwrap();
    });
    let mut wide = vec![-7.0f32; count];
    let there = Buffer::from_host(&gpu, &wide).unwrap();
    let to = there.matrix([ROWS, COLUMNS], Dtype::F32);
    let to = to.row_range(rows.clone()).column_range(columns.clone());
    gpu.project(to, x, weight).unwrap();
    for (row, product) in rows.zip(product.chunks(n)) {
        let place = &mut wide[row * COLUMNS..][columns.clone()];
        (place.iter_mut().zip(product)).for_each(|(place, x)| *place = *x as f32);
    }
    assert_eq!(there.to_host::<f32>(count).unwrap(), wide);
}

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
