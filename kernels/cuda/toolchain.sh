#!/usr/bin/env bash
# Puts a CUDA 13.0 compiler and the libraries that `--features cuda` links with into a folder: from PyPI's packages alone (1.2 GB), without a
# GPU, a driver or root. What is there already stays; versions are pinned. Prints the environment to build in:
#
#     eval "$(bash kernels/cuda/toolchain.sh target/cuda)" && cargo build --release --features cuda
#
# Needs python3 with pip, and cc. CUDA_COMPUTE_CAP names the oldest cards that the binary is for: that of this machine's where it is not set, 80
# on a machine without one. PTX for 80 runs on every card since Ampere; candle's is for one generation alone from 90 on.
#
# The binary needs, where it runs, NVIDIA's driver (libcuda.so.1) and, on the loader's path, libcurand.so.10, libcublas.so.13 (with
# libcublasLt.so.13) and libcudart.so.13: those of a CUDA 13 toolkit, or LD_LIBRARY_PATH=FOLDER/nvidia/cu13/lib. Where one is missing, the
# loader says so and the binary does not start, not even for the CPU. FOLDER/nvidia/cu13/lib/stubs/libcuda.so can stand for the driver: linked
# to as libcuda.so.1 on the loader's path, it lets the binary start, and answers CUDA_ERROR_STUB_LIBRARY to whoever asks for a device.
set -euo pipefail

readonly PACKAGES=(
    nvidia-cuda-nvcc==13.0.88
    nvidia-nvvm==13.0.88
    nvidia-cuda-crt==13.0.88
    nvidia-cuda-runtime==13.0.96
    nvidia-cuda-cccl==13.0.85
    nvidia-cuda-nvrtc==13.0.88
    nvidia-curand==10.4.0.35
    nvidia-cublas==13.1.0.3
)

# `eval` of what failed fails too
trap '[ $? -eq 0 ] || echo false' EXIT
fail() { printf '%s: %s\n' "${0##*/}" "$*" >&2; exit 1; }

[ $# -eq 1 ] && [ -n "$1" ] || { echo "usage: ${0##*/} FOLDER" >&2; exit 2; }
mkdir -p -- "$1"
folder=$(cd -- "$1" && pwd)
case $folder in *[!A-Za-z0-9/._+@-]*) fail "expected a folder without spaces or special characters in its path, got \"$folder\"" ;; esac
root=$folder/nvidia/cu13
# a folder with other versions, or one that was not finished, is filled again
done_mark=$folder/.complete
if [ "$(cat "$done_mark" 2>/dev/null)" != "${PACKAGES[*]}" ]; then
    command -v python3 >/dev/null || fail "python3 was not found: install it (Debian: apt install python3-pip)"
    python3 -m pip --version >/dev/null 2>&1 || fail "python3 has no pip: install it (Debian: apt install python3-pip)"
    rm -f "$done_mark"
    python3 -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --only-binary :all: --root-user-action ignore \
        --target "$folder" "${PACKAGES[@]}" >&2 || fail "pip could not fetch CUDA's packages (they are for Linux on x86-64 and Arm)"
    ln -sfn lib "$root/lib64"
    for library in libcudart.so.13 libcublas.so.13 libcublasLt.so.13 libcurand.so.10 libnvrtc.so.13; do
        ln -sf "$library" "$root/lib/${library%.so.*}.so"
    done
    echo "${PACKAGES[*]}" >"$done_mark"
fi
# the driver's own library comes with a driver only: what is linked with has its names, and all of them answer CUDA_ERROR_STUB_LIBRARY
stub=$root/lib/stubs/libcuda.so
if [ ! -e "$stub" ]; then
    command -v cc >/dev/null || fail "cc was not found: install a C compiler (Debian: apt install gcc libc6-dev)"
    mkdir -p "$root/lib/stubs"
    grep -ohE '\bcu[A-Z][A-Za-z0-9_]+' "$root/include/cuda.h" | sort -u | sed 's/.*/int &(void) { return 34; }/' |
        cc -shared -fPIC -w -Wl,-soname,libcuda.so.1 -x c -o "$stub" - || fail "cc could not make $stub"
fi
cat <<EOF
export CUDA_HOME=$root CUDA_ROOT=$root CUDA_PATH=$root CUDA_TOOLKIT_ROOT_DIR=$root
export PATH=$root/bin:\$PATH
EOF
if ! command -v nvidia-smi >/dev/null; then
    echo "export CUDA_COMPUTE_CAP=\${CUDA_COMPUTE_CAP:-80}"
fi
