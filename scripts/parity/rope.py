"""Writes crates/pmetal-models/tests/rope.json: the frequencies and factors that transformers' own rotary modules come to.

    python scripts/parity/rope.py

A case is a configuration in the spelling of some file, and for rows of several lengths what the module holds after it saw one.
"""

import json
from pathlib import Path

import torch
from transformers import DeepseekV3Config, LlamaConfig, Phi3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding, yarn_apply_mscale
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding
from transformers.utils import logging

TARGET = Path(__file__).parent.parent.parent / "crates/pmetal-models/tests/rope.json"
MODULES = {
    "llama": (LlamaConfig, LlamaRotaryEmbedding),
    "phi3": (Phi3Config, Phi3RotaryEmbedding),
    "deepseek_v3": (DeepseekV3Config, DeepseekV3RotaryEmbedding),
}
HEAD_DIM, CONTEXT = 24, 96
BANDS = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=48)
DEEPSEEK_YARN = dict(type="yarn", factor=40, beta_fast=32, beta_slow=1, original_max_position_embeddings=4096)


def lists(count):
    return dict(short_factor=[1 + i / 7 for i in range(count)], long_factor=[1.5 + i * i / 3 for i in range(count)])


LLAMA = {
    "plain": {},
    "theta": dict(rope_theta=1e6),
    "linear": dict(rope_theta=5e5, rope_scaling=dict(type="linear", factor=3.0)),
    "linear-today": dict(rope_parameters=dict(rope_type="linear", factor=3, rope_theta=7e4)),
    "linear-part": dict(rope_scaling=dict(type="linear", factor=2.0), partial_rotary_factor=0.5),
    "plain-part": dict(partial_rotary_factor=0.5),
    "both-spellings": dict(
        rope_theta=3e4, rope_scaling=dict(rope_type="linear", factor=2.0), rope_parameters=dict(rope_type="default", rope_theta=9e4)
    ),
    "empty-scaling": dict(rope_theta=3e4, rope_scaling={}, rope_parameters=dict(rope_type="linear", factor=5.0, rope_theta=9e4)),
    "dynamic": dict(rope_theta=2e4, rope_scaling=dict(type="dynamic", factor=2.5)),
    "yarn": dict(rope_theta=1e6, rope_scaling=dict(rope_type="yarn", factor=4.0)),
    "yarn-inner-original": dict(rope_scaling=dict(type="yarn", factor=4.0, original_max_position_embeddings=24)),
    "yarn-outer-original": dict(
        original_max_position_embeddings=40, rope_scaling=dict(type="yarn", factor=4.0, original_max_position_embeddings=24)
    ),
    "yarn-no-factor": dict(rope_scaling=dict(type="yarn", factor=None, original_max_position_embeddings=24)),
    "yarn-betas": dict(rope_scaling=dict(rope_type="yarn", factor=6, beta_fast=9.5, beta_slow=0.3, truncate=False)),
    "yarn-factor-of-attention": dict(rope_scaling=dict(rope_type="yarn", factor=6.0, attention_factor=0.7, mscale=2.0)),
    "yarn-mscales": dict(rope_scaling=dict(rope_type="yarn", factor=6.0, mscale=0.7, mscale_all_dim=1.3)),
    "yarn-one-mscale": dict(rope_scaling=dict(rope_type="yarn", factor=6.0, mscale=0.7, mscale_all_dim=0)),
    "yarn-part": dict(rope_scaling=dict(rope_type="yarn", factor=6.0, partial_rotary_factor=0.75)),
    "yarn-one-point": dict(
        rope_scaling=dict(rope_type="yarn", factor=4.0, beta_fast=1.0, beta_slow=1.0, original_max_position_embeddings=2)
    ),
    "llama3": dict(rope_theta=5e5, rope_scaling=dict(rope_type="llama3", **BANDS)),
    "llama3-no-band": dict(rope_theta=5e5, rope_scaling=dict(rope_type="llama3", **{**BANDS, "high_freq_factor": 1.0})),
    "longrope": dict(
        rope_parameters=dict(rope_type="longrope", rope_theta=1e5, original_max_position_embeddings=32, **lists(12))
    ),
    "longrope-factor": dict(rope_scaling=dict(rope_type="longrope", factor=5.0, **lists(12))),
    "longrope-factor-of-attention": dict(rope_scaling=dict(rope_type="longrope", attention_factor=1.4, **lists(12))),
}
PHI3 = {
    "phi3-plain": dict(rope_scaling=None),
    "phi3-part": dict(partial_rotary_factor=0.75),
    "phi3-odd-part": dict(partial_rotary_factor=0.65),
    "phi3-longrope": dict(
        original_max_position_embeddings=32, partial_rotary_factor=0.75, rope_scaling=dict(type="longrope", **lists(9))
    ),
    "phi3-su": dict(
        original_max_position_embeddings=32, rope_scaling=dict(type="su", original_max_position_embeddings=16, **lists(12))
    ),
    "phi3-yarn": dict(
        original_max_position_embeddings=32,
        rope_scaling=dict(type="yarn", original_max_position_embeddings=16, **lists(12)),
    ),
}
DEEPSEEK = {
    "deepseek": dict(rope_scaling=dict(**DEEPSEEK_YARN, mscale=1.0, mscale_all_dim=1.0)),
    "deepseek-mscales": dict(rope_scaling=dict(**DEEPSEEK_YARN, mscale=0.5, mscale_all_dim=0.9)),
    "deepseek-no-mscale": dict(rope_scaling=DEEPSEEK_YARN),
    "deepseek-unscaled": dict(rope_scaling=dict(type="default", factor=9.0, mscale_all_dim=1.0)),
}
SIZES = {
    "llama": dict(hidden_size=48, num_attention_heads=2, head_dim=HEAD_DIM),
    "phi3": dict(hidden_size=48, num_attention_heads=2, pad_token_id=0),
    "deepseek_v3": dict(hidden_size=48, num_attention_heads=2, qk_rope_head_dim=HEAD_DIM),
}


def case(name, family, keys):
    config_class, module = MODULES[family]
    arguments = json.loads(json.dumps(keys))
    config = config_class(max_position_embeddings=CONTEXT, **SIZES[family], **arguments)
    rows = []
    for length in (5, CONTEXT // 3, CONTEXT // 3 + 1, CONTEXT, CONTEXT + 1, 3 * CONTEXT):
        rope = module(config)
        rope(torch.zeros(1), torch.arange(length)[None])
        rows.append(dict(length=length, inv_freq=[float(f"{x:.9g}") for x in rope.inv_freq.tolist()]))
    return dict(
        name=name,
        family=family,
        config=keys,
        attention_factor=float(rope.attention_scaling),
        softmax_factor=yarn_apply_mscale(config.rope_parameters, 1.0) if family == "deepseek_v3" else None,
        rows=rows if rows[0]["inv_freq"] != rows[-1]["inv_freq"] else rows[:1],
    )


def main():
    logging.set_verbosity_error()
    families = {"llama": LLAMA, "phi3": PHI3, "deepseek_v3": DEEPSEEK}
    cases = [case(name, family, keys) for family, named in families.items() for name, keys in named.items()]
    lines = ",\n".join(json.dumps(c) for c in cases)
    TARGET.write_text(f'{{"head_dim": {HEAD_DIM}, "max_position_embeddings": {CONTEXT}, "cases": [\n{lines}\n]}}\n')
    print(len(cases), "cases")


main()
