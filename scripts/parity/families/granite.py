"""Granite 3, dense and with experts."""

import torch
from transformers import GraniteConfig, GraniteMoeConfig

from parity.fixture import Fixture
from parity.layouts import hub_keys, without_keys
from parity.lora import ALL_LINEAR

MULTIPLIERS = dict(embedding_multiplier=3.0, residual_multiplier=0.37, attention_multiplier=0.6, logits_scaling=1.7)
OFF = tuple({key: 1.0} for key in MULTIPLIERS)
MOE = dict(**MULTIPLIERS, intermediate_size=20, num_local_experts=5, num_experts_per_tok=2)
MOE_LORA = dict(
    r=2, lora_alpha=4, target_modules=ALL_LINEAR[:4],
    target_parameters=["block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj"],
)

FIXTURES = {
    "granite": Fixture(GraniteConfig, MULTIPLIERS, torch.bfloat16, switched_off=OFF),
    "granite-tied-hub": Fixture(
        GraniteConfig,
        dict(
            embedding_multiplier=12, residual_multiplier=0.22, attention_multiplier=0.0781, logits_scaling=8,
            tie_word_embeddings=True, attention_bias=True, mlp_bias=True, num_key_value_heads=1, hidden_size=40,
        ),
        torch.bfloat16, edits=(hub_keys,), switched_off=OFF,
    ),
    "granitemoe": Fixture(GraniteMoeConfig, MOE, torch.bfloat16, lora=MOE_LORA, switched_off=OFF),
    "granitemoe-tied-hub": Fixture(
        GraniteMoeConfig,
        {**MOE, "tie_word_embeddings": True, "num_local_experts": 6, "num_experts_per_tok": 3, "attention_bias": True,
         "output_router_logits": True, "router_aux_loss_coef": 0.2},
        torch.bfloat16, lora=MOE_LORA, edits=(hub_keys,), switched_off=OFF,
    ),
    "granitemoe-fused": Fixture(
        GraniteMoeConfig, MOE, torch.bfloat16, lora=MOE_LORA, fused=True, weights_of="granitemoe",
        edits=(without_keys("router_aux_loss_coef"),),
    ),
}
