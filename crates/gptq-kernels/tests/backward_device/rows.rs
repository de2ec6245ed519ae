//! Gradients of norms, gates, activations, RoPE and products; the output error.

use gptq_kernels::cuda::{DeviceNorm, RotaryTable};
use gptq_kernels::{
    Activation, NormGradients, Pairing, Rotation, RowScale, activate_backward, gated_backward,
    layer_norm_backward, product_input_backward, rms_norm_backward,
};

use super::common::{Random, gpu};
use super::{BOTH, Cases, columns, matrix, poisoned, rounded, tolerance, upload, values, wide};

const ACTIVATIONS: [Activation; 2] = [Activation::Silu, Activation::GeluTanh];

#[test]
fn gradients_of_norms() {
    let Some(gpu) = gpu() else { return };
    let mut cases = Cases::new("norm");
    // Rows, columns, width of a run: rows and heads, by ones and by eights, few elements and many.
    let sizes = [
        [37, 4096, 4096],
        [3, 11008, 11008],
        [33, 768, 128],
        [19, 640, 80],
        [9, 100, 100],
        [7, 111, 37],
        [300, 24, 8],
        [5, 6, 3],
    ];
    for dtype in BOTH {
        for [rows, all, width] in sizes {
            let mut random = Random((rows * all) as u64);
            let count = rows * all;
            // With a mean that a layer norm has to take away.
            let x: Vec<f64> = (values(&mut random, dtype, count).iter())
                .map(|x| rounded(dtype, 2.0 * x + 0.75))
                .collect();
            let dy = values(&mut random, dtype, count);
            let weight: Vec<f32> = (0..width).map(|_| random.uniform()).collect();
            let (of_x, of_dy) = (upload(&gpu, dtype, &x), upload(&gpu, dtype, &dy));
            let [x_there, dy_there] =
                [&of_x, &of_dy].map(|rows_of| matrix(rows_of, dtype, rows, all));
            let (eps, own) = (1e-3f32, wide(&weight));
            let root_mean_square = DeviceNorm::rms(&gpu, &weight, eps).unwrap();
            let layer = DeviceNorm::layer(&gpu, &weight, Some(&weight), eps).unwrap();
            let eps = f64::from(eps);
            let wanted = [
                rms_norm_backward(&dy, &x, &own, eps, None),
                layer_norm_backward(&dy, &x, &own, eps, NormGradients::none()),
            ];
            for ((norm, want), kind) in [root_mean_square, layer]
                .iter()
                .zip(wanted)
                .zip(["rms", "layer"])
            {
                let what = format!("{kind}, {dtype}, {rows} x {all}, runs of {width}");
                let out = poisoned(&gpu, count);
                let dx = matrix(&out, dtype, rows, all);
                let run = gpu.norm_backward(dx, dy_there, x_there, norm);
                if cases.ok(run, &what).is_none() {
                    continue;
                }
                let got = gpu.download(dx).unwrap();
                cases.near(&got, &want, tolerance(dtype), &what);
                let place = upload(&gpu, dtype, &dy);
                let place = matrix(&place, dtype, rows, all);
                gpu.norm_backward(place, place, x_there, norm).unwrap();
                let again = gpu.download(place).unwrap();
                cases.same(&again, &got, &format!("in the place of dy: {what}"));
            }
        }
    }
    cases.end();
}

