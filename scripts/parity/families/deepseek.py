"""DeepSeek V3 and V3.2."""

import torch
from transformers import DeepseekV3Config, DeepseekV32Config

from parity.fixture import Fixture
from parity.layouts import copied_layer, fp8_blocks, hub_keys, hub_keys_with_type, with_keys

YARN = dict(
    rope_type="yarn", rope_theta=500.0, factor=6.0, original_max_position_embeddings=32, beta_fast=8.0, beta_slow=1.0,
    mscale=2.0, mscale_all_dim=1.3,
)
EQUAL_MSCALES = {**YARN, "mscale": 1.3}
WITHOUT_ALL_DIM = {key: value for key, value in YARN.items() if key != "mscale_all_dim"}
PLAIN_ROPE = dict(rope_parameters=dict(rope_type="default", rope_theta=500.0))
# Keys of 10 + 6, values of 14.
LATENT = dict(
    num_attention_heads=3, num_key_value_heads=3, q_lora_rank=20, kv_lora_rank=12, qk_nope_head_dim=10, qk_rope_head_dim=6,
    v_head_dim=14,
)
EXPERTS = dict(
    moe_intermediate_size=16, n_routed_experts=8, num_experts_per_tok=3, n_group=4, topk_group=2, n_shared_experts=2,
    first_k_dense_replace=1, routed_scaling_factor=1.7, norm_topk_prob=True,
)
LORA = dict(
    r=2, lora_alpha=4,
    target_modules=[
        "q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    ],
)
# Enough heads that seldom all of them are cut off at zero: two tokens with a score of zero tie.
INDEXER = dict(index_topk=4, index_n_heads=9, index_head_dim=14)
MTP = with_keys(num_nextn_predict_layers=1)

FIXTURES = {
    "deepseek-v3": Fixture(
        DeepseekV3Config, dict(**LATENT, **EXPERTS, rope_parameters=YARN), torch.bfloat16, lora=LORA, full_gradients=True,
        switched_off=(
            dict(rope_parameters=EQUAL_MSCALES), dict(rope_parameters=WITHOUT_ALL_DIM), dict(rope_interleave=False),
            dict(topk_group=4), dict(routed_scaling_factor=1.0), dict(norm_topk_prob=False), PLAIN_ROPE,
        ),
    ),
    # q is one matrix, the rotated pairs are half-split, the latent norms have their own eps, every layer has experts.
    "deepseek-v3-plain-q": Fixture(
        DeepseekV3Config,
        {
            **LATENT, **EXPERTS, **PLAIN_ROPE, "q_lora_rank": None, "rope_interleave": False, "attention_bias": True,
            "norm_topk_prob": False, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 0,
            "n_routed_experts": 5, "num_experts_per_tok": 2, "rms_norm_eps": 1e-2,
        },
        torch.bfloat16, lora=LORA, fused=True, switched_off=(dict(rope_interleave=True), dict(norm_topk_prob=True)),
    ),
    # Matrices of 136 rows or columns have a block that is not whole; layer 2 predicts a second token and is not ours.
    "deepseek-v3-fp8-hub": Fixture(
        DeepseekV3Config,
        {**LATENT, **EXPERTS, "intermediate_size": 136, "rope_parameters": YARN, "n_shared_experts": 1},
        torch.bfloat16, lora=LORA, edits=(copied_layer(1, 2), MTP, fp8_blocks, hub_keys_with_type),
    ),
    "deepseek-v32": Fixture(
        DeepseekV32Config, dict(**LATENT, **EXPERTS, **INDEXER, rope_parameters=YARN), torch.bfloat16, lengths=(7, 23, 4),
        lora=LORA, switched_off=(dict(index_topk=64), dict(index_topk=5), PLAIN_ROPE),
    ),
    "deepseek-v32-fp8-hub": Fixture(
        DeepseekV32Config,
        {
            **LATENT, **EXPERTS, **PLAIN_ROPE, "index_topk": 6, "index_n_heads": 5, "index_head_dim": 28, "n_group": 2,
            "topk_group": 1, "n_routed_experts": 6, "num_experts_per_tok": 2, "attention_bias": True,
            "intermediate_size": 136,
        },
        torch.bfloat16, lengths=(7, 19, 4), lora=LORA, edits=(copied_layer(1, 2), MTP, fp8_blocks, hub_keys),
        switched_off=(dict(index_topk=64), dict(topk_group=2)),
    ),
}
