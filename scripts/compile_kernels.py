#!/usr/bin/env python3
"""Compile every kernel with NVRTC, without a GPU.

usage: compile_kernels.py WHEEL_FOLDER [ARCH...]        (default sm_80 sm_89 sm_90a)

WHEEL_FOLDER: where the PyPI wheel nvidia-cuda-nvrtc is unpacked or installed (holds nvidia/cu13/lib or nvidia/cuda_nvrtc/lib).
Each kernels/*.cu is compiled for half and bfloat16 (packed.cu for 4 and 8 bits), as the program does when it runs. Exit 1
with NVRTC's log if one fails.
"""
import ctypes
import glob
import itertools
import os
import sys

KERNELS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "kernels")


def load(folder):
    found = glob.glob(f"{folder}/**/libnvrtc*.so*", recursive=True)
    builtins = [path for path in found if "builtins" in path and "alt" not in path]
    compiler = [path for path in found if "builtins" not in path and "alt" not in path]
    if not compiler or not builtins:
        sys.exit(f"no libnvrtc below {folder}")
    ctypes.CDLL(builtins[0], ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(compiler[0])


def compile_one(nvrtc, source, name, options):
    program = ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), name.encode(), 0, None, None)
    array = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
    failed = nvrtc.nvrtcCompileProgram(program, len(options), array)
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    cubin = ctypes.c_size_t()
    nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(cubin))
    return failed, log.value.decode(), cubin.value


def main():
    nvrtc = load(sys.argv[1])
    failures = 0
    for path in sorted(glob.glob(f"{KERNELS}/*.cu")):
        source = open(path).read()
        for arch in sys.argv[2:] or ["sm_80", "sm_89", "sm_90a"]:
            name = os.path.basename(path)
            for bf16, bits in itertools.product((0, 1), (4, 8) if name == "packed.cu" else (0,)):
                options = [f"--gpu-architecture={arch}", f"-DBF16={bf16}", f"-DWIDTH={bits}"]
                options += [f"--include-path={KERNELS}", "--std=c++17", "--split-compile=0"]
                failed, log, size = compile_one(nvrtc, source, name, options)
                settings = f"BF16={bf16}" + (f" WIDTH={bits}" if bits else "")
                print(f"{name} {arch} {settings}: {'FAILED' if failed else f'{size} bytes'}")
                if log.strip():
                    print(log)
                failures += failed != 0
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
