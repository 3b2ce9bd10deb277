"""Cross entropy of labels: of so few that a rank has all of their logits, unlike those over the vocabulary.

Legend: C labels of a prediction, which may be the tokens of a row.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F


def label_cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor,
    smoothing: torch.Tensor | None = None,
    padding: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return weight x cross entropy of each prediction, in the dtype of the logits.

    `logits` is (..., C), `labels` (int64) and `weights` have its shape without C. `smoothing`, of the shape of the
    labels, is the share of a label's weight that is spread evenly over all labels, the given one among them (Szegedy et
    al. 2016, section 7); None means as they are. `padding` (..., C) is true for what is no label of a prediction.
    """
    if padding is not None:
        logits = logits.masked_fill(padding, -torch.inf)
    loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none").view_as(labels)
    if smoothing is not None:
        num_labels = logits.size(-1) if padding is None else (~padding).sum(-1)
        loss = torch.lerp(loss, -log_softmax(logits, padding).sum(-1) / num_labels, smoothing.to(loss.dtype))
    return loss * weights


def log_softmax(logits: torch.Tensor, padding: torch.Tensor | None = None) -> torch.Tensor:
    """Return the logarithm of the softmax over the last dim, in which `padding` (true) has no part: it is 0 there."""
    if padding is None:
        return logits.log_softmax(-1)
    return logits.masked_fill(padding, -torch.inf).log_softmax(-1).masked_fill(padding, 0.0)
