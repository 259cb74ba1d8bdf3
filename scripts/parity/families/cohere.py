"""Command R, R+ and R7B."""

import torch
from transformers import Cohere2Config, CohereConfig

from parity.fixture import Fixture
from parity.layouts import hub_keys, without_keys

THETA = dict(rope_parameters=dict(rope_type="default", rope_theta=500.0))
FULL, SLIDING = "full_attention", "sliding_attention"

FIXTURES = {
    # One weight of each q and k norm for each head.
    "cohere": Fixture(
        CohereConfig, dict(use_qk_norm=True, logit_scale=0.3, layer_norm_eps=1e-3, **THETA), torch.bfloat16,
        full_gradients=True, switched_off=(dict(use_qk_norm=False), dict(logit_scale=1.0)),
    ),
    "cohere-untied-hub": Fixture(
        CohereConfig,
        dict(
            logit_scale=0.7, tie_word_embeddings=False, attention_bias=True, num_key_value_heads=1, hidden_size=48,
            rope_parameters=dict(rope_type="default", rope_theta=500000.0),
        ),
        torch.bfloat16, edits=(hub_keys, without_keys("rope_theta", "rope_scaling", "use_qk_norm")),
        switched_off=(dict(logit_scale=1.0),),
    ),
    # Without a pattern every fourth layer is full: layer 3, without rope.
    "cohere2-hub": Fixture(
        Cohere2Config, dict(num_hidden_layers=5, sliding_window=4, logit_scale=0.3, intermediate_size=24, **THETA),
        torch.bfloat16, edits=(hub_keys, without_keys("head_dim", "tie_word_embeddings")),
        switched_off=(dict(sliding_window=64), dict(layer_types=[SLIDING] * 5)),
    ),
    "cohere2": Fixture(
        Cohere2Config,
        dict(
            num_hidden_layers=3, sliding_window=3, logit_scale=0.5, attention_bias=True, num_key_value_heads=4,
            layer_types=[FULL, SLIDING, FULL], **THETA,
        ),
        torch.bfloat16, max_shard_size="40KB",
        switched_off=(dict(sliding_window=64), dict(layer_types=[FULL] * 3), dict(layer_types=[SLIDING, SLIDING, FULL])),
    ),
}
