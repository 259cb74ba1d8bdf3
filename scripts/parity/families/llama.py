"""Llama 2 and 3, with every kind of rope scaling, and Llama 4."""

import torch
from transformers import Llama4Config, Llama4ForConditionalGeneration, Llama4TextConfig, LlamaConfig

from parity.fixture import Fixture
from parity.layouts import hub_keys, hub_keys_with_type, text_hub_keys, with_keys, without_keys
from parity.lora import ALL_LINEAR, RANK_FOUR

WIDE_HEAD = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=16)
PLAIN_ROPE = dict(rope_parameters=dict(rope_type="default", rope_theta=10000.0))


def scaled(kind, theta=10000.0, **parameters):
    return dict(rope_parameters=dict(rope_type=kind, rope_theta=theta, **parameters))


# Band edges at wavelengths 16 and 64: with head_dim 16 the eight frequencies fall on both sides and in between.
ROPE_LLAMA3 = dict(**WIDE_HEAD, **scaled(
    "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
))
LINEAR = dict(**WIDE_HEAD, **scaled("linear", factor=4.0))
# Nothing changes up to eight tokens.
DYNAMIC = dict(**WIDE_HEAD, max_position_embeddings=8, **scaled("dynamic", factor=3.0))
YARN = scaled("yarn", theta=500.0, factor=4.0, original_max_position_embeddings=64)
YARN_MSCALE = scaled(
    "yarn", theta=500.0, factor=4.0, original_max_position_embeddings=40, beta_fast=4.0, beta_slow=0.5, mscale=3.0,
    mscale_all_dim=0.5, truncate=False,
)
YARN_WITHOUT_MSCALE = scaled(
    "yarn", theta=500.0, factor=4.0, original_max_position_embeddings=40, beta_fast=4.0, beta_slow=0.5, truncate=False
)
YARN_TRUNCATED = dict(rope_parameters={**YARN_MSCALE["rope_parameters"], "truncate": True})
YARN_FACTOR = scaled("yarn", theta=500.0, factor=6.0, attention_factor=1.4)

LLAMA4 = dict(
    head_dim=12, intermediate_size=16, intermediate_size_mlp=40, num_local_experts=4, num_experts_per_tok=1,
    attention_chunk_size=5, floor_scale=2, attn_scale=0.7,
)
LLAMA4_LORA = dict(
    r=2, lora_alpha=4, target_modules=ALL_LINEAR,
    target_parameters=["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"],
)
# Scout's edges coincide, at a wavelength of 32 here.
SCOUT_ROPE = scaled(
    "llama3", theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=1.0, original_max_position_embeddings=32
)
LLAMA4_VISION = dict(
    hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4,
    vision_output_dim=8, projector_input_dim=8, projector_output_dim=8, pixel_shuffle_ratio=0.5,
)
LLAMA4_LANGUAGE_LORA = dict(
    r=2, lora_alpha=4, target_modules=rf".*language_model.*\.({'|'.join(ALL_LINEAR)})",
)

