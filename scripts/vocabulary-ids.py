"""Writes beside each GGUF file of a folder what llama.cpp makes of many texts with it, and the ids that end
generation: NAME.gguf.json.

    python scripts/vocabulary-ids.py FOLDER

The texts are those of the fixtures, every character of the Basic Multilingual Plane and some beyond, this repository's own files,
and random mixtures of characters, words, runs and special tokens, from a fixed seed. Vocabularies of kinds that PMetal refuses by
name (bert, t5) are left out, and those without a pre-tokenizer's name.
"""

import json
import random
import sys
from pathlib import Path

from gguf_fixtures.corpus import CORPUS, TEXTS
from gguf_fixtures.vocabulary import Vocabulary

ROOT = Path(__file__).parent.parent
REFUSED = {"bert-bge", "nomic-bert-moe", "aquila", "gpt-neox"}
WORDS = [word for text in CORPUS + TEXTS for word in text.split(" ")] + [
    "कैसे", "हैं", "আপনি", "தமிழ்", "ภาษาไทย", "ქართული", "Հայերեն", "አማርኛ", "ខ្មែរ", "မြန်မာ", "བོད་ཡིག", "ﷺ", "כָּתַב", "كِتَابٌ", "𠮷野家", "𝔘𝔫𝔦",
    "🏳️‍🌈", "👍🏽", "1️⃣", "İstanbul", "ǅ", "ﬁ", "①", "½", "１２３", "४५६", "\u200b", "\ufeff", "\u202e", "\x1b[31m", "\ufffd"]
SPECIAL = [
    "<s>", "</s>", "<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|end|>", "<|eot_id|>", "<bos>", "<eos>",
    "<start_of_turn>", "<end_of_turn>", "<pad>", "<fim_prefix>", "<file_sep>", "<|START_OF_TURN_TOKEN|>", "<|turn>", "<EOT>",
    "<0x0A>", "<|im_st", "\u2581", ">>TITLE<<", "<think>"]


def texts():
    draw = random.Random(20)
    yield from TEXTS + CORPUS
    for start in [*range(0, 0xD800, 16), *range(0xE000, 0x10000, 64), *range(0x10000, 0x32000, 64)]:
        characters = [chr(code) for code in range(start, start + 16)]
        yield "".join(characters)
        yield " a".join(characters)
    for path in sorted(ROOT.glob("*.md")) + sorted(ROOT.glob("crates/*/src/*.rs")):
        yield path.read_text()[:20000]
    for _ in range(1500):
        yield "".join(character(draw) for _ in range(draw.randrange(1, 60)))
    for _ in range(1000):
        yield draw.choice(["", " ", "\n"]).join(draw.choice(WORDS) for _ in range(draw.randrange(1, 30)))
    for _ in range(1000):
        yield "".join(draw.choice([draw.choice(WORDS), draw.choice(SPECIAL), " ", "\n\n"]) for _ in range(draw.randrange(1, 12)))
    for _ in range(1000):
        unit = "".join(draw.choice([draw.choice("ab =-*.#0_/\n\t'e"), draw.choice(WORDS)[:3]]) for _ in range(draw.randrange(1, 4)))
        yield draw.choice(["", draw.choice(WORDS)]) + unit * draw.randrange(1, 40)


def character(draw):
    low, high = draw.choice([(32, 127), (32, 127), (9, 33), (0xA0, 0x600), (0x300, 0x370), (0x900, 0xD800), (0x2000, 0x2070), (0x10000, 0x32000)])
    return chr(draw.randrange(low, high))


def main():
    chosen = list(texts())
    for path in sorted(Path(sys.argv[1]).glob("*.gguf")):
        if path.stem.removeprefix("ggml-vocab-") in REFUSED:
            continue
        vocabulary = Vocabulary(path)
        rows = [{"text": text, "ids": vocabulary.ids(text), "with_special": vocabulary.ids(text, add_special=True)} for text in chosen]
        path.with_name(path.name + ".json").write_text(json.dumps({"ends": vocabulary.ends(), "rows": rows}))
        print(f"{path.name}: {len(rows)} texts")


if __name__ == "__main__":
    main()
