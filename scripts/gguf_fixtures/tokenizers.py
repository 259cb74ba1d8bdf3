"""Small vocabularies in GGUF files, and the ids llama.cpp gives texts with them.

The byte-level vocabulary is trained without word boundaries, so its merges reach across digits, spaces and punctuation: the ids
then show every place where a pre-tokenizer cuts.
"""

import io
import json
import re
from pathlib import Path

import sentencepiece
from gguf import GGUFWriter, TokenType
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from .corpus import CORPUS, TEXTS
from .vocabulary import Vocabulary

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
USER_DEFINED = ["<think>", "</think>"]
# No merge makes these: only a tokenizer that takes whole words past the merges finds them.
UNREACHABLE = ["Ġzebra", "quagga"]
BYTE_LEVEL = ["gpt-2", "smollm", "llama-bpe", "qwen2", "tekken", "default"]
# The first name of each of the other pre-tokenizers: the same vocabulary under that name.
PRE_TOKENIZERS = Path(__file__).parents[2] / "crates/pmetal-gguf/src/tokenizer/pre_tokenizer.rs"


def write(folder):
    ids = {}
    for pre in BYTE_LEVEL:
        ids[pre] = record(folder / f"tokenizer-{pre}.gguf", byte_level(pre))
    for name, prefix in [("llama", True), ("llama-no-prefix", False)]:
        ids[name] = record(folder / f"tokenizer-{name}.gguf", sentence_piece(prefix))
    for name, score in [("llama-runs", 0.0), ("llama-runs-last", -1000.0)]:
        ids[name] = record(folder / f"tokenizer-{name}.gguf", sentence_piece(False, runs_score=score))
    ids["phi-3"] = record(folder / "tokenizer-phi-3.gguf", sentence_piece(True, name="Phi-3-mini"))
    ids["gemma4"] = record(folder / "tokenizer-gemma4.gguf", text_pairs())
    dump(folder / "tokenizer-ids.json", ids)
    scratch = folder / "scratch.gguf"
    others = {}
    for pre in other_pre_tokenizers():
        others[pre] = [[row["text"], row["ids"]] for row in record(scratch, byte_level(pre))]
    scratch.unlink()
    dump(folder / "pre-tokenizer-ids.json", others)


def other_pre_tokenizers():
    """One name per pre-tokenizer on bytes that has no file of its own."""
    table = PRE_TOKENIZERS.read_text().split("const KNOWN", 1)[1].split("];\n\n", 1)[0]
    kinds = [re.findall(r'"([^"]+)"', names) for names in re.findall(r"words\(\s*&\[(.*?)\]", table, re.S)]
    return [names[0] for names in kinds if not set(names) & {*BYTE_LEVEL, "gemma4", "sarvam-moe"}]


def write_real(folder, path):
    dump(folder / "smollm2-ids.json", texts_with_ids(Vocabulary(path), TEXTS + CORPUS))


def dump(path, ids):
    """One text per line."""
    def lines(rows):
        return "[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]"

    if isinstance(ids, list):
        path.write_text(lines(ids) + "\n")
    else:
        path.write_text("{\n" + ",\n".join(f"{json.dumps(name)}: {lines(rows)}" for name, rows in ids.items()) + "\n}\n")


def texts_with_ids(vocabulary, texts):
    return [{"text": text, "ids": vocabulary.ids(text), "with_special": vocabulary.ids(text, add_special=True)} for text in texts]


def record(path, add_vocabulary):
    """Writes a vocabulary without weights, and what llama.cpp makes of the texts with it."""
    writer = GGUFWriter(path, "llama")
    add_vocabulary(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return texts_with_ids(Vocabulary(path), TEXTS)


def byte_level(pre):
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=768, min_frequency=1, max_token_length=6, initial_alphabet=sorted(alphabet), special_tokens=CONTROL, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get) + UNREACHABLE + USER_DEFINED
    types = [TokenType.CONTROL if token in CONTROL else TokenType.USER_DEFINED if token in USER_DEFINED else TokenType.NORMAL
             for token in tokens]

    def add(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
        writer.add_bos_token_id(tokens.index("<|im_start|>"))
        writer.add_eos_token_id(tokens.index("<|im_end|>"))
        writer.add_pad_token_id(tokens.index("<|endoftext|>"))
        writer.add_chat_template("{{ messages[0].content }}")

    return add


def sentence_piece(add_space_prefix, runs_score=None, name=None):
    """With a score for runs, runs of spaces and line ends are tokens of the user's with that score, as Gemma has them."""
    written = io.BytesIO()
    lines = [line for text in CORPUS for line in text.splitlines()] * 4
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=written, model_type="bpe", vocab_size=900, byte_fallback=True, num_threads=1,
        character_coverage=0.98, split_digits=True, allow_whitespace_only_pieces=True, remove_extra_whitespaces=False,
        normalization_rule_name="identity", minloglevel=2)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    count = pieces.get_piece_size()

    def kind(token):
        if pieces.is_unknown(token):
            return TokenType.UNKNOWN
        if pieces.is_control(token):
            return TokenType.CONTROL
        return TokenType.BYTE if pieces.is_byte(token) else TokenType.NORMAL

    tokens = [pieces.id_to_piece(token) for token in range(count)]
    scores = [pieces.get_score(token) for token in range(count)]
    types = [kind(token) for token in range(count)]
    if runs_score is not None:
        runs = [character * length for character in "▁\n" for length in range(2, 12)]
        runs = [run for run in runs if run not in tokens]
        tokens += runs
        scores += [runs_score] * len(runs)
        types += [TokenType.USER_DEFINED] * len(runs)
    if name is not None:
        tokens += ["<|endoftext|>", "<|user|>", "<|end|>"]
        scores += [0.0] * 3
        types += [TokenType.CONTROL] * 3

    def add(writer):
        if name is not None:
            writer.add_name(name)
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens)
        writer.add_token_scores(scores)
        writer.add_token_types(types)
        if not add_space_prefix:
            writer.add_add_space_prefix(False)
            writer.add_add_bos_token(False)
            writer.add_add_eos_token(True)

    return add


def text_pairs():
    """Gemma 4's kind: pairs of text with visible spaces, other characters by their bytes."""
    trained = Tokenizer(models.BPE())
    texts = [text.replace(" ", "▁") for text in CORPUS]
    trained.pre_tokenizer = pre_tokenizers.Split(Regex("[^\\n]+|[\\n]+"), "isolated")
    trained.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=600, min_frequency=1, max_token_length=8, limit_alphabet=150, show_progress=False,
        special_tokens=["<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>"] + [f"<0x{byte:02X}>" for byte in range(256)]))
    model = json.loads(trained.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)

    def kind(token):
        if re.fullmatch("<0x..>", token):
            return TokenType.BYTE
        return TokenType.CONTROL if re.fullmatch(r"<.+>", token) else TokenType.NORMAL

    def add(writer):
        writer.add_tokenizer_model("gemma4")
        writer.add_token_list(tokens)
        writer.add_token_types([kind(token) for token in tokens])
        writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
        writer.add_bos_token_id(2)
        writer.add_eos_token_id(1)
        writer.add_add_bos_token(False)

    return add
