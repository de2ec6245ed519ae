//! What blocks do to rows in place: norms of outputs, sums, factors, caps, rotated heads, parts of fused rows.

use std::sync::Arc;

use gptq_kernels::cuda::{Buffer, DeviceMatrix, DeviceNorm, Gpu, RotaryTable};
use gptq_kernels::{Pairing, Rotation};
use gptq_types::Dtype;

use super::common::{Random, gpu};
use super::{BOTH, bits, layer, matrix, near, poisoned, rms, rounded, upload, values, weights};

/// A norm on the GPU, and the same of a row in f64.
type Norm = (DeviceNorm, Box<dyn Fn(&[f64]) -> Vec<f64>>);

/// All kinds, with weights of `width`.
fn norms(gpu: &Arc<Gpu>, dtype: Dtype, width: usize, random: &mut Random) -> [Norm; 3] {
    let (weight, bias) = (weights(random, width), weights(random, width));
    let (of_rms, of_layer) = (weight.clone(), weight.clone());
    [
        (
            DeviceNorm::rms(gpu, &weight, 1e-6).unwrap(),
            Box::new(move |row| rms(dtype, row, &of_rms, 1e-6)),
        ),
        (
            DeviceNorm::layer(gpu, &weight, None, 1e-3).unwrap(),
            Box::new(move |row| layer(dtype, row, &of_layer, None, 1e-3)),
        ),
        (
            DeviceNorm::layer(gpu, &weight, Some(&bias), 1e-3).unwrap(),
            Box::new(move |row| layer(dtype, row, &weight, Some(&bias), 1e-3)),
        ),
    ]
}

/// Heads, and whole projections, normed where a fused linear left them; what is beside them stays.
#[test]
fn runs_of_columns_are_normed_in_place() {
    let Some(gpu) = gpu() else { return };
    for dtype in BOTH {
        for (rows, runs, width, before, after) in [
            (1, 8, 128, 0, 64),
            (3, 5, 64, 320, 8),
            (40, 3, 96, 8, 0),
            (300, 2, 256, 16, 16),
            (3, 4, 50, 3, 2),
            (40, 1, 4096, 0, 1024),
            (3, 1, 16384, 8, 8),
            (1, 1, 12301, 0, 1),
            (70_000, 1, 16, 8, 0),
        ] {
            let mut random = Random((rows + width) as u64);
            for (kind, (norm, of)) in norms(&gpu, dtype, width, &mut random).iter().enumerate() {
                let pitch = before + runs * width + after;
                let mut x = values(&mut random, dtype, rows * pitch);
                let there = upload(&gpu, dtype, &x);
                let all = matrix(&there, dtype, rows, pitch);
                let normed = before..before + runs * width;
                gpu.norm_outputs(all.column_range(normed), norm).unwrap();
                for row in x.chunks_mut(pitch) {
                    for run in row[before..before + runs * width].chunks_mut(width) {
                        let normed = of(run);
                        run.copy_from_slice(&normed);
                    }
                }
                let got = gpu.download(all).unwrap();
                let what = format!("{runs} runs of {width} in {rows} rows, kind {kind}");
                near(&got, &x, dtype, 0.01, &what);
            }
        }
    }
}

