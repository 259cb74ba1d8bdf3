"""Small vocabularies in GGUF files, and the ids llama.cpp gives texts with them.

The byte-level vocabulary is trained without word boundaries, so its merges reach across digits, spaces and punctuation: the ids
then show every place where a pre-tokenizer cuts.
"""

import io
import json
import tempfile
from pathlib import Path

import numpy as np
import sentencepiece
from gguf import GGUFWriter, TokenType
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from . import llama_cpp

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
USER_DEFINED = ["<think>", "</think>"]
# No merge makes these: only a tokenizer that takes whole words past the merges finds them.
UNREACHABLE = ["Ġzebra", "quagga"]
BYTE_LEVEL = ["gpt-2", "smollm", "llama-bpe", "qwen2", "tekken", "default"]

CORPUS = [
    "The cat sat on the mat. The dog didn't; it's 12 years old, isn't it? They'll say we've seen 1234567 of 100 dogs.\n\n",
    "In 2024, 365 days passed, 24 hours each: 3.14159 and 2.71828 are numbers, 1000000 too.\n",
    "    if x == 10:\n        return  x + 1\n\n    else:\n        return None\t# 0x1234 comment\r\n",
    "Größe, naïve café, Ærø; Привет, мир! Как дела? Γειά σου Κόσμε. שלום עולם. مرحبا بالعالم ١٢٣.\n",
    "你好，世界。今天是二〇二四年。こんにちは世界、元気ですか。안녕하세요 세계.\n",
    "Hello World! HELLO WORLD'S camelCaseWord SHOUT's It'S We'LL a/b/c path/to/file.txt (a+b)=[c]{d}<e>|f|^~`g`\n",
    "🙂🙂 👩‍👩‍👧 ½ ² Ⅷ → ∞ … “quoted” — dash – $5.00 €7 £8 100% #1 @home &c. * * *\n",
]

TEXTS = [
    "", " ", "  ", "a", " a", "a ", "\n", "\n\n", " \n \n  x", "\t\tx\t y", "a\r\nb\r\n\r\nc", "trailing   ", "   leading",
    "Hello World!", "hello world, it's me; IT'S ME; I'Ve, we'LL, 'tis, rock'n'roll", "12", "123", "1234", "12345678901", "a1b22c333",
    "3.14159 x 10^23 = -7e+5", "١٢٣٤ ½² Ⅷ 五百", "zebra", " zebra", "a quagga", "quagga", "camelCaseWord HTMLParser iPhone",
    "Größe naïve café", "Привет, мир!", "Γειά σου Κόσμε", "שלום עולם", "مرحبا بالعالم", "你好，世界。", "こんにちは世界", "안녕하세요 세계", "हिन्दी में",
    "ภาษาไทย", "🙂", "🙂🙂 👩‍👩‍👧!", "a\u00a0b\u2003c\u3000d", "\u200bzero\u200bwidth", "    if x == 10:\n        return  x + 1\n",
    "path/to/file.txt?a=1&b=2#c", "!!!\n\n\n???\n", "...---...", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<|endoftext|><|endoftext|>", "a <|im_end|> b", "<think>\nhm\n</think>\n\nyes", "<|im_start", "|im_end|>", "<s>a</s> b", "<unk>", "▁a ▁▁b",
    "x" * 100, "ab" * 60, " " * 40 + "x", "\n" * 20, "0" * 50, "é́̂", "\u0000\u0001\u007f", "The quick brown fox jumps over the lazy dog.",
]
# Of the tokenizers here only Qwen's composes characters (NFC), which llama.cpp does not do: no decomposed text for it.
DECOMPOSED = {"é́̂"}


def write(folder):
    ids = {}
    for pre in BYTE_LEVEL:
        texts = [text for text in TEXTS if pre != "qwen2" or text not in DECOMPOSED]
        ids[pre] = record(folder, pre, byte_level(pre), texts)
    for name, prefix in [("llama", True), ("llama-no-prefix", False)]:
        ids[name] = record(folder, name, sentence_piece(prefix), TEXTS)
    dump(folder / "tokenizer-ids.json", ids)


def write_real(folder, path):
    with llama_cpp.serve(path) as server:
        dump(folder / "smollm2-ids.json", texts_with_ids(server, TEXTS + CORPUS))


def dump(path, ids):
    """One text per line."""
    def lines(rows):
        return "[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]"

    if isinstance(ids, list):
        path.write_text(lines(ids) + "\n")
    else:
        path.write_text("{\n" + ",\n".join(f"{json.dumps(name)}: {lines(rows)}" for name, rows in ids.items()) + "\n}\n")


def texts_with_ids(server, texts):
    return [{"text": text, "ids": server.ids(text), "with_special": server.ids(text, add_special=True)} for text in texts]


def record(folder, name, add_vocabulary, texts):
    """Writes the vocabulary alone, and asks llama.cpp with a random model around it."""
    write_file(folder / f"tokenizer-{name}.gguf", add_vocabulary, with_weights=False)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "model.gguf"
        write_file(path, add_vocabulary, with_weights=True)
        with llama_cpp.serve(path) as server:
            return texts_with_ids(server, texts)


def write_file(path, add_vocabulary, with_weights):
    writer = GGUFWriter(path, "llama")
    size = add_vocabulary(writer)
    if with_weights:
        add_random_model(writer, size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_random_model(writer, vocab_size, hidden=32):
    writer.add_block_count(1)
    writer.add_context_length(256)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    for name in ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]:
        writer.add_tensor(f"blk.0.{name}.weight", np.eye(hidden, dtype=np.float32))
    for name in ["blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"]:
        writer.add_tensor(f"{name}.weight", np.ones(hidden, dtype=np.float32))
    writer.add_tensor("token_embd.weight", np.zeros((vocab_size, hidden), dtype=np.float32))


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
        return len(tokens)

    return add


def sentence_piece(add_space_prefix):
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

    def add(writer):
        writer.add_tokenizer_model("llama")
        writer.add_token_list([pieces.id_to_piece(token) for token in range(count)])
        writer.add_token_scores([pieces.get_score(token) for token in range(count)])
        writer.add_token_types([kind(token) for token in range(count)])
        if not add_space_prefix:
            writer.add_add_space_prefix(False)
            writer.add_add_bos_token(False)
            writer.add_add_eos_token(True)
        return count

    return add
