#!/usr/bin/env python3
"""Writes the seeds of the fuzz targets to fuzz/corpus: small good files of every kind a user brings.

Needs the Python package `tokenizers`; everything else is put together here byte by byte, so that the files stay small.
"""

import json
import struct
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

CORPUS = Path(__file__).resolve().parent.parent / "fuzz" / "corpus"
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER, VOCAB = 8, 2, 1, 4, 12, 16

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
}
# Keys that other families have beside these, each with lists, objects and numbers that have to fit one another.
FAMILIES = {
    "deepseek_v32": {
        "q_lora_rank": 6, "kv_lora_rank": 4, "qk_nope_head_dim": 2, "qk_rope_head_dim": 2, "v_head_dim": 3, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "n_shared_experts": 1, "moe_intermediate_size": 3,
        "mlp_layer_types": ["sparse"], "index_topk": 2, "index_n_heads": 2, "index_head_dim": 4, "num_key_value_heads": HEADS,
        "rope_scaling": {"type": "yarn", "factor": 4, "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 16},
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    },
    "gemma3_text": {
        "head_dim": HEAD_DIM, "query_pre_attn_scalar": 4, "sliding_window": 3, "layer_types": ["sliding_attention"], "hidden_act": None,
        "final_logit_softcapping": 2.0, "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "gpt_oss": {
        "head_dim": HEAD_DIM, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 3, "layer_types": ["full_attention"],
        "swiglu_limit": 7.0, "quantization_config": {"quant_method": "mxfp4"},
    },
    "llama4": {
        "text_config": {key: value for key, value in LLAMA.items() if key not in ("model_type", "architectures")} | {
            "head_dim": HEAD_DIM, "intermediate_size_mlp": 6, "num_local_experts": 2, "num_experts_per_tok": 1, "moe_layers": [0],
            "no_rope_layers": [1], "layer_types": ["chunked_attention"], "attention_chunk_size": 2, "attn_temperature_tuning": True,
        },
    },
    "phi3": {
        "sliding_window": 3, "original_max_position_embeddings": 8,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0]},
    },
}
LAYER = "model.layers.0."
SHAPES = {
    "model.embed_tokens.weight": (VOCAB, HIDDEN),
    LAYER + "input_layernorm.weight": (HIDDEN,),
    LAYER + "self_attn.q_proj.weight": (HEADS * HEAD_DIM, HIDDEN),
    LAYER + "self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
    LAYER + "self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
    LAYER + "self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
    LAYER + "post_attention_layernorm.weight": (HIDDEN,),
    LAYER + "mlp.gate_proj.weight": (INNER, HIDDEN),
    LAYER + "mlp.up_proj.weight": (INNER, HIDDEN),
    LAYER + "mlp.down_proj.weight": (HIDDEN, INNER),
    "model.norm.weight": (HIDDEN,),
    "lm_head.weight": (VOCAB, HIDDEN),
}
GGUF_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    LAYER + "input_layernorm.weight": "blk.0.attn_norm.weight",
    LAYER + "self_attn.q_proj.weight": "blk.0.attn_q.weight",
    LAYER + "self_attn.k_proj.weight": "blk.0.attn_k.weight",
    LAYER + "self_attn.v_proj.weight": "blk.0.attn_v.weight",
    LAYER + "self_attn.o_proj.weight": "blk.0.attn_output.weight",
    LAYER + "post_attention_layernorm.weight": "blk.0.ffn_norm.weight",
    LAYER + "mlp.gate_proj.weight": "blk.0.ffn_gate.weight",
    LAYER + "mlp.up_proj.weight": "blk.0.ffn_up.weight",
    LAYER + "mlp.down_proj.weight": "blk.0.ffn_down.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def write(name, contents):
    path = CORPUS / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(contents if isinstance(contents, bytes) else contents.encode())


def floats(shape):
    count = 1
    for dimension in shape:
        count *= dimension
    return struct.pack(f"<{count}f", *((i * 7 % 13 - 6) / 16 for i in range(count)))