#[test]
fn norms_and_factors_are_added_to_hidden_states() {
    let Some(gpu) = gpu() else { return };
    for dtype in BOTH {
        for (rows, width) in [(1, 4096), (3, 2304), (40, 100), (300, 1152), (3, 9000)] {
            let mut random = Random((rows + width) as u64);
            let hidden = values(&mut random, dtype, rows * width);
            let y = values(&mut random, dtype, rows * width);
            let what = format!("{rows} rows of {width}");
            let of_y = upload(&gpu, dtype, &y);
            let place_y = matrix(&of_y, dtype, rows, width);
            for factor in [1.0f32, 0.22] {
                let added = |y: f64| rounded(dtype, f64::from(y as f32 * factor));
                for (norm, of) in &norms(&gpu, dtype, width, &mut random) {
                    let there = upload(&gpu, dtype, &hidden);
                    let place = matrix(&there, dtype, rows, width);
                    gpu.add_normed(place, place_y, norm, factor).unwrap();
                    let normed = y.chunks(width).flat_map(of);
                    let want: Vec<f64> = (hidden.iter().zip(normed))
                        .map(|(x, y)| x + added(y))
                        .collect();
                    let got = gpu.download(place).unwrap();
                    near(
                        &got,
                        &want,
                        dtype,
                        2.0,
                        &format!("norm of {what}, {factor}"),
                    );
                }
                let there = upload(&gpu, dtype, &hidden);
                let place = matrix(&there, dtype, rows, width);
                gpu.add_scaled(place, place_y, factor).unwrap();
                let want: Vec<f64> = (hidden.iter().zip(&y))
                    .map(|(x, y)| rounded(dtype, x + added(*y)))
                    .collect();
                let got = gpu.download(place).unwrap();
                near(
                    &got,
                    &want,
                    dtype,
                    0.01,
                    &format!("sum of {what}, {factor}"),
                );
                gpu.scale(place, factor).unwrap();
                let want: Vec<f64> = want.iter().map(|x| x * f64::from(factor)).collect();
                let got = gpu.download(place).unwrap();
                near(
                    &got,
                    &want,
                    dtype,
                    0.01,
                    &format!("product of {what}, {factor}"),
                );
            }
        }
        // From an odd element on, and not a multiple of eight.
        let mut random = Random(9);
        let (x, y) = (
            values(&mut random, dtype, 30),
            values(&mut random, dtype, 30),
        );
        let (of_x, of_y) = (upload(&gpu, dtype, &x), upload(&gpu, dtype, &y));
        let [part_x, part_y] =
            [&of_x, &of_y].map(|buffer| matrix(buffer, dtype, 1, 30).column_range(1..28));
        gpu.add_scaled(part_x, part_y, 2.0).unwrap();
        gpu.scale(part_x, 0.5).unwrap();
        let want: Vec<f64> = (0..30)
            .map(|i| match (1..28).contains(&i) {
                true => x[i] / 2.0 + y[i],
                false => x[i],
            })
            .collect();
        let got = gpu.download(matrix(&of_x, dtype, 1, 30)).unwrap();
        near(&got, &want, dtype, 1.0, "a part of a row");
    }
}

#[test]
fn columns_are_copied_and_rows_are_looked_up() {
    let Some(gpu) = gpu() else { return };
    for dtype in BOTH {
        for (rows, width, first, columns) in [
            (1, 64, 0, 64),
            (3, 4608, 3072, 1536),
            (40, 100, 7, 33),
            (300, 72, 8, 56),
            (70_000, 16, 8, 8),
        ] {
            let mut random = Random(width as u64);
            let x = values(&mut random, dtype, rows * width);
            let there = upload(&gpu, dtype, &x);
            let out = poisoned(&gpu, rows * columns);
            let from = matrix(&there, dtype, rows, width);
            let to = matrix(&out, dtype, rows, columns);
            gpu.copy_columns(to, from.column_range(first..first + columns))
                .unwrap();
            let want: Vec<u16> = (x.chunks(width))
                .flat_map(|row| &row[first..first + columns])
                .map(|x| bits(dtype, *x))
                .collect();
            assert!(
                out.to_host::<u16>(rows * columns).unwrap() == want,
                "{width}"
            );
        }
        let mut random = Random(3);
        let table = values(&mut random, dtype, 50 * 333);
        let there = upload(&gpu, dtype, &table);
        let ids: Vec<u32> = (0..300).map(|i| i * 7 % 50).collect();
        let out = poisoned(&gpu, ids.len() * 333);
        for factor in [1.0, 48.0, 0.3] {
            let from = matrix(&there, dtype, 50, 333);
            let to = matrix(&out, dtype, ids.len(), 333);
            gpu.embed(to, from, &ids, factor).unwrap();
            let want: Vec<u16> = (ids.iter())
                .flat_map(|id| &table[*id as usize * 333..][..333])
                .map(|x| bits(dtype, f64::from(*x as f32 * factor)))
                .collect();
            assert!(out.to_host::<u16>(want.len()).unwrap() == want, "{factor}");
        }
    }
}

#[test]
fn logits_have_a_soft_cap() {
    let Some(gpu) = gpu() else { return };
    for count in [1, 3, 257, 300_000] {
        let mut random = Random(count as u64);
        let x: Vec<f32> = (0..count).map(|_| 90.0 * random.uniform()).collect();
        let there = Buffer::from_host(&gpu, &x).unwrap();
        gpu.soft_cap(there.matrix([1, count], Dtype::F32), 30.0)
            .unwrap();
        let got: Vec<f32> = there.to_host(count).unwrap();
        for (x, got) in x.iter().zip(got) {
            let want = 30.0 * (f64::from(*x) / 30.0).tanh();
            assert!((f64::from(got) - want).abs() < 1e-5, "{got} for {want}");
        }
    }
}

