"""Writes the GGUF files that pmetal-gguf's tests read, and what they must come out as.

    pip install -r scripts/requirements.txt gguf==0.19.0 sentencepiece==0.2.3 xllamacpp==2026.10.11549
    python scripts/make-gguf-fixtures.py [SMOLLM2.gguf]

crates/pmetal-gguf/tests/fixtures:
    blocks.gguf, blocks.safetensors     a tensor in every block format; what llama.cpp's Python package decodes them to
    NAME.gguf                           the checkpoint NAME of pmetal-models' fixtures, checked against llama.cpp
    tokenizer-NAME.gguf                 a small vocabulary and no tensors
    tokenizer-ids.json                  texts, and the ids llama.cpp gives them with each of these vocabularies
    pre-tokenizer-ids.json              the same for the first of them under every other pre-tokenizer's name
    smollm2-ids.json                    the same for SmolLM2, when its file is given
"""

import sys
from pathlib import Path

from gguf_fixtures import blocks, tokenizers, twins

CRATES = Path(__file__).parent.parent / "crates"


def main():
    fixtures = CRATES / "pmetal-gguf/tests/fixtures"
    fixtures.mkdir(parents=True, exist_ok=True)
    blocks.write(fixtures)
    twins.write(fixtures, CRATES / "pmetal-models/tests/fixtures")
    tokenizers.write(fixtures)
    if len(sys.argv) > 1:
        tokenizers.write_real(fixtures, Path(sys.argv[1]))


if __name__ == "__main__":
    main()
