//! A `--device` argument as a device that is there.

use gptq_kernels::measure_sgemm;
use gptq_model::{Device, DeviceContext};
#[cfg(feature = "cuda")]
use gptq_pipeline::GpuSpeed;
use gptq_pipeline::Machine;
use gptq_report::Rates;

use crate::args::{DeviceArg, DeviceArgs, WholeDeviceArgs};
use crate::failure::Failure;

/// Size of the products that the processor's rate is measured with.
const SGEMM_SIZE: usize = 2048;
/// Likewise for a forecast, which every run makes.
const FORECAST_SIZE: usize = 512;

/// Opens the device of a command line and reports which one it is.
pub fn resolve(args: &DeviceArgs) -> Result<DeviceContext, Failure> {
    Ok(DeviceContext::open(pick(args.device, args.gpu_memory)?)?)
}

/// Opens the device for a command that keeps all weights resident, without a limit on memory.
pub fn resolve_whole(args: &WholeDeviceArgs) -> Result<DeviceContext, Failure> {
    Ok(DeviceContext::open(pick(args.device, usize::MAX)?)?)
}

/// The device, with `memory` bytes where it is a GPU.
pub fn pick(device: DeviceArg, memory: usize) -> Result<Device, Failure> {
    let picked = match device {
        DeviceArg::Cpu => Device::Cpu,
        DeviceArg::Auto => first_gpu(memory).unwrap_or(Device::Cpu),
        DeviceArg::Cuda(ordinal) => gpu(ordinal, memory)?,
    };
    eprintln!("device: {}", describe(picked));
    Ok(picked)
}

/// Refuses a GPU where this program was built without them.
pub fn check_built(device: DeviceArg) -> Result<(), Failure> {
    match device {
        DeviceArg::Cuda(ordinal) if !cfg!(feature = "cuda") => gpu(ordinal, 0).map(drop),
        _ => Ok(()),
    }
}

/// Whether `auto` picks a GPU.
pub fn has_gpu() -> bool {
    first_gpu(0).is_some()
}

/// `cpu, 2 threads`, or the GPU with its name and the memory it may take.
pub fn describe(device: Device) -> String {
    match device {
        Device::Cpu => format!("cpu, {} threads", rayon::current_num_threads()),
        #[cfg(feature = "cuda")]
        Device::Cuda {
            ordinal,
            memory: usize::MAX,
        } => format!("cuda:{ordinal}, {}", name(ordinal)),
        #[cfg(feature = "cuda")]
        Device::Cuda { ordinal, memory } => {
            format!(
                "cuda:{ordinal}, {}, {:.1} GB of its memory",
                name(ordinal),
                memory as f64 / 1e9
            )
        }
    }
}

/// The name of a GPU.
#[cfg(feature = "cuda")]
fn name(ordinal: usize) -> String {
    (gptq_kernels::cuda::devices().into_iter())
        .find(|found| found.ordinal == ordinal)
        .map_or(String::new(), |found| found.name)
}

/// Measured rates of the device's libraries on large matrix products.
pub fn rates(device: &DeviceContext) -> Result<Rates, Failure> {
    #[cfg(feature = "cuda")]
    if let DeviceContext::Cuda(cuda) = device {
        let [products, f32, f64] = cuda.gpu().measure_rates()?;
        return Ok(Rates { products, f32, f64 });
    }
    #[cfg(not(feature = "cuda"))]
    let DeviceContext::Cpu = device;
    let sgemm = measure_sgemm(SGEMM_SIZE);
    Ok(Rates {
        products: sgemm,
        f32: sgemm,
        f64: sgemm / 2.0,
    })
}

/// The device and its speed, measured in milliseconds: what forecasts are made for.
pub fn machine(device: &DeviceContext) -> Result<Machine, Failure> {
    #[cfg(feature = "cuda")]
    if let DeviceContext::Cuda(cuda) = device {
        let speed = cuda.gpu().measure_speed()?;
        return Ok(Machine::Gpu {
            speed: GpuSpeed {
                products: speed.products,
                f32: speed.f32,
                f64: speed.f64,
                bytes: speed.bytes,
            },
            memory: cuda.memory(),
        });
    }
    #[cfg(not(feature = "cuda"))]
    let DeviceContext::Cpu = device;
    Ok(Machine::Processor {
        products: measure_sgemm(FORECAST_SIZE),
    })
}

/// Bytes that a run may take of a GPU.
pub fn gpu_memory(device: Device) -> Option<usize> {
    match device {
        Device::Cpu => None,
        #[cfg(feature = "cuda")]
        Device::Cuda { memory, .. } => Some(memory),
    }
}

/// The instructions that products on the processor are chosen by at run time.
pub fn processor() -> String {
    #[cfg(target_arch = "x86_64")]
    {
        let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
        let best = match (is_x86_feature_detected!("avx512f"), avx2) {
            (true, _) => " with AVX-512",
            (false, true) => " with AVX2",
            (false, false) => "",
        };
        format!("x86_64{best}")
    }
    #[cfg(not(target_arch = "x86_64"))]
    std::env::consts::ARCH.to_string()
}

#[cfg(feature = "cuda")]
fn first_gpu(memory: usize) -> Option<Device> {
    let complete = gptq_kernels::cuda::libraries()
        .iter()
        .all(|(_, there)| *there);
    let found = complete.then(gptq_kernels::cuda::devices)?;
    let ordinal = found.first()?.ordinal;
    Some(Device::Cuda { ordinal, memory })
}

#[cfg(feature = "cuda")]
fn gpu(ordinal: usize, memory: usize) -> Result<Device, Failure> {
    // A device or library that is missing shows before any other work.
    gptq_kernels::cuda::check(ordinal)?;
    Ok(Device::Cuda { ordinal, memory })
}

/// Opens all GPUs among `devices` at once; they stay open with what this returns. A context takes
/// about a second, and several one after the other as many.
#[cfg(feature = "cuda")]
pub fn open_all(devices: &[Device]) -> Result<Vec<gptq_kernels::cuda::KeptOpen>, Failure> {
    let ordinals: std::collections::BTreeSet<usize> = (devices.iter())
        .filter_map(|device| match device {
            Device::Cuda { ordinal, .. } => Some(*ordinal),
            Device::Cpu => None,
        })
        .collect();
    std::thread::scope(|scope| {
        let opening: Vec<_> = (ordinals.into_iter())
            .map(|ordinal| scope.spawn(move || gptq_kernels::cuda::KeptOpen::new(ordinal)))
            .collect();
        (opening.into_iter())
            .map(|opened| {
                let panicked = |_| Failure::new("opening a GPU ended in a panic");
                Ok(opened.join().map_err(panicked)??)
            })
            .collect()
    })
}

/// There are none.
#[cfg(not(feature = "cuda"))]
pub fn open_all(_: &[Device]) -> Result<(), Failure> {
    Ok(())
}

#[cfg(not(feature = "cuda"))]
fn first_gpu(_: usize) -> Option<Device> {
    None
}

#[cfg(not(feature = "cuda"))]
fn gpu(ordinal: usize, _: usize) -> Result<Device, Failure> {
    Err(Failure::with_hint(
        format!("cuda:{ordinal} was asked for, but this program was built without GPUs"),
        "build it with --features cuda, or pass --device cpu",
    ))
}
