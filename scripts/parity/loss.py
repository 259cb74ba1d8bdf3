"""The next-token loss of the fixtures: a sum over targets, divided once."""

import torch


def pad_right(rows, value):
    width = max(len(row) for row in rows)
    return torch.stack([torch.nn.functional.pad(row, (0, width - len(row)), value=value) for row in rows])


def summed_loss(model, rows, labels):
    """Sum of next-token losses of right-padded rows, the number of targets (a label of -100 is none), and the outputs."""
    mask = pad_right([torch.ones_like(row) for row in rows], 0)
    outputs = model(input_ids=pad_right(rows, 0), attention_mask=mask)
    targets = pad_right(labels, -100)[:, 1:]
    loss = torch.nn.functional.cross_entropy(
        outputs.logits[:, :-1].transpose(1, 2), targets, ignore_index=-100, reduction="sum"
    )
    return loss, int((targets != -100).sum()), outputs


def padded_loss(model, rows):
    """Mean loss where every token but the first of its row is a target, and the routers' loss where the config asks for it.

    The mean has the routers' loss in it, as transformers' own has: times the config's coefficient.
    """
    total, targets, outputs = summed_loss(model, rows, rows)
    config = model.config.get_text_config()
    if not getattr(config, "output_router_logits", False):
        return total / targets, None
    return total / targets + config.router_aux_loss_coef * outputs.aux_loss, outputs.aux_loss


def loss_of_rows_apart(model, rows):
    """The same mean where no row sees the length of another."""
    parts = [summed_loss(model, [row], [row])[:2] for row in rows]
    return sum(total for total, _ in parts) / sum(targets for _, targets in parts), None
