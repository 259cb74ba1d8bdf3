"""GGUF files of a checkpoint of each family, made by llama.cpp's own converter from the folders of pmetal-models."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

CONVERT = Path(__file__).parent / "convert.py"
NAMES = [
    "llama-yarn-factor-hub", "mistral-window-hub", "mixtral-hub", "llama4-text-hub", "llama4-text", "qwen3-moe", "deepseek-v3",
    "deepseek-v32", "gemma2", "gemma3-text-hub", "phi3-longrope-partial-hub", "phi3-window-hub", "gpt-oss", "gpt-oss-mxfp4-hub",
    "granite-tied-hub", "granitemoe-tied-hub", "cohere", "cohere2-hub",
]
# As the text part of Mistral Small 3.1 is converted.
ARCHITECTURES = {"mistral-window-hub": ["MISTRAL3"]}
# Keys of the hub's files that the converter reads and transformers' own files lack.
HUB_KEYS = {
    "cohere2": {"rotary_pct": 1.0},
    "deepseek_v3": {"scoring_func": "sigmoid"},
    "deepseek_v32": {"scoring_func": "sigmoid"},
}


def write(folder, checkpoints, llama_cpp):
    for name in NAMES:
        with tempfile.TemporaryDirectory() as scratch:
            checkpoint = Path(scratch) / name
            shutil.copytree(checkpoints / name, checkpoint, ignore=shutil.ignore_patterns("adapter", "expected*"))
            prepare(checkpoint)
            convert(checkpoint, folder / f"{name}.gguf", llama_cpp)


def prepare(checkpoint):
    """The converter cuts Gemma 3's embedding to the rows that the tokenizer has."""
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**HUB_KEYS.get(config["model_type"], {}), **config}))
    vocabulary = {f"t{token}": token for token in range(config["vocab_size"])}
    (checkpoint / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}, "added_tokens": []}))


def convert(checkpoint, path, llama_cpp):
    sources = os.pathsep.join([str(llama_cpp / "gguf-py"), str(llama_cpp)])
    command = [sys.executable, "-P", CONVERT, checkpoint, path, *ARCHITECTURES.get(path.stem, [])]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": sources})
    print(f"{path.name}: {path.stat().st_size} bytes")
