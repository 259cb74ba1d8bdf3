#!/usr/bin/env bash
# Prints what lets `cargo build --features cuda` run on a Linux machine without the CUDA toolkit: compiler, headers and libraries out of
# NVIDIA's Python wheels, and a stand-in for the driver's library. What is built runs where a driver and CUDA's libraries are.
#   eval "$(scripts/cuda-env.sh)" && cargo build --release --features cuda
# The GPUs it is built for: CUDA_COMPUTE_CAP, 90 (H100) where it is not set.
set -euo pipefail
dir=${PMETAL_CUDA_DIR:-$HOME/.cache/pmetal-cuda}
home=$dir/toolkit
if [[ ! -e $home/.complete ]]; then
  {
    mkdir -p "$dir"
    python3 -m venv "$dir/venv"
    "$dir/venv/bin/pip" install -q nvidia-{cuda-{nvcc,crt,runtime,nvrtc,cccl},nvvm}'==13.0.*' 'nvidia-cublas==13.*' nvidia-curand
    wheels=$(echo "$dir"/venv/lib/python3*/site-packages/nvidia/cu13)
    rm -rf "$home"
    mkdir -p "$home/lib64"
    ln -s "$wheels"/{bin,include,nvvm} "$home"
    ln -s "$wheels"/lib/* "$home/lib64"
    for name in cublas cublasLt cudart curand nvrtc; do
      # the linker looks for names without a version
      versions=("$home/lib64/lib$name".so.*)
      ln -sf "${versions[0]##*/}" "$home/lib64/lib$name.so"
    done
    # the driver's functions by name, for the linker alone; the header gives some of them other names
    grep -oE '\bcu[A-Z][A-Za-z0-9_]*' "$home/include/cuda.h" | sed -E 's/(_v[0-9])?(_ptsz|_ptds)?$//' | sort -u |
      sed 's/.*/&\n&_v2\n&_v3\n&_v4/; s/[^\n]*/void &(void) {}/g' > "$dir/driver.c"
    cc -shared -fPIC -w -Wl,-soname,libcuda.so.1 -o "$home/lib64/libcuda.so" "$dir/driver.c"
    touch "$home/.complete"
  } >&2
fi
cat <<ENV
export CUDA_HOME='$home' CUDA_PATH='$home' CUDA_ROOT='$home' CUDA_COMPUTE_CAP=\${CUDA_COMPUTE_CAP:-90}
export PATH='$home/bin':"\$PATH" LIBRARY_PATH='$home/lib64':"\${LIBRARY_PATH:-}"
ENV
