"""Qwen 2, 2.5 and 3, dense and with experts."""

import torch
from transformers import Qwen2Config, Qwen3Config, Qwen3MoeConfig

from parity.fixture import Fixture
from parity.layouts import hub_keys, renamed_keys, with_keys
from parity.lora import ALL_LINEAR, RANK_FOUR

MILLION = dict(rope_parameters=dict(rope_type="default", rope_theta=1e6))
WINDOW = dict(use_sliding_window=True, sliding_window=5)
MOE = dict(moe_intermediate_size=16, num_experts=5, num_experts_per_tok=2, head_dim=12, norm_topk_prob=True, **MILLION)
FULL, SLIDING = "full_attention", "sliding_attention"

FIXTURES = {
    "qwen2": Fixture(Qwen2Config, dict(num_key_value_heads=1, **MILLION), lora=RANK_FOUR, seed=1007),
    "qwen2-tied": Fixture(
        Qwen2Config, dict(tie_word_embeddings=True, **MILLION), edits=(hub_keys,), lora=RANK_FOUR, seed=1008
    ),
    "qwen3": Fixture(Qwen3Config, dict(head_dim=16, **MILLION), lora=RANK_FOUR, full_gradients=True, seed=1009),
    "qwen3-biased": Fixture(
        Qwen3Config, dict(head_dim=12, attention_bias=True, **MILLION), lora=RANK_FOUR, seed=1010
    ),
    "qwen3-tied-f16": Fixture(
        Qwen3Config, dict(head_dim=16, tie_word_embeddings=True, **MILLION), torch.float16, lora=RANK_FOUR, seed=1011,
    ),
    # Layers 1 and 2 slide.
    "qwen2-window-hub": Fixture(
        Qwen2Config, dict(**WINDOW, max_window_layers=1, num_hidden_layers=3, **MILLION), torch.bfloat16,
        edits=(hub_keys,), switched_off=(dict(use_sliding_window=False), dict(max_window_layers=2)),
    ),
    "qwen2-window-unused-hub": Fixture(
        Qwen2Config, dict(max_window_layers=1, sliding_window=5, **MILLION), torch.bfloat16,
        edits=(hub_keys, with_keys(sliding_window=5)),
        switched_off=(dict(use_sliding_window=True, max_window_layers=1),),
    ),
    # `layer_types` wins over `max_window_layers`: layer 1 slides, though 0 and 1 shouldn't.
    "qwen3-window": Fixture(
        Qwen3Config,
        dict(
            **WINDOW, head_dim=10, max_window_layers=2, num_hidden_layers=3, layer_types=[FULL, SLIDING, FULL], **MILLION
        ),
        torch.bfloat16, switched_off=(dict(layer_types=[FULL] * 3), dict(layer_types=[FULL, FULL, SLIDING])),
    ),
    "qwen3-moe": Fixture(
        Qwen3MoeConfig, MOE, torch.bfloat16, full_gradients=True, switched_off=(dict(norm_topk_prob=False),)
    ),
    "qwen3-moe-fused": Fixture(
        Qwen3MoeConfig, MOE, torch.bfloat16, fused=True, weights_of="qwen3-moe",
    ),
    # Of four layers the second alone has experts.
    "qwen3-moe-sparse-hub": Fixture(
        Qwen3MoeConfig,
        {
            **MOE, "norm_topk_prob": False, "decoder_sparse_step": 2, "mlp_only_layers": [3], "num_hidden_layers": 4,
            "num_experts": 4, "num_experts_per_tok": 3, "tie_word_embeddings": True,
        },
        torch.bfloat16, max_shard_size="40KB",
        edits=(hub_keys, renamed_keys(num_local_experts="num_experts")), switched_off=(dict(norm_topk_prob=True),),
    ),
    "qwen3-moe-window": Fixture(
        Qwen3MoeConfig, dict(**MOE, **WINDOW, attention_bias=True, num_key_value_heads=1), torch.bfloat16,
        per_expert=True, switched_off=(dict(use_sliding_window=False),),
    ),
    "qwen3-moe-router-loss": Fixture(
        Qwen3MoeConfig, dict(**MOE, output_router_logits=True, router_aux_loss_coef=0.3), torch.bfloat16,
    ),
}