#[test]
fn gradients_of_gates_and_activations() {
    let Some(gpu) = gpu() else { return };
    let mut cases = Cases::new("gate");
    // Rows, columns, and columns beside them; more rows than a launch grid has.
    let sizes = [
        [33, 11008, 8],
        [5, 101, 3],
        [40, 256, 0],
        [1, 1, 0],
        [66_000, 8, 8],
    ];
    for dtype in BOTH {
        for [rows, width, beside] in sizes {
            let pitch = width + beside;
            let mut random = Random((rows * pitch) as u64);
            let gates: Vec<f64> = (values(&mut random, dtype, rows * pitch).iter())
                .map(|x| rounded(dtype, 8.0 * x))
                .collect();
            let ups = values(&mut random, dtype, rows * pitch);
            let dy = values(&mut random, dtype, rows * width);
            let there = upload(&gpu, dtype, &dy);
            let dy_there = matrix(&there, dtype, rows, width);
            for activation in ACTIVATIONS {
                let what = format!("{activation:?}, {dtype}, {rows} x {width} of {pitch}");
                let [mut gate, mut up] = [&gates, &ups].map(|x| columns(x, pitch, 0..width));
                let mut alone = gate.clone();
                gated_backward(&dy, &mut gate, &mut up, activation);
                activate_backward(&dy, &mut alone, activation);
                let [of_gate, of_up, of_x] = [&gates, &ups, &gates].map(|x| upload(&gpu, dtype, x));
                let [whole_gate, whole_up, whole_x] =
                    [&of_gate, &of_up, &of_x].map(|x| matrix(x, dtype, rows, pitch));
                let [g, u, x] = [whole_gate, whole_up, whole_x].map(|x| x.column_range(0..width));
                let run = gpu.gate_backward(dy_there, g, u, activation);
                let ran = cases.ok(run, &what).is_some();
                let run = gpu.activate_backward(dy_there, x, activation);
                if !ran || cases.ok(run, &what).is_none() {
                    continue;
                }
                let parts = [
                    (whole_gate, &gate, "gate"),
                    (whole_up, &up, "up"),
                    (whole_x, &alone, "x"),
                ];
                let before = [&gates, &ups, &gates];
                for ((whole, want, of), before) in parts.into_iter().zip(before) {
                    let got = gpu.download(whole).unwrap();
                    let inner = columns(&got, pitch, 0..width);
                    cases.near(&inner, want, tolerance(dtype), &format!("{of}, {what}"));
                    let (outer, before) = (
                        columns(&got, pitch, width..pitch),
                        columns(before, pitch, width..pitch),
                    );
                    cases.same(&wide(&outer), &before, &format!("beside {of}, {what}"));
                }
            }
        }
    }
    // Far from 0 nothing overflows.
    for dtype in BOTH {
        let far = [0.0, 40.0, -40.0, 6e4, -6e4, 1e3, -1e3, 100.0].map(|x| rounded(dtype, x));
        for activation in ACTIVATIONS {
            let [x, dy] = [far.to_vec(), vec![1.0; far.len()]].map(|x| upload(&gpu, dtype, &x));
            let [x, dy] = [&x, &dy].map(|x| matrix(x, dtype, 1, far.len()));
            gpu.activate_backward(dy, x, activation).unwrap();
            let got = gpu.download(x).unwrap();
            let want = [0.5, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0];
            cases.near(&got, &want, 1e-6, &format!("far, {activation:?}, {dtype}"));
        }
    }
    cases.end();
}

#[test]
fn gradients_of_rotations() {
    let Some(gpu) = gpu() else { return };
    let mut cases = Cases::new("rope");
    let (tokens, heads) = (45, 3);
    for dtype in BOTH {
        for (head_dim, pairs) in [(64, 32), (24, 5), (128, 64)] {
            for pairing in [Pairing::Halves, Pairing::Interleaved] {
                let frequencies: Vec<f32> = (0..pairs).map(|i| 0.8f32.powi(i)).collect();
                let rotation = Rotation::new(&frequencies, 0..tokens, 1.3, head_dim, pairing);
                let table = RotaryTable::new(&gpu, &rotation.clone().transposed()).unwrap();
                let width = heads * head_dim;
                let mut random = Random(head_dim as u64);
                let mut dy = values(&mut random, dtype, 2 * tokens * width);
                let there = upload(&gpu, dtype, &dy);
                let there = matrix(&there, dtype, 2 * tokens, width);
                gpu.rotate(there, &table, tokens).unwrap();
                rotation.apply_transposed(&mut dy, width, tokens);
                let what = format!("{dtype}, {pairing:?}, {pairs} pairs of {head_dim}");
                let got = gpu.download(there).unwrap();
                cases.near(&got, &dy, tolerance(dtype), &what);
            }
        }
    }
    cases.end();
}

#[test]
fn gradients_of_products() {
    let Some(gpu) = gpu() else { return };
    let mut cases = Cases::new("product");
    let sizes = [
        [70, 37, 53],
        [1, 5, 3],
        [33, 256, 512],
        [100, 1096, 172],
        [9, 2048, 96],
    ];
    for dtype in BOTH {
        for [rows, k, n] in sizes {
            let mut random = Random((rows * k * n) as u64);
            let dy = values(&mut random, dtype, rows * n);
            let weight = values(&mut random, dtype, n * k); // [N, K]
            let mut transposed = vec![0.0; n * k]; // [K, N], as the processor has it
            for (i, row) in weight.chunks_exact(k).enumerate() {
                for (j, w) in row.iter().enumerate() {
                    transposed[j * n + i] = *w;
                }
            }
            let before = values(&mut random, dtype, rows * k);
            let mut want = vec![0.0; rows * k];
            product_input_backward(&mut want, &dy, &transposed, rows, k, n);
            let sum: Vec<f64> = want.iter().zip(&before).map(|(x, y)| x + y).collect();
            let [of_dy, of_weight, of_before] =
                [&dy, &weight, &before].map(|x| upload(&gpu, dtype, x));
            let out = poisoned(&gpu, rows * k);
            let there = matrix(&of_dy, dtype, rows, n);
            let weight = matrix(&of_weight, dtype, n, k);
            for (to, add, want) in [(&out, false, &want), (&of_before, true, &sum)] {
                let dx = matrix(to, dtype, rows, k);
                let what = format!("{dtype}, {rows} x {k} x {n}, add {add}");
                if cases
                    .ok(gpu.project_backward(dx, there, weight, add), &what)
                    .is_some()
                {
                    let got = gpu.download(dx).unwrap();
                    cases.near(&got, want, tolerance(dtype), &what);
                }
            }
            // From and to columns of wider matrices.
            let whole_dy: Vec<f64> = (dy.chunks_exact(n))
                .flat_map(|row| [&[3.0; 8], row].concat())
                .collect();
            let [from, to] = [
                upload(&gpu, dtype, &whole_dy),
                poisoned(&gpu, rows * (k + 8)),
            ];
            let part = matrix(&from, dtype, rows, n + 8).column_range(8..n + 8);
            let whole = matrix(&to, dtype, rows, k + 8);
            let what = format!("{dtype}, {rows} x {k} x {n}, of wider matrices");
            let run = gpu.project_backward(whole.column_range(0..k), part, weight, false);
            if cases.ok(run, &what).is_some() {
                let got = gpu.download(whole).unwrap();
                cases.near(&columns(&got, k + 8, 0..k), &want, tolerance(dtype), &what);
                let outer = columns(&got, k + 8, k..k + 8);
                cases.check(outer.iter().all(|x| x.is_nan()), &format!("{what}: beside"));
            }
        }
    }
    cases.end();
}