def safetensors(shapes, metadata=None):
    header, data = {}, b""
    if metadata:
        header["__metadata__"] = metadata
    for name, shape in shapes.items():
        tensor = floats(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [len(data), len(data) + len(tensor)]}
        data += tensor
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def string(text):
    text = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(text)) + text


def pair(key, value):
    """A metadata pair; the Python type says GGUF's: int u32, float f32, bool, str, list of str, float or int."""
    def scalar(value):
        if isinstance(value, bool):
            return 7, struct.pack("<B", value)
        if isinstance(value, int):
            return 4, struct.pack("<I", value)
        if isinstance(value, float):
            return 6, struct.pack("<f", value)
        return 8, string(value)

    if isinstance(value, list):
        kinds = [scalar(element) for element in value]
        body = struct.pack("<IQ", kinds[0][0], len(value)) + b"".join(element for _, element in kinds)
        return string(key) + struct.pack("<I", 9) + body
    kind, body = scalar(value)
    return string(key) + struct.pack("<I", kind) + body


def gguf(pairs, tensors):
    """tensors: name to (shape outermost first, block type, bytes)."""
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(pairs)) + b"".join(pair(*p) for p in pairs.items())
    data = b""
    for name, (shape, kind, contents) in tensors.items():
        data += b"\0" * (-len(data) % 32)
        header += string(name) + struct.pack("<I", len(shape))
        header += struct.pack(f"<{len(shape)}Q", *reversed(shape)) + struct.pack("<IQ", kind, len(data))
        data += contents
    return header + b"\0" * (-len(header) % 32) + data


def gguf_model(tokenizer):
    pairs = {
        "general.architecture": "llama",
        "llama.context_length": 64,
        "llama.embedding_length": HIDDEN,
        "llama.block_count": 1,
        "llama.feed_forward_length": INNER,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0,
        "llama.rope.dimension_count": HEAD_DIM,
        **tokenizer,
    }
    tensors = {GGUF_NAMES[name]: (shape, 0, floats(shape)) for name, shape in SHAPES.items()}
    return gguf(pairs, tensors)


def bytes_vocabulary():
    """The visible characters that stand for bytes in GPT-2's alphabet, in order."""
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def tokenizers():
    alphabet = bytes_vocabulary()
    words = ["he", "ll", "hell", "o", "hello", "\u0120w", "or", "\u0120wor", "ld", "\u0120world"]
    pieces = alphabet + [word for word in words if word not in alphabet]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("\u0120", "w"), ("o", "r"), ("\u0120w", "or"), ("l", "d"), ("\u0120wor", "ld")]
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    bpe.normalizer = normalizers.NFC()
    split = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    from tokenizers import Regex
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(split), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(text, normalized=False) for text in ("<s>", "<|im_start|>", "<|im_end|>")])
    bos = bpe.token_to_id("<s>")
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", bos)])

    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("\u2581", -2.0), ("\u2581he", -3.0), ("llo", -3.5), ("a", -4.0), ("<0x0A>", -9.0)], 0, True))
    unigram.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])

    wordpiece = Tokenizer(models.WordPiece({"[UNK]": 0, "hello": 1, "w": 2, "##ord": 3}, unk_token="[UNK]"))
    wordpiece.normalizer = normalizers.BertNormalizer()
    wordpiece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    wordpiece.decoder = decoders.WordPiece()
    return {"bytes": bpe, "unigram": unigram, "wordpiece": wordpiece}


ROWS = [
    {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "w\u00f6rld \U0001f9f6"}]},
    {"instruction": "Add.", "input": "1 2", "output": "3", "system": "Be brief.", "history": [["a", "b"]]},
    {"text": "hello world"},
    {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]},
    {
        "messages": [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]},
            {"role": "tool", "name": "f", "content": "{\"t\": 20}"},
            {"role": "assistant", "content": "20 degrees."},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}],
    },
]

