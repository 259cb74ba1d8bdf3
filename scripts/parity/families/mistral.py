"""Mistral and Mixtral."""

import torch
from transformers import MistralConfig, MixtralConfig

from parity.fixture import Fixture
from parity.layouts import hub_keys, without_keys

WINDOW = dict(head_dim=10, sliding_window=5)
MIXTRAL = dict(intermediate_size=20, num_local_experts=5, num_experts_per_tok=2)
MIXTRAL_LORA = dict(r=2, lora_alpha=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "w1", "w2", "w3"])

FIXTURES = {
    "mistral-window-hub": Fixture(
        MistralConfig, WINDOW, torch.bfloat16, edits=(hub_keys,), switched_off=(dict(sliding_window=None),)
    ),
    "mistral-no-window": Fixture(
        MistralConfig, dict(sliding_window=None, num_key_value_heads=1, hidden_size=48, tie_word_embeddings=True),
        torch.bfloat16, switched_off=(dict(sliding_window=5),),
    ),
    # Without the key the window is 4096.
    "mistral-window-absent-hub": Fixture(
        MistralConfig, dict(head_dim=12, num_key_value_heads=4), torch.bfloat16, max_shard_size="30KB",
        edits=(hub_keys, without_keys("sliding_window")),
    ),
    "mixtral-hub": Fixture(
        MixtralConfig, dict(**MIXTRAL, sliding_window=6), torch.bfloat16, lora=MIXTRAL_LORA, edits=(hub_keys,),
        switched_off=(dict(sliding_window=None), dict(num_experts_per_tok=3)),
    ),
    "mixtral-fused": Fixture(
        MixtralConfig, dict(**MIXTRAL, head_dim=12, output_router_logits=True, router_aux_loss_coef=0.2), torch.bfloat16,
        lora=MIXTRAL_LORA, fused=True,
    ),
}
