"""Distillation from other weights of the same model: what they make of a batch is a target beside the batch's own.

Hinton et al. 2015 (arXiv 1503.02531), of the K likeliest tokens alone, whose probabilities are scaled to a sum of 1:
the whole distribution of every token of a step would be far more than the step's activations. What is left out biases
the target towards the likeliest tokens (Anshumann et al. 2025, arXiv 2503.16870); with K = 64 that is little where the
model is sure. There is no second model: the engine computes with the teacher's weights for one pass without gradients
(`engine.parallel.zero.other_weights`), and then trains on the same micro-batches in the same order.

Legend: N rows (tokens), C rows at a time, D width, V vocabulary (local), K likeliest tokens.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator

import torch
from torch.nn import functional as F

from engine.parallel.collectives import gather_along
from engine.parallel.cross_entropy import SoftTargets
from engine.parallel.functions import LinearCrossEntropy
from engine.parallel.groups import Group
from engine.plan.logits import rows_at_a_time


class DistilledCrossEntropy:
    """The loss over the vocabulary of a model that is its own teacher; plain cross entropy outside of `teaching`.

    `loss` is the one of the layout (`linear_cross_entropy`, or that of tensor ranks). Heads call it once for each
    micro-batch, in order, so that what the teacher said of one meets that micro-batch again.
    """

    def __init__(self, loss: LinearCrossEntropy, group: Group) -> None:
        self._loss, self._group = loss, group
        self._top_k: int | None = None
        self._strength = 0.0
        self._soft: deque[tuple[torch.Tensor, torch.Tensor]] = deque()
        self._sums: torch.Tensor | None = None

    @contextlib.contextmanager
    def teaching(self, top_k: int, strength: float) -> Iterator[None]:
        """Take the model's likeliest tokens as targets of the next micro-batches; they are learned after it."""
        assert not self._soft, "the targets of a step are used in that step"
        self._top_k, self._strength = top_k, strength
        try:
            yield
        finally:
            self._top_k = None

    def take_sums(self) -> torch.Tensor:
        """Return (weighted divergence, weight), fp64, of the micro-batches learned since the last call; 0 on a pipeline
        stage without the head."""
        found, self._sums = self._sums, None
        return torch.zeros(2, dtype=torch.float64) if found is None else found.double()

    def __call__(
        self,
        hidden: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets: torch.Tensor,
        weights: torch.Tensor,
        vocab_size: int,
        **options: torch.Tensor,
    ) -> torch.Tensor:
        """Compute `linear_cross_entropy`, with the gradient of the divergence where the teacher was asked before;
        `options` are its `into` and `smoothing`."""
        given = (hidden, weight_VD, bias_V, targets, weights, vocab_size)
        if self._top_k is not None:
            self._soft.append(_top_k(hidden, weight_VD, bias_V, vocab_size, self._top_k, self._group))
            return hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        if not self._soft:
            return self._loss(*given, **options)
        if self._sums is None:
            self._sums = hidden.new_zeros(2, dtype=torch.float32)
        divergence, weight = self._sums.unbind()
        weight += weights.sum()
        return self._loss(
            *given, **options, soft=SoftTargets(*self._soft.popleft(), self._strength), divergence=divergence
        )


@torch.no_grad()
def _top_k(
    hidden: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, vocab_size: int, k: int, group: Group
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the K likeliest tokens (int32) of each row and their probabilities (fp32), scaled to a sum of 1.

    Collective over `group`, of which each rank has a part of the vocabulary.
    """
    hidden_ND = hidden.flatten(0, -2)
    num_columns, first_column = len(weight_VD), group.position * len(weight_VD)
    real = max(min(vocab_size - first_column, num_columns), 0)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    tokens_NK = torch.empty(len(hidden_ND), k, dtype=torch.int32, device=hidden.device)
    probabilities_NK = torch.empty(len(hidden_ND), k, dtype=wide, device=hidden.device)
    size = rows_at_a_time(num_columns)
    for start in range(0, len(hidden_ND), size):
        rows = slice(start, start + size)
        logits_CV = F.linear(hidden_ND[rows], weight_VD, bias_V).to(wide)
        logits_CV[:, real:] = -torch.inf
        # A rank may have fewer columns than K: filled up with what nobody chooses.
        best_CK, columns_CK = logits_CV.topk(min(k, num_columns), dim=-1)
        missing = (0, k - best_CK.size(1))
        best_CK, columns_CK = F.pad(best_CK, missing, value=-torch.inf), F.pad(columns_CK + first_column, missing)
        # (C, K) of each rank -> (C, ranks x K), of which the best K
        best_CK, columns_CK = gather_along(best_CK, group, 1), gather_along(columns_CK, group, 1)
        best_CK, order_CK = best_CK.topk(k, dim=-1)
        tokens_NK[rows] = columns_CK.gather(1, order_CK).int()
        probabilities_NK[rows] = best_CK.softmax(-1)
    return tokens_NK, probabilities_NK