/// A matrix that begins at any element of a buffer.
fn from_element(
    buffer: &Buffer,
    dtype: Dtype,
    begin: usize,
    [rows, columns]: [usize; 2],
) -> DeviceMatrix<'_> {
    let count = rows * columns;
    let all = matrix(buffer, dtype, 1, begin + count);
    let part = all.column_range(begin..begin + count);
    part.reshaped([rows, columns])
}

#[test]
fn the_first_element_that_is_not_finite_is_found() {
    let Some(gpu) = gpu() else { return };
    for dtype in BOTH {
        let infinite = bits(dtype, f64::INFINITY);
        let largest = infinite - 1;
        for (rows, columns) in [(1, 1), (3, 5), (40, 64), (300, 11008)] {
            let count = rows * columns;
            let mut x = vec![largest; count + 1];
            x.iter_mut().step_by(2).for_each(|x| *x |= 0x8000);
            // One before the elements does not count: they begin at the first or at the second.
            for begin in [0, 1] {
                for bad in [infinite, infinite | 0x8000, infinite | 1, u16::MAX] {
                    for at in [0, 1, 7, 8, count / 2, count - 1] {
                        if at >= count {
                            continue;
                        }
                        let mut x = x.clone();
                        x[begin + at] = bad;
                        x[begin + count - 1] = bad;
                        x[0] = if begin == 1 { bad } else { x[0] };
                        if count > 100_000 && bad != infinite {
                            continue;
                        }
                        let there = Buffer::from_host(&gpu, &x).unwrap();
                        let part = from_element(&there, dtype, begin, [rows, columns]);
                        assert_eq!(gpu.first_not_finite(part).unwrap(), Some(at));
                    }
                }
            }
            let there = Buffer::from_host(&gpu, &x[..count]).unwrap();
            let all = matrix(&there, dtype, rows, columns);
            assert_eq!(gpu.first_not_finite(all).unwrap(), None);
        }
    }
}

#[test]
fn a_part_of_each_head_turns() {
    let Some(gpu) = gpu() else { return };
    for dtype in BOTH {
        for (heads, head_dim, rotary) in [
            (4, 128, 128),
            (3, 64, 32),
            (2, 96, 72),
            (5, 16, 16),
            (1, 512, 128),
            (2, 80, 20),
            (3, 6, 2),
        ] {
            for pairing in [Pairing::Halves, Pairing::Interleaved] {
                let tokens = 20;
                let frequencies: Vec<f32> =
                    (0..rotary / 2).map(|i| 1.0 / (1.0 + i as f32)).collect();
                let rotation = Rotation::new(&frequencies, 0..tokens, 1.25, head_dim, pairing);
                let table = RotaryTable::new(&gpu, &rotation).unwrap();
                let mut random = Random(head_dim as u64);
                let x = values(&mut random, dtype, 3 * tokens * heads * head_dim);
                let there = upload(&gpu, dtype, &x);
                let place = matrix(&there, dtype, 3 * tokens, heads * head_dim);
                gpu.rotate(place, &table, tokens).unwrap();
                let want: Vec<f64> = (x.chunks(head_dim).enumerate())
                    .flat_map(|(at, head)| rotated(head, at / heads % tokens, &rotation))
                    .collect();
                let got = gpu.download(place).unwrap();
                let what = format!("{rotary} of {head_dim}, {pairing:?}");
                near(&got, &want, dtype, 0.01, &what);
                // What passes is not touched.
                for (got, x) in got.chunks(head_dim).zip(x.chunks(head_dim)) {
                    for (got, x) in got.iter().zip(x).skip(rotary) {
                        assert_eq!(f64::from(*got), *x, "{what}");
                    }
                }
            }
        }
    }
}

/// A head at `position`, not rounded.
pub fn rotated(head: &[f64], position: usize, rotation: &Rotation) -> Vec<f64> {
    let (cosine, sine) = rotation.tables();
    let half = rotation.rotary_dim() / 2;
    let mut out = head.to_vec();
    for i in 0..half {
        let [c, s] = [cosine, sine].map(|table| f64::from(table[position * half + i]));
        let (low, high) = match rotation.pairing() {
            Pairing::Halves => (i, half + i),
            Pairing::Interleaved => (2 * i, 2 * i + 1),
        };
        out[low] = head[low] * c - head[high] * s;
        out[high] = head[high] * c + head[low] * s;
    }
    out
}
