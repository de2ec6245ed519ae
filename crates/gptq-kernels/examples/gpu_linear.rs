//! How long a packed product takes on the GPU, beside cuBLAS on sixteen-bit weights:
//! `gpu_linear [ROUNDS]`, needs `--features cuda`. Medians of single launches, before each of which
//! the second-level cache is filled with something else: "written" as triton's do_bench does it, so
//! that what is read must also wait for that to be written back; "read" where other weights were read
//! before. Then products in a row, as a decoder's step has them: one CUDA graph over weights that
//! together do not fit into that cache, seconds divided by their number.
#![allow(clippy::print_stdout)]

#[cfg(feature = "cuda")]
fn main() -> Result<(), Box<dyn std::error::Error>> {
    use gptq_kernels::cuda::{Buffer, DeviceMatrix, Gpu, PackedLinear};
    use gptq_types::{Bits, Dtype, SolvedLayer};
    use half::f16;

    const CACHE: usize = 256 << 20;
    const COPIES: usize = 8;
    const RUNS: usize = 8;
    fn matrix(buffer: &Buffer, rows: usize, columns: usize) -> DeviceMatrix<'_> {
        buffer.matrix([rows, columns], Dtype::F16)
    }
    let rounds = std::env::args().nth(1).map_or(Ok(21), |arg| arg.parse())?;
    let gpu = Gpu::open(0)?;
    let flush = Buffer::zeros(&gpu, CACHE)?;
    let line = Buffer::zeros(&gpu, 1 << 16)?;
    let time = |written: bool, work: &dyn Fn() -> Result<(), gptq_kernels::cuda::CudaError>| {
        let mut all = Vec::new();
        for _ in 0..rounds {
            match written {
                true => flush.clear()?,
                false => {
                    let other = matrix(&flush, CACHE / 2 / 8192, 8192);
                    let out = line.matrix([1, other.rows()], Dtype::F32);
                    gpu.project(out, matrix(&line, 1, 8192), other)?;
                }
            }
            let before = gpu.mark()?;
            work()?;
            all.push(before.seconds_to(&gpu.mark()?)? * 1e6);
        }
        all.sort_by(f64::total_cmp);
        Ok::<f64, gptq_kernels::cuda::CudaError>(all[all.len() / 2])
    };
    // Zeros would leave the tensor cores cooler than what they are made for.
    let random = |elements: usize| {
        let bits = |i: usize| (i.wrapping_mul(2_654_435_761) >> 8) as u16;
        let value = |i: usize| f16::from_f32(f32::from(bits(i)) / 32768.0 - 1.0).to_bits();
        Buffer::from_host(&gpu, &(0..elements).map(value).collect::<Vec<u16>>())
    };
    println!(
        "nothing between two marks: {:.1} us",
        time(true, &|| Ok(()))?
    );
    for (k, n) in [(4096usize, 4096usize), (4096, 11008), (11008, 4096)] {
        for (bits, act_order) in [
            (Bits::Four, false),
            (Bits::Four, true),
            (Bits::Eight, false),
        ] {
            let mut g_idx: Vec<u32> = (0..k).map(|channel| (channel / 128) as u32).collect();
            if act_order {
                g_idx = (0..k).map(|channel| g_idx[channel * 5 % k]).collect();
            }
            let layer = SolvedLayer {
                bits,
                in_features: k,
                out_features: n,
                codes: (0..k * n)
                    .map(|i| ((i * 2_654_435_761) >> 20) as u8 & bits.max_code() as u8)
                    .collect(),
                scales: vec![f16::from_f32(0.01); k / 128 * n],
                zeros: vec![bits.max_code().div_ceil(2) as u16; k / 128 * n],
                g_idx,
            };
            let copies = if bits == Bits::Four { COPIES } else { 1 };
            let linears = (0..copies)
                .map(|_| PackedLinear::new(&gpu, &layer, None, Dtype::F16))
                .collect::<Result<Vec<_>, _>>()?;
            let linear = &linears[0];
            let order = if act_order { " act-order" } else { "" };
            print!("{bits}-bit {k} x {n}{order}:");
            for rows in [1, 4, 8, 16, 32, 64, 128, 256, 1024, 4096] {
                let x = random(rows * k)?;
                let out = Buffer::zeros(&gpu, rows * n * 2)?;
                let (x, out) = (matrix(&x, rows, k), matrix(&out, rows, n));
                let work = || linear.multiply(out, x, false);
                print!(
                    " {rows}: {:.1} / {:.1}",
                    time(true, &work)?,
                    time(false, &work)?
                );
            }
            let floor = linear.bytes() as f64 / 4.3e12 * 1e6;
            println!(" us after written / read; codes and scales at 4.3 TB/s {floor:.1} us");
            if linears.len() < COPIES {
                continue;
            }
            print!("  in a row:");
            for rows in [1, 4, 8, 16, 32, 64] {
                let x = random(rows * k)?;
                let out = Buffer::zeros(&gpu, rows * n * 2)?;
                let (x, out) = (matrix(&x, rows, k), matrix(&out, rows, n));
                let each = || (linears.iter()).try_for_each(|one| one.multiply(out, x, false));
                each()?;
                let graph = gpu.record(|| (0..RUNS).try_for_each(|_| each()))?;
                graph.run()?;
                let before = gpu.mark()?;
                (0..RUNS).try_for_each(|_| graph.run())?;
                let seconds = before.seconds_to(&gpu.mark()?)?;
                print!(
                    " {rows}: {:.1}",
                    seconds * 1e6 / (COPIES * RUNS * RUNS) as f64
                );
            }
            println!(" us");
        }
        let weight = random(n * k)?;
        let weight = matrix(&weight, n, k);
        print!("f16 {k} x {n}, cuBLAS:");
        for rows in [1, 16, 64, 128, 256, 1024, 4096] {
            let x = random(rows * k)?;
            let out = Buffer::zeros(&gpu, rows * n * 2)?;
            let (x, out) = (matrix(&x, rows, k), matrix(&out, rows, n));
            let work = || gpu.project(out, x, weight);
            print!(
                " {rows}: {:.1} / {:.1}",
                time(true, &work)?,
                time(false, &work)?
            );
        }
        println!(" us");
    }
    Ok(())
}

#[cfg(not(feature = "cuda"))]
fn main() {
    println!("built without --features cuda");
}
