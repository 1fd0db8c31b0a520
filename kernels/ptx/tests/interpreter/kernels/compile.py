"""Compiles the .cu files beside it with NVRTC and writes their PTX without comments and empty lines.

usage: compile.py DIRECTORY_OF_LIBNVRTC
"""

import ctypes
import pathlib
import sys

lib = pathlib.Path(sys.argv[1])
ctypes.CDLL(str(lib / "libnvrtc-builtins.so.12.4"), mode=ctypes.RTLD_GLOBAL)
nvrtc = ctypes.CDLL(str(lib / "libnvrtc.so.12"))


def compile(source, options):
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None)
    options = [b"--gpu-architecture=compute_80", b"-default-device", *options]
    failed = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    if failed:
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        raise SystemExit(log.value.decode())
    nvrtc.nvrtcGetPTXSize(program, ctypes.byref(size))
    ptx = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetPTX(program, ptx)
    lines = (" ".join(line.split("//")[0].split()) for line in ptx.value.decode().splitlines())
    return "\n".join(line for line in lines if line) + "\n"


here = pathlib.Path(__file__).parent
for name, options, out in [
    ("gemm", [], "gemm"),
    ("attention", [], "attention"),
    ("plain", [], "plain"),
    ("plain", [b"--use_fast_math"], "plain_fast"),
]:
    text = compile((here / f"{name}.cu").read_text(encoding="utf-8"), options)
    (here / f"{out}.ptx").write_text(text)
    print(out, len(text))
