"""GPT-OSS."""

import torch
from transformers import GptOssConfig

from parity.fixture import Fixture
from parity.layouts import hub_keys, mxfp4_experts, without_keys

YARN = dict(rope_type="yarn", rope_theta=150000.0, factor=32.0, beta_fast=32.0, beta_slow=1.0, truncate=False,
            original_max_position_embeddings=4096)
CLOSE_YARN = {**YARN, "rope_theta": 100.0, "original_max_position_embeddings": 64, "beta_fast": 6.0}
MOE = dict(intermediate_size=20, num_local_experts=4, num_experts_per_tok=2, head_dim=12)
LORA = dict(
    r=2, lora_alpha=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
    target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
)

FIXTURES = {
    "gpt-oss": Fixture(
        GptOssConfig, dict(**MOE, sliding_window=5, swiglu_limit=1.5, rope_parameters=CLOSE_YARN),
        torch.bfloat16, lora=LORA, full_gradients=True,
        switched_off=(
            dict(sliding_window=64), dict(swiglu_limit=7.0), dict(rope_parameters={**CLOSE_YARN, "truncate": True}),
            dict(num_experts_per_tok=3),
        ),
    ),
    "gpt-oss-mxfp4-hub": Fixture(
        GptOssConfig,
        {**MOE, "intermediate_size": 64, "head_dim": 16, "num_local_experts": 3, "sliding_window": 4,
         "rope_parameters": YARN, "num_key_value_heads": 1},
        torch.bfloat16, lora=LORA, edits=(mxfp4_experts, hub_keys), switched_off=(dict(sliding_window=64),),
    ),
    # Without the keys the window is 128, the limit 7, and the even layers slide.
    "gpt-oss-defaults": Fixture(
        GptOssConfig, dict(**MOE, tie_word_embeddings=True, attention_bias=False, rope_parameters=YARN), torch.bfloat16,
        lengths=(7, 133, 4), lora=LORA, edits=(without_keys("sliding_window", "swiglu_limit", "layer_types", "rope_parameters"),),
        switched_off=(dict(sliding_window=127),),
    ),
}
