"""What transformers' routers choose, weigh and pass gradients through: crates/pmetal-ops/tests/fixtures/routing.json.

    python -m parity.routing        (in scripts/, with scripts/requirements.txt)

Each router gets the identity as its weight, so that what goes in are its logits. For each: the logits, the chosen experts of each token in the
order of their numbers, their weights, and the gradient in the logits of `sum(weights * dweights)`. Last, losses of `load_balancing_loss_func`.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.granitemoe.modeling_granitemoe import GraniteMoeTopKRouter
from transformers.models.llama4.modeling_llama4 import Llama4Router
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter, load_balancing_loss_func
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

OUT = Path(__file__).resolve().parents[2] / "crates/pmetal-ops/tests/fixtures/routing.json"
TOKENS = 7


def config(experts, top_k, **more):
    return SimpleNamespace(
        num_experts=experts, num_local_experts=experts, num_experts_per_tok=top_k, hidden_size=experts, **more
    )


def dense_of(router, logits):
    """Weights of all experts, zero where they are not chosen."""
    if isinstance(router, Llama4Router):
        return router(logits)[0]
    _, weights, experts = router(logits)
    return torch.zeros_like(logits).scatter(1, experts, weights)


def case(router, spec):
    experts, top_k = spec["experts"], spec["top_k"]
    router.weight.data = torch.eye(experts)
    torch.manual_seed(experts * 10 + top_k)
    logits = (2 * torch.randn(TOKENS, experts)).requires_grad_()
    dense = dense_of(router, logits)
    chosen = (dense.detach() != 0).nonzero()[:, 1].reshape(TOKENS, top_k)
    dweights = torch.randn(TOKENS, top_k)
    weights = dense.gather(1, chosen)
    (weights * dweights).sum().backward()
    tensors = dict(logits=logits, chosen=chosen, weights=weights, dweights=dweights, gradient=logits.grad)
    return {**spec, **{name: tensor.detach().flatten().tolist() for name, tensor in tensors.items()}}


def deepseek(experts, top_k, groups, kept, renormalise):
    options = dict(n_group=groups, topk_group=kept, norm_topk_prob=renormalise, routed_scaling_factor=2.5)
    router = DeepseekV3TopkRouter(config(experts, top_k, **options))
    torch.manual_seed(3)
    router.e_score_correction_bias = torch.randn(experts)
    return case(router, dict(
        name="deepseek_v3", experts=experts, top_k=top_k, scoring="sigmoid", renormalise=renormalise, scale=2.5, groups=[groups, kept],
        bias=router.e_score_correction_bias.tolist(),
    ))


def plain(name, router, experts, top_k, scoring, renormalise):
    return case(router, dict(name=name, experts=experts, top_k=top_k, scoring=scoring, renormalise=renormalise, scale=1.0))


def balance(layers, tokens, experts, top_k):
    torch.manual_seed(layers)
    logits = [torch.randn(tokens, experts).requires_grad_() for _ in range(layers)]
    loss = load_balancing_loss_func(tuple(logits), experts, top_k)
    loss.backward()
    flat = lambda tensors: [t.detach().flatten().tolist() for t in tensors]
    return dict(experts=experts, top_k=top_k, logits=flat(logits), loss=loss.item(), gradients=flat([t.grad for t in logits]))


gpt_oss = GptOssTopKRouter(config(6, 3))
gpt_oss.bias.data = torch.zeros(6)
routers = [
    plain("mixtral", MixtralTopKRouter(config(5, 2)), 5, 2, "softmax", True),
    plain("qwen3_moe, renormalised", Qwen3MoeTopKRouter(config(8, 3, norm_topk_prob=True)), 8, 3, "softmax", True),
    plain("qwen3_moe", Qwen3MoeTopKRouter(config(9, 4, norm_topk_prob=False)), 9, 4, "softmax", False),
    plain("granitemoe", GraniteMoeTopKRouter(config(7, 7)), 7, 7, "softmax", True),
    plain("gpt_oss", gpt_oss, 6, 3, "softmax", True),
    plain("llama4, one expert", Llama4Router(config(4, 1)), 4, 1, "sigmoid", False),
    plain("llama4, two experts", Llama4Router(config(6, 2)), 6, 2, "sigmoid", False),
    deepseek(12, 3, 4, 2, True),
    deepseek(10, 4, 2, 1, False),
    deepseek(6, 2, 1, 1, True),
]
losses = [balance(1, 9, 5, 2), balance(3, 6, 8, 1), balance(2, 11, 4, 3)]
OUT.parent.mkdir(parents=True, exist_ok=True)
OUT.write_text(json.dumps(dict(routers=routers, losses=losses)) + "\n")
