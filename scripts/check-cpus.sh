#!/usr/bin/env bash
# Runs the kernels' tests at every level of instructions that can be had here (see crates/pmetal-cpu/src/level.rs): the x86-64 levels that
# this machine has, and NEON without and with dot products of bf16 by cross-building for aarch64 and running under qemu's emulation of a
# user's program. Installs what is missing: Debian's qemu-user and gcc-aarch64-linux-gnu, and Rust's target.
#   scripts/check-cpus.sh
set -euo pipefail
cd "$(dirname "$0")/.."
target=aarch64-unknown-linux-gnu
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64 -cpu max -L /usr/aarch64-linux-gnu"

if ! { command -v qemu-aarch64 && command -v aarch64-linux-gnu-gcc; } > /dev/null; then
  as_root=()
  ((EUID == 0)) || as_root=(sudo)
  "${as_root[@]}" apt-get update -q
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends \
    qemu-user gcc-aarch64-linux-gnu libc6-dev-arm64-cross
fi
if command -v rustup > /dev/null; then rustup target add "$target"; fi

# has LEVEL [cargo's arguments]: whether kernels run at LEVEL when it is asked for
has() {
  local level=$1 taken
  shift
  taken=$(PMETAL_CPU_LEVEL=$level cargo run -q -p pmetal-cpu --example level "$@")
  [[ $(tr -d ' -' <<< "${taken,,}") == "${level//-/}" ]]
}

for level in portable avx2 avx512 avx512-bf16 amx; do
  if has "$level"; then
    printf '\n--- %s\n' "$level"
    PMETAL_CPU_LEVEL=$level cargo test -q -p pmetal-cpu
  else
    printf '\n--- %s: not on this machine\n' "$level"
  fi
done

for level in neon neon-bf16; do
  printf '\n--- %s, emulated\n' "$level"
  has "$level" --target "$target" || { echo "the emulated CPU does not run at the level $level" >&2 && exit 1; }
  PMETAL_CPU_LEVEL=$level cargo test -q -p pmetal-cpu --target "$target"
done
