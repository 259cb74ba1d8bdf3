"""One checkpoint through llama.cpp's own converter, without a vocabulary: the tests read weights and numbers only.

Run by families.py with llama.cpp's sources on the path: python convert.py CHECKPOINT FILE.gguf [ARCHITECTURE]
"""

import json
import sys
from pathlib import Path

import gguf
from conversion import get_model_class


def main():
    checkpoint, path = map(Path, sys.argv[1:3])
    config = json.loads((checkpoint / "config.json").read_text())
    converter = get_model_class(config["architectures"][0])

    class WithoutVocabulary(converter):
        model_arch = gguf.MODEL_ARCH[sys.argv[3]] if len(sys.argv) > 3 else converter.model_arch

        def set_vocab(self):
            pass

    WithoutVocabulary(checkpoint, gguf.LlamaFileType.MOSTLY_BF16, path, eager=True).write()


if __name__ == "__main__":
    main()
