#!/usr/bin/env python3
"""Compiles the kernels of this folder with NVRTC from PyPI: no GPU, no driver, no CUDA toolkit.

    python kernels/cuda/build.py            # writes ptx/*.ptx, which the program carries
    python kernels/cuda/build.py --check    # says whether they are those of the sources, and that cubins for sm_80, sm_89, sm_90a can be made

The compiler is pinned, so that the same sources give the same text. PTX of CUDA 12.4 is read by drivers from 550 on (2024).
"""

import ctypes
import glob
import os
import subprocess
import sys
import tempfile

PACKAGE = "nvidia-cuda-nvrtc-cu12==12.4.127"
HERE = os.path.dirname(os.path.abspath(__file__))
FILES = ["attention", "norm", "pointwise", "product"]
PTX = "compute_80"
CUBINS = ["sm_80", "sm_89", "sm_90a"]


def compiler(folder):
    """The library, fetched into `folder` unless the variable NVRTC says where one is."""
    place = os.environ.get("NVRTC", folder)
    found = glob.glob(os.path.join(place, "nvidia", "cuda_nvrtc", "lib", "libnvrtc.so.12"))
    if not found:
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", place, PACKAGE], check=True)
        found = glob.glob(os.path.join(place, "nvidia", "cuda_nvrtc", "lib", "libnvrtc.so.12"))
    for builtins in glob.glob(os.path.join(os.path.dirname(found[0]), "libnvrtc-builtins.so*")):
        ctypes.CDLL(builtins, mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(found[0])


def compile(nvrtc, name, target):
    """PTX or a cubin of one source, as bytes; ends the program with the compiler's own words."""
    with open(os.path.join(HERE, name + ".cu"), "rb") as file:
        source = file.read()
    with open(os.path.join(HERE, "common.cuh"), "rb") as file:
        header = file.read()
    program = ctypes.c_void_p()
    headers, names = (ctypes.c_char_p * 1)(header), (ctypes.c_char_p * 1)(b"common.cuh")
    status = nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, (name + ".cu").encode(), 1, headers, names)
    assert status == 0, status
    options = [f"--gpu-architecture={target}", "--std=c++17", "--fmad=true"]
    array = (ctypes.c_char_p * len(options))(*[o.encode() for o in options])
    status = nvrtc.nvrtcCompileProgram(program, len(options), array)
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    if log.value.strip():
        print(log.value.decode(), file=sys.stderr)
    if status != 0:
        sys.exit(f"{name}.cu does not compile for {target}")
    kind = "PTX" if target.startswith("compute") else "CUBIN"
    getattr(nvrtc, f"nvrtcGet{kind}Size")(program, ctypes.byref(size))
    result = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{kind}")(program, result)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return result.raw.rstrip(b"\0") if kind == "PTX" else result.raw


def main():
    check = "--check" in sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        nvrtc = compiler(folder)
        for name in FILES:
            path = os.path.join(HERE, "ptx", name + ".ptx")
            text = compile(nvrtc, name, PTX)
            if check:
                with open(path, "rb") as file:
                    if file.read() != text:
                        sys.exit(f"{path} is not what {name}.cu gives: run python kernels/cuda/build.py")
                sizes = [f"{target} {len(compile(nvrtc, name, target))} bytes" for target in CUBINS]
                print(f"{name}.cu: its PTX is up to date; {', '.join(sizes)}")
            else:
                os.makedirs(os.path.dirname(path), exist_ok=True)
                with open(path, "wb") as file:
                    file.write(text)
                print(f"{path}: {len(text)} bytes")


if __name__ == "__main__":
    main()