#[test]
fn columns_of_fused_gradients() {
    let Some(gpu) = gpu() else { return };
    let mut cases = Cases::new("columns");
    for dtype in BOTH {
        for (rows, width, first, pitch) in [(33, 256, 128, 512), (5, 37, 3, 50), (7, 64, 1, 65)] {
            let mut random = Random(width as u64);
            let x = values(&mut random, dtype, rows * width);
            let (from, to) = (upload(&gpu, dtype, &x), poisoned(&gpu, rows * pitch));
            let whole = matrix(&to, dtype, rows, pitch);
            let what = format!("{dtype}, {rows} x {width} from {first} of {pitch}");
            let place = whole.column_range(first..first + width);
            let run = gpu.place_columns(place, matrix(&from, dtype, rows, width));
            if cases.ok(run, &what).is_some() {
                let got = gpu.download(whole).unwrap();
                let inner = columns(&got, pitch, first..first + width);
                cases.same(&wide(&inner), &x, &what);
                let others = got.iter().filter(|x| x.is_nan()).count();
                cases.same(
                    &[others],
                    &[rows * (pitch - width)],
                    &format!("beside, {what}"),
                );
            }
        }
    }
    cases.end();
}

#[test]
fn errors_of_outputs() {
    let Some(gpu) = gpu() else { return };
    let mut cases = Cases::new("error");
    for dtype in BOTH {
        for [rows, width] in [[1, 1], [3, 5], [33, 1000], [129, 4096]] {
            let mut random = Random((rows * width) as u64);
            let [y, target] = [(); 2].map(|()| values(&mut random, dtype, rows * width));
            let [of_y, of_target] = [&y, &target].map(|x| upload(&gpu, dtype, x));
            let [y_there, target_there] =
                [&of_y, &of_target].map(|x| matrix(x, dtype, rows, width));
            let difference: Vec<f64> = y.iter().zip(&target).map(|(y, t)| y - t).collect();
            let mean_squares = gptq_kernels::row_squares(&target, width);
            let squares = gpu.row_squares(target_there).unwrap();
            let off = |(got, want): (&f64, &f64)| (got - want).abs() / want;
            let off = squares.iter().zip(&mean_squares).map(off);
            cases.check(
                squares.len() == rows && off.fold(0.0, f64::max) < 1e-12,
                &format!("squares, {rows} x {width}"),
            );
            let scale = RowScale::of(mean_squares.clone());
            let share = |row: usize| {
                let scale = scale.share * (mean_squares[row] + scale.floor);
                1.0 / scale
            };
            let squares = difference.iter().enumerate();
            let want: f64 = squares.map(|(at, d)| share(at / width) * d * d).sum();
            let what = format!("{dtype}, {rows} x {width}");
            let got = gpu.output_error(y_there, target_there, scale).unwrap();
            let relative = (got - want).abs() / want;
            cases.check(
                relative <= 1e-6,
                &format!("{what}: {got} for {want}, {relative:.1e}"),
            );
            let again = gpu.output_error(y_there, target_there, scale).unwrap();
            cases.same(
                &[again.to_bits()],
                &[got.to_bits()],
                &format!("again, {what}"),
            );
            let want: Vec<f64> = (difference.iter().enumerate())
                .map(|(at, d)| 0.37 * share(at / width) * d)
                .collect();
            let out = poisoned(&gpu, rows * width);
            for place in [matrix(&out, dtype, rows, width), y_there] {
                gpu.error_gradient(place, y_there, target_there, scale, 0.37)
                    .unwrap();
                let got = gpu.download(place).unwrap();
                cases.near(&got, &want, tolerance(dtype), &format!("gradient, {what}"));
            }
        }
    }
    cases.end();
}
