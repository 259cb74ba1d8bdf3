"""Gemma 2 and 3."""

import torch
from transformers import Gemma2Config, Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig

from parity.fixture import Fixture
from parity.layouts import edit_json, hub_keys, old_spelling, renamed_weights, with_keys, without_keys
from parity.lora import ALL_LINEAR

GEMMA2 = dict(
    num_hidden_layers=3, head_dim=12, query_pre_attn_scalar=20, sliding_window=5, attn_logit_softcapping=2.0,
    final_logit_softcapping=3.0,
)


def ropes(theta, local, **scaling):
    kind = dict(rope_type="linear", **scaling) if scaling else dict(rope_type="default")
    return dict(rope_parameters=dict(
        full_attention=dict(rope_theta=theta, **kind), sliding_attention=dict(rope_type="default", rope_theta=local)
    ))


# Layer 2 of four is global.
GEMMA3 = dict(
    num_hidden_layers=4, intermediate_size=24, head_dim=12, query_pre_attn_scalar=20, sliding_window=4,
    sliding_window_pattern=3, final_logit_softcapping=3.0, attn_logit_softcapping=2.0, **ropes(5000.0, 100.0, factor=8.0),
)
# The whole model has no caps, whatever its file says.
UNCAPPED = dict(final_logit_softcapping=None, attn_logit_softcapping=None)
SPARSE = dict(
    hidden_size=16, intermediate_size=24, num_attention_heads=2, num_key_value_heads=1, sliding_window=5,
    **ropes(1e6, 1e4, factor=8.0),
)
DEFAULTS = (
    "head_dim", "query_pre_attn_scalar", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings",
    "hidden_activation", "attention_bias", "attention_dropout", "final_logit_softcapping", "attn_logit_softcapping",
    "use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "use_bidirectional_attention", "initializer_range",
)
VISION = dict(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4,
              vision_use_head=False)
WHOLE = dict(vision_config=VISION, mm_tokens_per_image=4, boi_token_index=90, eoi_token_index=91, image_token_index=92)
LANGUAGE_LORA = dict(r=2, lora_alpha=4, target_modules=rf".*language_model.*\.({'|'.join(ALL_LINEAR)})")
HUB_NAMES = renamed_weights(
    (r"^model\.language_model\.", "language_model.model."), (r"^language_model\.(?!model\.|lm_head)", "language_model.model."),
    (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
    (r"^vision_tower\.(?!vision_model)", "vision_tower.vision_model."),
)
NEW_NAMES = renamed_weights(
    (r"^language_model\.model\.", "model.language_model."), (r"^language_model\.", "model.language_model."),
    (r"^(vision_tower|multi_modal_projector)\.", r"model.\1."),
)


def sparse_text(folder):
    """A text_config as that of gemma-3-4b: what equals the class's defaults is left out."""
    def change(config):
        text = config["text_config"]
        old_spelling(text, version="4.50.0.dev0")
        del text["rope_theta"], text["rope_local_base_freq"]
        for key in DEFAULTS:
            text.pop(key, None)
        config["torch_dtype"] = config.pop("dtype")
        config["eos_token_id"] = [2, 95]
        config.pop("tie_word_embeddings", None)
    edit_json(folder, change)


FIXTURES = {
    "gemma2": Fixture(
        Gemma2Config, GEMMA2, torch.bfloat16, norms_around=0.0, full_gradients=True,
        switched_off=(
            dict(sliding_window=64), dict(attn_logit_softcapping=None), dict(final_logit_softcapping=None),
            dict(query_pre_attn_scalar=12),
        ),
    ),
    "gemma2-hub": Fixture(
        Gemma2Config,
        dict(
            num_hidden_layers=4, head_dim=16, query_pre_attn_scalar=16, sliding_window=3, hidden_size=40,
            final_logit_softcapping=None, attn_logit_softcapping=3.0, intermediate_size=24, attention_bias=True,
        ),
        torch.bfloat16, norms_around=0.0, max_shard_size="40KB",
        edits=(hub_keys, with_keys(hidden_act="gelu_pytorch_tanh", sliding_window_size=3), without_keys("tie_word_embeddings")),
        switched_off=(dict(sliding_window=64), dict(attn_logit_softcapping=None)),
    ),
    # A cap of scores in the file is not used.
    "gemma3-text": Fixture(
        Gemma3TextConfig, GEMMA3, torch.bfloat16, norms_around=0.0,
        switched_off=(
            dict(sliding_window=64), dict(final_logit_softcapping=None), ropes(5000.0, 100.0), ropes(5000.0, 5000.0, factor=8.0),
            ropes(100.0, 100.0, factor=8.0), dict(sliding_window_pattern=2),
        ),
    ),
    "gemma3-text-pattern-hub": Fixture(
        Gemma3TextConfig, GEMMA3, torch.bfloat16, norms_around=0.0, weights_of="gemma3-text",
        edits=(hub_keys, with_keys(sliding_window_pattern=3)),
    ),
    # Seven layers with the pattern of the class: layer 5 is global.
    "gemma3-text-hub": Fixture(
        Gemma3TextConfig,
        dict(
            num_hidden_layers=7, intermediate_size=20, head_dim=8, query_pre_attn_scalar=10, sliding_window=3,
            num_key_value_heads=1, tie_word_embeddings=False, **ropes(1000.0, 50.0),
        ),
        torch.bfloat16, norms_around=0.0, edits=(hub_keys,),
        switched_off=(dict(sliding_window=64), dict(sliding_window_pattern=5)),
    ),
    "gemma3-hub": Fixture(
        Gemma3Config, dict(**WHOLE, text_config=dict(SPARSE, rms_norm_eps=1e-6)), torch.bfloat16, norms_around=0.0,
        model=Gemma3ForConditionalGeneration, edits=(HUB_NAMES, sparse_text), lora=LANGUAGE_LORA,
        switched_off=(dict(sliding_window=64),),
    ),
    "gemma3-new-names": Fixture(
        Gemma3Config,
        dict(**WHOLE, text_config={**GEMMA3, **UNCAPPED, "num_hidden_layers": 3}), torch.bfloat16,
        norms_around=0.0, model=Gemma3ForConditionalGeneration, edits=(NEW_NAMES,), lora=LANGUAGE_LORA,
        switched_off=(dict(sliding_window=64),),
    ),
}