FIXTURES = {
    "llama": Fixture(LlamaConfig, lora=RANK_FOUR, rslora=True, seed=1000),
    "llama3-rope": Fixture(LlamaConfig, ROPE_LLAMA3, lengths=(7, 40, 4), lora=RANK_FOUR, seed=1001),
    "llama3-rope-hub": Fixture(
        LlamaConfig, ROPE_LLAMA3, lengths=(7, 40, 4), lora=RANK_FOUR, edits=(hub_keys,), weights_of="llama3-rope"
    ),
    "llama-tied": Fixture(LlamaConfig, dict(tie_word_embeddings=True), lora=RANK_FOUR, full_gradients=True, seed=1003),
    "llama-biased": Fixture(
        LlamaConfig, dict(attention_bias=True, mlp_bias=True, rms_norm_eps=1e-2), lora=RANK_FOUR, seed=1004
    ),
    "llama-head-dim": Fixture(LlamaConfig, dict(hidden_size=40, head_dim=16), lora=RANK_FOUR, seed=1005),
    "llama-sharded-bf16": Fixture(
        LlamaConfig, dict(num_hidden_layers=3), torch.bfloat16, max_shard_size="30KB", lora=RANK_FOUR, seed=1006
    ),
    "llama-linear": Fixture(LlamaConfig, LINEAR, torch.bfloat16, switched_off=(PLAIN_ROPE,)),
    "llama-linear-hub": Fixture(
        LlamaConfig, LINEAR, torch.bfloat16, edits=(hub_keys_with_type,), weights_of="llama-linear"
    ),
    "llama-dynamic": Fixture(LlamaConfig, DYNAMIC, torch.bfloat16, apart=True, switched_off=(PLAIN_ROPE,)),
    "llama-dynamic-hub": Fixture(
        LlamaConfig, DYNAMIC, torch.bfloat16, apart=True, edits=(hub_keys_with_type,), weights_of="llama-dynamic"
    ),
    "llama-yarn": Fixture(LlamaConfig, {**WIDE_HEAD, **YARN}, torch.bfloat16, switched_off=(PLAIN_ROPE,)),
    "llama-yarn-mscale-hub": Fixture(
        LlamaConfig, {**WIDE_HEAD, **YARN_MSCALE}, torch.bfloat16, edits=(hub_keys,),
        switched_off=(YARN_WITHOUT_MSCALE, YARN_TRUNCATED),
    ),
    "llama-yarn-factor-hub": Fixture(
        LlamaConfig, {**WIDE_HEAD, **YARN_FACTOR, "max_position_embeddings": 48}, torch.bfloat16,
        edits=(hub_keys_with_type,), switched_off=(PLAIN_ROPE, scaled("yarn", theta=500.0, factor=6.0)),
    ),
    # Layers 1 and 3 have experts, layer 3 has no rope.
    "llama4-text": Fixture(
        Llama4TextConfig, dict(**LLAMA4, num_hidden_layers=4, interleave_moe_layer_step=2, **PLAIN_ROPE), torch.bfloat16,
        edits=(with_keys(no_rope_layers=[]), without_keys("moe_layers", "layer_types")), lora=LLAMA4_LORA,
        switched_off=(
            dict(attention_chunk_size=64), dict(attn_temperature_tuning=False), dict(use_qk_norm=False),
            dict(no_rope_layers=[1, 1, 1, 1]),
        ),
    ),
    "llama4-text-hub": Fixture(
        Llama4TextConfig,
        dict(
            **LLAMA4, num_hidden_layers=3, interleave_moe_layer_step=1, no_rope_layers=[1, 0, 1], use_qk_norm=False,
            rms_norm_eps=1e-2, **SCOUT_ROPE,
        ),
        torch.bfloat16, lengths=(7, 17, 4), max_shard_size="40KB", lora=LLAMA4_LORA,
        edits=(hub_keys, without_keys("moe_layers")),
        switched_off=(
            PLAIN_ROPE, dict(attn_temperature_tuning=False), dict(no_rope_layers=[1, 1, 1]),
        ),
    ),
    "llama4-hub": Fixture(
        Llama4Config,
        dict(
            text_config=dict(
                **LLAMA4, num_hidden_layers=2, interleave_moe_layer_step=2, attn_temperature_tuning=False,
                no_rope_layers=[1, 0], **scaled("default", theta=500000.0),
            ),
            vision_config=LLAMA4_VISION, boi_token_index=90, eoi_token_index=91, image_token_index=92,
        ),
        torch.bfloat16, model=Llama4ForConditionalGeneration, lora=LLAMA4_LANGUAGE_LORA,
        edits=(text_hub_keys, without_keys("moe_layers", inside="text_config")),
        switched_off=(dict(use_qk_norm=False),),
    ),
}
