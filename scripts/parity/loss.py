"""The next-token loss of the fixtures: a sum over targets, divided once."""

import torch


def pad_right(rows, value):
    width = max(len(row) for row in rows)
    return torch.stack([torch.nn.functional.pad(row, (0, width - len(row)), value=value) for row in rows])


def summed_loss(model, rows, labels):
    """Sum of next-token losses of right-padded rows, and the number of targets; a label of -100 is no target."""
    mask = pad_right([torch.ones_like(row) for row in rows], 0)
    logits = model(input_ids=pad_right(rows, 0), attention_mask=mask).logits
    targets = pad_right(labels, -100)[:, 1:]
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), targets, ignore_index=-100, reduction="sum"
    )
    return loss, int((targets != -100).sum())


def padded_loss(model, rows):
    """Mean loss where every token but the first of its row is a target."""
    total, targets = summed_loss(model, rows, rows)
    return total / targets
