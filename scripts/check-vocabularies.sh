#!/usr/bin/env bash
# Compares the tokenizers read from GGUF files with llama.cpp's own, on the vocabularies of public models that its Python
# package carries: scripts/check-vocabularies.sh [FOLDER of more GGUF files]
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python3 -m venv "$work/venv"
pip="$work/venv/bin/pip"
"$pip" install -q numpy==2.4.6 xllamacpp==2026.10.11549
# The source package alone has the vocabularies; it is not built.
"$pip" download -q --no-deps --no-binary llama-cpp-python -d "$work" llama-cpp-python==0.3.36
mkdir "$work/vocabularies"
tar -xzf "$work"/llama_cpp_python-*.tar.gz -C "$work/vocabularies" --wildcards --strip-components=4 '*/models/ggml-vocab-*.gguf'
if [ $# -gt 0 ]; then
    cp "$1"/*.gguf "$work/vocabularies/"
fi
"$work/venv/bin/python" scripts/vocabulary-ids.py "$work/vocabularies"
PMETAL_LLAMA_VOCABS="$work/vocabularies" cargo test --release -p pmetal-gguf --test tokenizers -- --ignored public_vocabularies --nocapture