TEMPLATES = {
    "chatml": """{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message['content'] | trim + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}""",
    "tools": """{%- set ns = namespace(last=0, text='') -%}
{%- macro turn(role, content='') -%}[{{ role | upper }}]{{ content.split('</think>')[-1].strip() }}{%- endmacro -%}
{%- if tools is defined and tools %}{{ tools | tojson(indent=2) }}{% endif -%}
{%- for m in messages if m.role != 'tool' -%}
{%- if loop.index0 > 9 %}{% break %}{% endif -%}
{%- set ns.last = loop.index0 -%}
{%- if m.role == 'assistant' %}{% generation %}{{ turn(m.role, m.content) }}{{ eos_token }}{% endgeneration %}
{%- else %}{{ turn(m.role, m.content) }}{% endif -%}
{%- endfor -%}
{{ range(3) | join(',') }}{{ 'a' * 3 }}{{ strftime_now('%d %b %Y') }}{{ messages[::-1][0].content[:2] }}""",
}


def main():
    llama = json.dumps(LLAMA, indent=1)
    write("config/llama.json", llama)
    scaled = LLAMA | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}}
    write("config/llama3.json", json.dumps(scaled))
    qwen = LLAMA | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": HEAD_DIM, "layer_types": ["full_attention"], "sliding_window": None, "use_sliding_window": False, "rope_parameters": {"rope_type": "linear", "factor": 2, "rope_theta": 1e6}}
    write("config/qwen3.json", json.dumps(qwen))
    for name, changes in FAMILIES.items():
        write(f"config/{name}.json", json.dumps(LLAMA | {"model_type": name, "architectures": None} | changes))
    write("safetensors/llama.safetensors", safetensors(SHAPES, {"format": "pt"}))

    r = 2
    lora = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "llama", "r": r, "lora_alpha": 4, "lora_dropout": 0.0, "target_modules": ["q_proj"], "bias": "none", "use_rslora": False, "use_dora": False, "modules_to_save": None}
    q_proj = "base_model.model." + LAYER + "self_attn.q_proj."
    tensors = {q_proj + "lora_A.weight": (r, HIDDEN), q_proj + "lora_B.weight": (HEADS * HEAD_DIM, r)}
    write("adapter/adapter_config.json", json.dumps(lora))
    write("adapter/adapter_model.safetensors", safetensors(tensors))
    write("adapter/lora_weights.safetensors", safetensors(tensors, {"format": "pt", "adapter_config": json.dumps(lora)}))

    for name, tokenizer in tokenizers().items():
        write(f"tokenizer/{name}.json", json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, separators=(",", ":")))

    alphabet = bytes_vocabulary()
    pieces = alphabet + ["he", "ll", "hell", "<|im_start|>", "<|im_end|>"]
    write("gguf/byte-level.gguf", gguf_model({
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": [1] * (len(pieces) - 2) + [3, 3],
        "tokenizer.ggml.merges": ["h e", "l l", "he ll"],
        "tokenizer.ggml.bos_token_id": len(pieces) - 2,
        "tokenizer.ggml.eos_token_id": len(pieces) - 1,
        "tokenizer.chat_template": TEMPLATES["chatml"],
    }))
    pieces = ["<unk>", "<s>", "</s>", "<0x0A>", "\u2581", "h", "e", "he", "\u2581he", "l", "ll", "o"]
    write("gguf/sentence-piece.gguf", gguf_model({
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": [float(-i) for i in range(len(pieces))],
        "tokenizer.ggml.token_type": [2, 3, 3, 6] + [1] * (len(pieces) - 4),
        "tokenizer.ggml.add_bos_token": True,
    }))
    blocks = {"f16": (1, 2, 1), "q4_0": (2, 18, 32), "q8_0": (8, 34, 32), "q4_k": (12, 144, 256), "q6_k": (14, 210, 256), "bf16": (30, 2, 1)}
    tensors = {}
    for name, (kind, size, count) in blocks.items():
        columns = max(count, 4)
        tensors[name] = ((2, columns), kind, bytes(i * 37 % 251 for i in range(2 * columns // count * size)))
    write("gguf/blocks.gguf", gguf({"general.architecture": "llama", "general.alignment": 32}, tensors))

    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    write("jsonl/lines.jsonl", "\n".join(lines) + "\n")
    write("jsonl/array.json", "[\n" + ",\n".join(lines) + "\n]\n")
    for name, source in TEMPLATES.items():
        write(f"template/{name}.jinja", source)


if __name__ == "__main__":
    main()
