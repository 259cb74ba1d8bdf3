"""Phi 3, 3.5 and 4."""

import torch
from transformers import Phi3Config

from parity.fixture import Fixture
from parity.layouts import edit_json, hub_keys, hub_keys_with_type

LORA = dict(r=2, lora_alpha=4, target_modules=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"])
PLAIN_ROPE = dict(rope_parameters=dict(rope_type="default", rope_theta=10000.0))
# Rows of up to 8 tokens have the short factors, longer ones the long factors.
LENGTHS = dict(max_position_embeddings=32, original_max_position_embeddings=8, pad_token_id=0)


def longrope(short, long, **parameters):
    return dict(rope_parameters=dict(
        rope_type="longrope", rope_theta=100.0, short_factor=short, long_factor=long, **parameters
    ))


SHORT, LONG = [1.0, 1.1, 1.3, 1.6], [1.0, 1.9, 4.5, 7.0]
PARTIAL_SHORT, PARTIAL_LONG = [1.0, 1.02, 1.1, 1.2, 1.5, 1.9], [1.0, 1.3, 2.2, 3.7, 6.0, 9.5]
PARTIAL = dict(
    num_attention_heads=2, num_key_value_heads=1,
    **longrope(PARTIAL_SHORT, PARTIAL_LONG, partial_rotary_factor=0.75),
)
WITHOUT_PARTIAL = longrope(PARTIAL_SHORT + [2.0, 2.0], PARTIAL_LONG + [9.6, 9.7], partial_rotary_factor=1.0)


def named_su(folder):
    edit_json(folder, lambda config: config["rope_scaling"].update(type="su"))


FIXTURES = {
    "phi3-window-hub": Fixture(
        Phi3Config, dict(sliding_window=5, pad_token_id=0), torch.bfloat16, lora=LORA, edits=(hub_keys,),
        switched_off=(dict(sliding_window=None),),
    ),
    "phi3-longrope-partial": Fixture(
        Phi3Config, dict(**LENGTHS, **PARTIAL, tie_word_embeddings=True), torch.bfloat16, lora=LORA, apart=True,
        switched_off=(PLAIN_ROPE, longrope(PARTIAL_SHORT, PARTIAL_SHORT, partial_rotary_factor=0.75), WITHOUT_PARTIAL),
    ),
    "phi3-longrope-partial-hub": Fixture(
        Phi3Config, dict(**LENGTHS, **PARTIAL, tie_word_embeddings=True), torch.bfloat16, lora=LORA, apart=True,
        edits=(hub_keys_with_type,), weights_of="phi3-longrope-partial",
    ),
    "phi3-su-hub": Fixture(
        Phi3Config, dict(**LENGTHS, **longrope(SHORT, LONG)), torch.bfloat16, lora=LORA, apart=True,
        edits=(hub_keys_with_type, named_su), max_shard_size="30KB", switched_off=(PLAIN_ROPE, longrope(LONG, LONG)),
    ),
}
