#!/usr/bin/env bash
# Reads every kernel text under Metal's prelude with clang, for each dtype: no Mac is needed. Metal's compiler is not to be had elsewhere,
# so OpenCL C++, which has the same address spaces, stands in for its language, and metal/metal_stdlib for its library. The emulator
# compiles the texts under another prelude; this finds what only Metal's would refuse, such as its keywords as names.
#   eval "$(scripts/darwin-env.sh)" && scripts/check-metal.sh
set -euo pipefail
cd "$(dirname "$0")/.."
clang=("${PMETAL_DARWIN_DIR:-$HOME/.cache/pmetal-darwin}/venv/bin/python" -m ziglang clang)
kernels=crates/pmetal-metal/kernels
# a kernel of OpenCL takes its parameters by value only
prelude=$(sed 's/constant type& params/type params/' "$kernels/prelude/metal.h")
failed=0
for file in "$kernels"/*.metal; do
  for dtype in float half bfloat; do
    printf '#line 1 "metal.h"\n%s\ntypedef %s T;\n#line 1 "%s"\n%s\n' "$prelude" "$dtype" "$file" "$(cat "$file")" |
      "${clang[@]}" -cc1 -triple spir64-unknown-unknown -x clcpp -cl-std=clc++2021 -cl-ext=+cl_khr_fp16 -fsyntax-only \
        -isystem scripts/metal -Wall -Wno-unused -Wno-unknown-attributes -Werror - ||
      { echo "$file does not compile for $dtype" >&2 && failed=1; }
  done
done
exit "$failed"
