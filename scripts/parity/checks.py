"""What a fixture must show to be worth having: no choice that rounding could turn, no setting without an effect."""

from contextlib import contextmanager

import torch

MASKED = -1e30


class NearTie(Exception):
    """Two candidates are so close that rounding may turn the choice between them: take other weights."""


@contextmanager
def refusing_near_ties(margin=2e-4):
    """Every top-k taken inside, be it of experts, of groups or of tokens, leaves `margin` to the best one that isn't taken."""
    plain, method = torch.topk, torch.Tensor.topk

    def checked(scores, k, dim=-1, **options):
        if k < scores.shape[dim]:
            best = plain(scores.detach().float(), k + 1, dim=dim).values
            last, next_ = best.narrow(dim, k - 1, 1), best.narrow(dim, k, 1)
            if ((last - next_ < margin) & (next_ > MASKED)).any():
                raise NearTie
        return plain(scores, k, dim=dim, **options)

    torch.topk = torch.Tensor.topk = checked
    try:
        yield
    finally:
        torch.topk, torch.Tensor.topk = plain, method


def assert_switches_act(spec, load, rows, logits):
    """Each of `spec.switched_off` changes the logits of some row by more than a hundredth of the largest."""
    for changes in spec.switched_off:
        other = load(spec.configuration(changes))
        with torch.no_grad():
            gaps = [(other(row[None]).logits[0] - want).abs().max() / want.abs().max() for row, want in zip(rows, logits)]
        assert max(gaps) > 1e-2, f"{changes} changes nothing: {max(gaps):e}"
