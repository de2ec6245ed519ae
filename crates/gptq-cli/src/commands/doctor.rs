//! `gptq doctor`.

use crate::Verdict;
use crate::failure::Failure;
use crate::output::print;

pub fn run() -> Result<Verdict, Failure> {
    let mut out = format!("processor: {} threads\n", rayon::current_num_threads());
    let complete = gpus(&mut out);
    print(&out)?;
    Ok(if complete { Verdict::Yes } else { Verdict::No })
}

/// The purpose of each library, and what fails without it.
#[cfg(feature = "cuda")]
const USES: [(&str, &str); 4] = [
    ("libcuda", "the driver; without it no GPU is used at all"),
    (
        "libnvrtc",
        "compiles the kernels; without it no GPU is used",
    ),
    ("libcublas", "matrix products; without it no GPU is used"),
    ("libcusolver", "factors Hessians; without it no GPU is used"),
];

#[cfg(feature = "cuda")]
fn gpus(out: &mut String) -> bool {
    use gptq_kernels::cuda::{Gpu, devices, libraries};

    let found = libraries();
    for (library, there) in found {
        let state = if there { "found" } else { "missing" };
        let purpose = USES.iter().find(|(name, _)| *name == library);
        *out += &format!(
            "{library}: {state} ({})\n",
            purpose.map_or("", |(_, purpose)| purpose)
        );
    }
    let complete = found.iter().all(|(_, there)| *there);
    let all = devices();
    if all.is_empty() {
        *out += "no NVIDIA GPU: everything runs on the processor\n";
        return false;
    }
    let mut usable = complete;
    for device in all {
        let (major, minor) = device.capability;
        *out += &format!(
            "cuda:{}: {}, compute capability {major}.{minor}, {:.1} GB",
            device.ordinal,
            device.name,
            device.memory as f64 / 1e9
        );
        if complete {
            let opened = Gpu::open(device.ordinal).and_then(|gpu| gpu.compile_all());
            usable &= opened.is_ok();
            *out += &match opened {
                Ok(seconds) => format!(", kernels ready in {seconds:.1} s"),
                Err(error) => format!(", unusable: {error}"),
            };
        }
        out.push('\n');
    }
    usable
}

#[cfg(not(feature = "cuda"))]
fn gpus(out: &mut String) -> bool {
    *out +=
        "this program was built without GPUs (--features cuda): everything runs on the processor\n";
    true
}
