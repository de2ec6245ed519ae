//! Where the time of a stage goes on the GPU: `gpu_speed K N [TOKENS [ROUNDS]]`, needs
//! `--features cuda`. With no tokens the sweep alone, on a factor made up: compute-sanitizer's
//! racecheck takes minutes for cuSOLVER's, and stops in its own code where told to pass it over.
#![allow(clippy::print_stdout)]

#[cfg(feature = "cuda")]
fn main() -> Result<(), Box<dyn std::error::Error>> {
    use std::time::Instant;

    use gptq_kernels::cuda::{
        Buffer, DeviceFactor, DeviceHessian, Gpu, RawGridRule, Step, SweepPlan,
    };
    use gptq_types::Dtype;

    let mut sizes = std::env::args().skip(1).map(|arg| arg.parse::<usize>());
    let k = sizes.next().unwrap_or(Ok(4096))?;
    let n = sizes.next().unwrap_or(Ok(4096))?;
    let tokens = sizes.next().unwrap_or(Ok(16384))?;
    let rounds = sizes.next().unwrap_or(Ok(3))?;
    let gpu = Gpu::open(0)?;
    let values = |count: usize, scale: f32| -> Vec<half::f16> {
        let mut state = 1u64;
        (0..count)
            .map(|_| {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                half::f16::from_f32(((state >> 40) as f32 / (1u64 << 23) as f32 - 1.0) * scale)
            })
            .collect()
    };
    let x = Buffer::from_host(&gpu, &values(tokens * k, 1.0))?;
    let weight = Buffer::from_host(&gpu, &values(n * k, 0.05))?;
    let there = weight.matrix([n, k], Dtype::F16);
    let order: Vec<u32> = (0..k as u32).rev().collect();
    let groups: Vec<u32> = order.iter().map(|&channel| channel / 128).collect();
    let steps = (0..k)
        .step_by(128)
        .map(|first| Step::Sweep {
            first: k.saturating_sub(first + 128),
            last: k - first,
            fit_inside: true,
        })
        .collect();
    let plan = SweepPlan::new(&gpu, &order, &groups, k.div_ceil(128), false, steps)?;
    let rule = RawGridRule {
        max_code: 15.0,
        min_zero: 1.0,
        min_share: 0.55,
        sym: 1,
        full_range: 0,
        shares: 1,
        variants: 1,
    };
    for round in 0..rounds {
        let timed = |name: &str, start: Instant| -> Result<(), gptq_kernels::cuda::CudaError> {
            gpu.synchronize()?;
            println!(
                "{round} {name}: {:.2} ms",
                start.elapsed().as_secs_f64() * 1e3
            );
            Ok(())
        };
        if tokens == 0 {
            let mut values = vec![0.0; k * k];
            for (row, values) in values.chunks_mut(k).enumerate() {
                values[..row].fill(0.01);
                values[row] = 1.0;
            }
            let factor = DeviceFactor::from_host(&gpu, &values, &vec![1.0; k])?;
            factor.sweep(
                there,
                &plan,
                RawGridRule { shares: 46, ..rule },
                None,
                None,
                None,
            )?;
            timed("sweep alone, searched", Instant::now())?;
            continue;
        }
        gpu.synchronize()?;
        let start = Instant::now();
        let mut hessian = DeviceHessian::new(&gpu, k)?;
        hessian.add(x.matrix([tokens, k], Dtype::F16))?;
        timed("hessian", start)?;
        let start = Instant::now();
        let diagonal = hessian.finish(2.0 / tokens as f32)?;
        timed("finish", start)?;
        let mean = diagonal.iter().sum::<f32>() / k as f32;
        let start = Instant::now();
        let added = vec![f64::from(mean) * 0.1; k];
        let factor = hessian.factor(&order, &added, &vec![1.0; k])?;
        timed("factor", start)?;
        for shares in [1, 46] {
            let start = Instant::now();
            let swept = factor.sweep(
                there,
                &plan,
                RawGridRule { shares, ..rule },
                None,
                None,
                None,
            )?;
            timed(
                if shares > 1 {
                    "sweep, searched"
                } else {
                    "sweep"
                },
                start,
            )?;
            let start = Instant::now();
            let download = swept.start_download()?;
            download.order_after(&gpu)?;
            download.receive()?;
            timed("codes to host", start)?;
        }
        let start = Instant::now();
        hessian.rounding_cost(there, 128, rule)?;
        timed("rounding cost", start)?;
    }
    Ok(())
}

#[cfg(not(feature = "cuda"))]
fn main() {
    println!("built without --features cuda");
}
