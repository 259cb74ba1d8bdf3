"""One checkpoint of the parity tests: how it is configured and stored, and what is expected of it."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from parity.lora import ALL_LINEAR

SIZES = dict(
    hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=96,
    max_position_embeddings=256, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2,
)


@dataclass
class Fixture:
    """`config` is a class of transformers, `changes` what its instance has beside or in place of `SIZES`."""

    config: type
    changes: dict = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    lengths: tuple = (7, 13, 4)
    max_shard_size: str = "5GB"
    weights_of: str | None = None
    """Another fixture, made before, whose weights these are."""
    model: type | None = None
    """The class that is saved and read, where it isn't the one AutoModelForCausalLM picks."""
    fused: bool = False
    """Experts as transformers holds them, not one by one as the hub has them."""
    edits: tuple[Callable, ...] = ()
    """What is done to the saved folder, one after the other; see `layouts.py`."""
    switched_off: tuple[dict, ...] = ()
    """Changes of the configuration, each of which must change the logits: that its setting acts."""
    lora: dict = field(default_factory=lambda: dict(r=2, lora_alpha=4, target_modules=ALL_LINEAR))
    apart: bool = False
    """The loss is of each row alone: frequencies that depend on the length would be those of the padded batch."""
    full_gradients: bool = False
    rslora: bool = False
    per_expert: bool = False
    """Carries an adapter from before experts were fused, one pair of matrices for each projection of each expert."""
    norms_around: float = 1.0
    """The mean of the norms' weights: 0 where a norm multiplies by 1 + w."""
    seed: int | None = None

    def first_seed(self, name):
        return zlib.crc32(name.encode()) % 100_000 if self.seed is None else self.seed

    def configuration(self, changes=None):
        """An instance with `changes` on top, `None` for the fixture's own."""
        known = {key: value for key, value in SIZES.items() if key in self.config.__dataclass_fields__}
        merged = {**known, **self.changes, "initializer_range": 0.3}
        if "text_config" in merged:
            inner = {**SIZES, **merged["text_config"], "initializer_range": 0.3}
            merged = {**self.changes, "text_config": {**inner, **(changes or {})}}
            return self.config(**merged)
        return self.config(**{**merged, **(changes or {})})


@torch.no_grad()
def randomise(model, seed, norms_around=1.0):
    """Weights large enough that logits are far from flat; norms far from one; biases, sinks and stored buffers far from zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name and not name.endswith("bias"):
            parameter.data = norms_around + 0.4 * noise
        else:
            parameter.data = (1.0 if name.endswith("sinks") else 0.3) * noise
    stored = model.state_dict()
    for name, buffer in model.named_buffers():
        if name in stored:
            buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))
