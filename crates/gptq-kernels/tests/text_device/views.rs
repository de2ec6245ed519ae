//! Parts of matrices and slices: where they lie, and what is written through them.

use std::ops::Range;
use std::sync::Arc;

use gptq_kernels::cuda::{Buffer, DeviceMatrix, Gpu, RowOrder};
use gptq_types::Dtype;
use half::f16;

use super::common::gpu;
use super::{BOTH, bits, matrix, poisoned, upload};

pub(super) const ROWS: usize = 9;
pub(super) const COLUMNS: usize = 23;

/// Sixteen-bit elements whose bits are their places.
pub(super) fn numbered(gpu: &Arc<Gpu>, count: usize) -> Buffer {
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
