"""Writes the GGUF files that pmetal-gguf's tests read, and what they must come out as.

    pip install -r scripts/requirements.txt gguf==0.19.0 sentencepiece==0.2.3 xllamacpp==2026.10.11549
    python scripts/make-gguf-fixtures.py [--llama-cpp SOURCES] [SMOLLM2.gguf]

SOURCES: llama.cpp's, whose converter makes the files of the families; the source package of llama-cpp-python 0.3.36 has them in
vendor/llama.cpp.

crates/pmetal-gguf/tests/fixtures:
    blocks.gguf, blocks.safetensors     a tensor in every block format; what llama.cpp's Python package decodes them to
    NAME.gguf                           the checkpoint NAME of pmetal-models' fixtures, checked against llama.cpp, or, for a
                                        further family, made by its converter
    tokenizer-NAME.gguf                 a small vocabulary and no tensors
    tokenizer-ids.json                  texts, and the ids llama.cpp gives them with each of these vocabularies
    pre-tokenizer-ids.json              the same for the first of them under every other pre-tokenizer's name
    smollm2-ids.json                    the same for SmolLM2, when its file is given
"""

import argparse
from pathlib import Path

from gguf_fixtures import blocks, families, tokenizers, twins

CRATES = Path(__file__).parent.parent / "crates"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--llama-cpp", type=Path)
    parser.add_argument("smollm2", type=Path, nargs="?")
    arguments = parser.parse_args()
    checkpoints = CRATES / "pmetal-models/tests/fixtures"
    fixtures = CRATES / "pmetal-gguf/tests/fixtures"
    fixtures.mkdir(parents=True, exist_ok=True)
    blocks.write(fixtures)
    twins.write(fixtures, checkpoints)
    tokenizers.write(fixtures)
    if arguments.llama_cpp:
        families.write(fixtures, checkpoints, arguments.llama_cpp)
    if arguments.smollm2:
        tokenizers.write_real(fixtures, arguments.smollm2)


if __name__ == "__main__":
    main()
