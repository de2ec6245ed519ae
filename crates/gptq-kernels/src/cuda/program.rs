//! Kernel sources, compiled by NVRTC for the device at hand and kept on disk.

use std::ffi::{CString, c_char};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::PathBuf;

use cudarc::nvrtc::sys;

use super::error::CudaError;

/// A file of `kernels/`, compiled for one 16-bit float type and, for packed products, one width of codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Program {
    /// Attention with soft-capped scores, a sliding window, or both; without either it is in `LlamaBlock`.
    Attention {
        bf16: bool,
        cap: bool,
        window: bool,
    },
    Backward {
        bf16: bool,
    },
    Decoder {
        bf16: bool,
    },
    Descent,
    Hessian,
    Latents {
        bf16: bool,
    },
    OtherBlocks {
        bf16: bool,
    },
    Packed {
        bf16: bool,
        bits: u8,
    },
    Sweep {
        bf16: bool,
    },
    LlamaBlock {
        bf16: bool,
    },
}

macro_rules! source {
    ($file:literal) => {
        include_str!(concat!("../../../../kernels/", $file))
    };
}

/// Headers in `kernels/`, by the name that `#include` uses.
const HEADERS: [(&str, &str); 13] = [
    ("half.cuh", source!("half.cuh")),
    ("grid.cuh", source!("grid.cuh")),
    ("packed.cuh", source!("packed.cuh")),
    ("few_rows.cuh", source!("few_rows.cuh")),
    ("more_rows.cuh", source!("more_rows.cuh")),
    ("wgmma.cuh", source!("wgmma.cuh")),
    ("attention.cuh", source!("attention.cuh")),
    (
        "attention_prefill_wgmma.cuh",
        source!("attention_prefill_wgmma.cuh"),
    ),
    (
        "attention_decode_gqa.cuh",
        source!("attention_decode_gqa.cuh"),
    ),
    ("attention_decode.cuh", source!("attention_decode.cuh")),
    ("attention_prefill.cuh", source!("attention_prefill.cuh")),
    ("rows.cuh", source!("rows.cuh")),
    ("attention_scores.cuh", source!("attention_scores.cuh")),
];

impl Program {
    /// Every program, for both float types and all widths.
    pub fn all() -> Vec<Program> {
        let mut all = vec![Program::Descent, Program::Hessian];
        for bf16 in [false, true] {
            for (cap, window) in [(true, false), (false, true), (true, true)] {
                all.push(Program::Attention { bf16, cap, window });
            }
            all.extend([Program::Decoder { bf16 }, Program::OtherBlocks { bf16 }]);
            all.extend([Program::Backward { bf16 }, Program::Latents { bf16 }]);
            all.extend([4, 8].map(|bits| Program::Packed { bf16, bits }));
            all.extend([Program::Sweep { bf16 }, Program::LlamaBlock { bf16 }]);
        }
        all
    }

    fn file(self) -> &'static str {
        match self {
            Program::Attention {
                cap: true, window, ..
            } => match window {
                true => "attention_softcap_window.cu",
                false => "attention_softcap.cu",
            },
            Program::Attention { cap: false, .. } => "attention_window.cu",
            Program::Backward { .. } => "backward.cu",
            Program::Decoder { .. } => "decoder.cu",
            Program::Descent => "descent.cu",
            Program::Hessian => "hessian.cu",
            Program::Latents { .. } => "latents.cu",
            Program::OtherBlocks { .. } => "other_blocks.cu",
            Program::Packed { .. } => "packed.cu",
            Program::Sweep { .. } => "sweep.cu",
            Program::LlamaBlock { .. } => "llama_block.cu",
        }
    }

    fn source(self) -> &'static str {
        match self {
            Program::Attention {
                cap: true, window, ..
            } => match window {
                true => source!("attention_softcap_window.cu"),
                false => source!("attention_softcap.cu"),
            },
            Program::Attention { cap: false, .. } => source!("attention_window.cu"),
            Program::Backward { .. } => source!("backward.cu"),
            Program::Decoder { .. } => source!("decoder.cu"),
            Program::Descent => source!("descent.cu"),
            Program::Hessian => source!("hessian.cu"),
            Program::Latents { .. } => source!("latents.cu"),
            Program::OtherBlocks { .. } => source!("other_blocks.cu"),
            Program::Packed { .. } => source!("packed.cu"),
            Program::Sweep { .. } => source!("sweep.cu"),
            Program::LlamaBlock { .. } => source!("llama_block.cu"),
        }
    }

    fn bf16(self) -> bool {
        match self {
            Program::Attention { bf16, .. }
            | Program::Backward { bf16 }
            | Program::Decoder { bf16 }
            | Program::Latents { bf16 }
            | Program::OtherBlocks { bf16 }
            | Program::Packed { bf16, .. }
            | Program::Sweep { bf16 }
            | Program::LlamaBlock { bf16 } => bf16,
            Program::Descent | Program::Hessian => false,
        }
    }

    /// Width of packed codes; 0 for programs without any.
    fn bits(self) -> u8 {
        match self {
            Program::Packed { bits, .. } => bits,
            _ => 0,
        }
    }
}

