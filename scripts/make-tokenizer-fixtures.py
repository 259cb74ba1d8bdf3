"""Writes small tokenizers in Hugging Face's layout and what transformers makes of texts with them, for pmetal-data's tests.

    pip install -r scripts/requirements.txt
    python scripts/make-tokenizer-fixtures.py

crates/pmetal-data/tests/fixtures/tokenizers:
    BASE.json       a tokenizer.json
    changes.json    by name, the files beside it: how public models' folders say what tokenizer.json does not
    ids.json        by BASE+CHANGE: texts, their ids, and their ids without special tokens
"""

import json
import tempfile
from pathlib import Path

from gguf_fixtures.corpus import CORPUS
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

FOLDER = Path(__file__).parent.parent / "crates/pmetal-data/tests/fixtures/tokenizers"
TEXTS = [
    "", " ", "Hello World", "  two  spaces ", "a<s>b</s> c", "<s> a", "x<|new|>  y<|tail|>  z", "lower <|NORMAL|> case", "<pad><|extra|> <pad>",
    "Größe, 你好 🙂", "line\n\nline", "<|tool|>x</s>", "<unk>", "a <mask> b"]
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
ENDS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
LLAMA = {"tokenizer_class": "LlamaTokenizer", **ENDS}
NEW = {"lstrip": False, "rstrip": False, "single_word": False, "special": True, "normalized": False}


def config(**values):
    return {"tokenizer_config.json": values}


CHANGES = {
    "nothing": config(**FAST, **ENDS),
    "adds-bos": config(**FAST, **ENDS, add_bos_token=True),
    "adds-eos-only": config(**FAST, **ENDS, add_eos_token=True, add_bos_token=False),
    "decoder": config(**FAST, **ENDS, added_tokens_decoder={
        "2001": {"content": "<|tail|>", **NEW, "rstrip": True}, "2000": {"content": "<|new|>", **NEW, "lstrip": True, "special": False},
        "2002": {"content": "<|normal|>", **NEW, "normalized": True, "special": False}, "1": {"content": "<s>", **NEW}}),
    "legacy-added": {**config(**FAST, **ENDS), "added_tokens.json": {"<|tail|>": 2001, "<|new|>": 2000}},
    "pad-and-extra": config(**FAST, **ENDS, pad_token="<pad>", extra_special_tokens=["<|extra|>", "<|tool|>"]),
    "additional": config(**FAST, **ENDS, pad_token={"__type": "AddedToken", "content": "<pad>", **NEW}, additional_special_tokens=["<|extra|>", {"__type": "AddedToken", "content": "<|tool|>", **NEW}]),
    "named-extra": config(**FAST, **ENDS, extra_special_tokens={"tool_token": "<|tool|>"}),
    "llama": {**config(**LLAMA, legacy=False), "config.json": {"model_type": "llama"}},
    "llama-legacy": {**config(**LLAMA, legacy=True, add_bos_token=True, add_eos_token=False), "config.json": {"model_type": "llama"}},
    "llama-silent": config(**LLAMA),
    "llama-for-mistral": {**config(**LLAMA, legacy=False), "config.json": {"model_type": "mistral"}},
    "map": {**config(**FAST, pad_token="</s>"), "special_tokens_map.json": {**ENDS, "pad_token": {"content": "<pad>", **NEW}}},
    "llama-no-prefix": {**config(**LLAMA, add_prefix_space=False), "config.json": {"model_type": "llama"}},
    "templates": config(**FAST, **ENDS, model_max_length=1e30, chat_template=[
        {"name": "rag", "template": "documents"}, {"name": "tool_use", "template": "with tools"}, {"name": "default", "template": "without"}]),
}
LLAMAS = [name for name in CHANGES if name.startswith("llama")]
PLAIN = [name for name in CHANGES if name not in LLAMAS]
CASES = {"bytes": PLAIN + ["llama"], "bytes-with-bos": PLAIN, "pieces": PLAIN + LLAMAS}


def trained(pre_tokenizer, **options):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=600, min_frequency=2, max_token_length=8, show_progress=False, special_tokens=["<unk>", "<s>", "</s>"], **options))
    return json.loads(tokenizer.to_str())["model"]


def byte_level():
    pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model = trained(pre_tokenizer, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = Tokenizer(models.BPE(model["vocab"], [tuple(merge) for merge in model["merges"]]))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def byte_level_with_bos():
    tokenizer = byte_level()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    return tokenizer


def pieces():
    """As Llama 2's: spaces are visible, and one is put before a text and behind special tokens."""
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    model = trained(pre_tokenizers.Metaspace(), limit_alphabet=120)
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for token in fallback + sorted(model["vocab"], key=model["vocab"].get):
        vocab.setdefault(token, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab, [tuple(merge) for merge in model["merges"]], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    return tokenizer


def main():
    FOLDER.mkdir(parents=True, exist_ok=True)
    made = {"bytes": byte_level(), "bytes-with-bos": byte_level_with_bos(), "pieces": pieces()}
    ids = {}
    for base, tokenizer in made.items():
        (FOLDER / f"{base}.json").write_text(tokenizer.to_str() + "\n")
        for change in CASES[base]:
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / "tokenizer.json").write_text(tokenizer.to_str())
                for name, content in CHANGES[change].items():
                    (Path(folder) / name).write_text(json.dumps(content))
                loaded = AutoTokenizer.from_pretrained(folder)
            ids[f"{base}+{change}"] = [
                [text, loaded(text)["input_ids"], loaded(text, add_special_tokens=False)["input_ids"]] for text in TEXTS]
    (FOLDER / "changes.json").write_text(json.dumps(CHANGES, indent=1, ensure_ascii=False) + "\n")
    lines = [json.dumps(name) + ": [\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]" for name, rows in ids.items()]
    (FOLDER / "ids.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