/// The machine code of a program, from the cache if it was compiled before with this source,
/// these options and this version of NVRTC.
pub(super) fn compiled(program: Program, architecture: &str) -> Result<Vec<u8>, CudaError> {
    let source = program.source();
    let options = [
        format!("--gpu-architecture={architecture}"),
        format!("-DBF16={}", u8::from(program.bf16())),
        format!("-DWIDTH={}", program.bits()),
        "--std=c++17".to_string(),
        "--split-compile=0".to_string(), // kernels side by side on all threads
    ];
    let (mut major, mut minor) = (0, 0);
    // SAFETY: two out parameters.
    unsafe { sys::nvrtcVersion(&mut major, &mut minor) };
    let mut hasher = DefaultHasher::new();
    (source, HEADERS, &options, major, minor).hash(&mut hasher);
    let cached = cache_folder().map(|folder| {
        let stem = program.file().trim_end_matches(".cu");
        folder.join(format!(
            "{stem}-{architecture}-{:016x}.cubin",
            hasher.finish()
        ))
    });
    if let Some(image) = cached.as_ref().and_then(|path| std::fs::read(path).ok())
        && image.starts_with(b"\x7fELF")
    {
        return Ok(image);
    }
    let image = compile(program.file(), source, &options, architecture)?;
    if let Some(path) = cached {
        store_in_cache(&path, &image);
    }
    Ok(image)
}

/// Stores a compiled program in the cache. Failure is ignored: it only costs the next start some seconds.
fn store_in_cache(path: &std::path::Path, image: &[u8]) {
    let Some(folder) = path.parent() else { return };
    let beside = path.with_extension(format!("{}.partial", std::process::id()));
    let written = std::fs::create_dir_all(folder).and_then(|()| std::fs::write(&beside, image));
    if written
        .and_then(|()| std::fs::rename(&beside, path))
        .is_err()
    {
        let _ = std::fs::remove_file(&beside);
    }
}

fn cache_folder() -> Option<PathBuf> {
    let base = match std::env::var_os("XDG_CACHE_HOME") {
        Some(folder) if !folder.is_empty() => PathBuf::from(folder),
        _ => PathBuf::from(std::env::var_os("HOME")?).join(".cache"),
    };
    Some(base.join("gptq").join("kernels"))
}

fn compile(
    file: &'static str,
    source: &str,
    options: &[String],
    architecture: &str,
) -> Result<Vec<u8>, CudaError> {
    let text = |text: &str| CString::new(text).expect("sources hold no zero byte");
    let (source, name) = (text(source), text(file));
    let options: Vec<CString> = options.iter().map(|option| text(option)).collect();
    let pointers: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
    let failed = |log: String| CudaError::Compile {
        file,
        architecture: architecture.to_string(),
        log,
    };
    let [names, headers] = [
        HEADERS.map(|(name, _)| text(name)),
        HEADERS.map(|(_, body)| text(body)),
    ];
    let [names_at, headers_at] =
        [&names, &headers].map(|all| all.each_ref().map(|one| one.as_ptr()));
    let mut program = std::ptr::null_mut();
    // SAFETY: all pointers live until the program is destroyed; sizes are NVRTC's own.
    unsafe {
        let created = sys::nvrtcCreateProgram(
            &mut program,
            source.as_ptr(),
            name.as_ptr(),
            HEADERS.len() as i32,
            headers_at.as_ptr(),
            names_at.as_ptr(),
        );
        if created != sys::nvrtcResult::NVRTC_SUCCESS {
            return Err(failed(format!("{created:?}")));
        }
        let status =
            sys::nvrtcCompileProgram(program, pointers.len() as i32, pointers.as_ptr().cast_mut());
        let image = if status == sys::nvrtcResult::NVRTC_SUCCESS {
            let mut size = 0;
            sys::nvrtcGetCUBINSize(program, &mut size);
            let mut image = vec![0u8; size];
            sys::nvrtcGetCUBIN(program, image.as_mut_ptr().cast());
            Ok(image)
        } else {
            let mut size = 0;
            sys::nvrtcGetProgramLogSize(program, &mut size);
            let mut log = vec![0u8; size];
            sys::nvrtcGetProgramLog(program, log.as_mut_ptr().cast());
            let log = String::from_utf8_lossy(&log);
            Err(failed(log.trim_end_matches('\0').replace('\n', "; ")))
        };
        sys::nvrtcDestroyProgram(&mut program);
        image
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file that is missing in the lists above would fail only where kernels are compiled for a GPU.
    #[test]
    fn every_file_of_kernels_is_compiled_or_included() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../kernels");
        let mut headers = 0;
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap().to_string();
            let text = std::fs::read_to_string(&path).unwrap();
            if name.ends_with(".cuh") {
                assert!(HEADERS.contains(&(name.as_str(), text.as_str())), "{name}");
                headers += 1;
            } else {
                let compiled =
                    |program: &Program| program.file() == name && program.source() == text;
                assert!(Program::all().iter().any(compiled), "{name}");
            }
        }
        assert_eq!(headers, HEADERS.len());
    }
}
