"""Distillation from other weights of the same model: what they make of a batch is a target beside the batch's own.

Hinton et al. 2015 (arXiv 1503.02531), of the K likeliest tokens alone, whose probabilities are scaled to a sum of 1:
the whole distribution of every token of a step would be far more than the step's activations. What is left out biases
the target towards the likeliest tokens (Anshumann et al. 2025, arXiv 2503.16870); with K = 64 that is little where the
model is sure. Of a task's labels, which are few, all are kept. There is no second model: the engine computes with the
teacher's weights for one pass without gradients (`engine.parallel.zero.other_weights`), and then trains on the same
micro-batches in the same order.

Legend: N rows (tokens), C rows at a time, D width, V vocabulary (local), K likeliest tokens.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch.nn import functional as F

from engine.parallel.collectives import gather_along
from engine.parallel.cross_entropy import SoftTargets
from engine.parallel.functions import LinearCrossEntropy
from engine.parallel.groups import Group
from engine.parallel.label_cross_entropy import label_cross_entropy, log_softmax
from engine.plan.logits import rows_at_a_time

Soft = TypeVar("Soft")


class _Taught(Generic[Soft]):
    """A loss that has targets of a teacher beside its own; a plain one outside of `teaching`.

    Heads call it once for each micro-batch, in order: what the teacher said of one meets that micro-batch again.
    """

    def __init__(self) -> None:
        self._is_asked, self._strength = False, 0.0
        self._soft: deque[Soft] = deque()
        self._divergence: torch.Tensor | None = None

    @contextlib.contextmanager
    def teaching(self, strength: float) -> Iterator[None]:
        """Take what the model predicts as targets of the next micro-batches; they are learned after it."""
        assert not self._soft, "the targets of a step are used in that step"
        self._is_asked, self._strength = True, strength
        try:
            yield
        finally:
            self._is_asked = False

    def take_divergence(self) -> torch.Tensor:
        """Return the weighted sum of the divergences (fp64 scalar) of the micro-batches learned since the last call; 0
        on a pipeline stage without the head."""
        found, self._divergence = self._divergence, None
        return torch.zeros((), dtype=torch.float64) if found is None else found.double()

    def _total(self, like: torch.Tensor) -> torch.Tensor:
        """Return the scalar that divergences are added to, on the device of another tensor."""
        if self._divergence is None:
            self._divergence = like.new_zeros((), dtype=torch.float32)
        return self._divergence


class DistilledLabels(_Taught[torch.Tensor]):
    """`label_cross_entropy` of a model that is its own teacher, with all labels of a prediction as targets."""

    def __call__(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        weights: torch.Tensor,
        smoothing: torch.Tensor | None = None,
        padding: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute `label_cross_entropy`, with the gradient of the divergence where the teacher was asked before."""
        loss = label_cross_entropy(logits, labels, weights, smoothing, padding)
        if self._is_asked:
            self._soft.append(log_softmax(logits, padding).detach())
        elif self._soft:
            divergence = F.kl_div(log_softmax(logits, padding), self._soft.popleft(), reduction="none", log_target=True)
            extra = divergence.sum(-1) * weights
            self._total(logits).add_(extra.detach().sum())
            loss = loss + self._strength * (extra - extra.detach())  # the gradient alone
        return loss


class DistilledCrossEntropy(_Taught[tuple[torch.Tensor, torch.Tensor]]):
    """The loss over the vocabulary of a model that is its own teacher, with the likeliest tokens as targets.

    `loss` is the one of the layout (`linear_cross_entropy`, or that of tensor ranks); `group` shares the vocabulary.
    """

    def __init__(self, loss: LinearCrossEntropy, group: Group) -> None:
        super().__init__()
        self._loss, self._group = loss, group
        self.top_k = 1
        """Number of the likeliest tokens that are kept of each prediction."""

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
        if self._is_asked:
            self._soft.append(_top_k(hidden, weight_VD, bias_V, vocab_size, self.top_k, self._group))
            return hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        if not self._soft:
            return self._loss(*given, **options)
        soft, divergence = SoftTargets(*self._soft.popleft(), self._strength), self._total(hidden)
        return self._loss(*given, **options, soft=soft, divergence=divergence)


@dataclass(frozen=True)
class DistilledLosses:
    """The losses of a model that is its own teacher: over the vocabulary, and over the labels of a task."""

    vocabulary: DistilledCrossEntropy
    labels: DistilledLabels

    @contextlib.contextmanager
    def teaching(self, top_k: int, strength: float, with_labels: bool) -> Iterator[None]:
        """Take what the model predicts, of tokens the `top_k` likeliest and of labels all or none, as targets of the
        next micro-batches."""
        self.vocabulary.top_k = top_k
        of_labels = self.labels.teaching(strength) if with_labels else contextlib.nullcontext()
        with self.vocabulary.teaching(strength), of_labels:
            yield

    def take_divergence(self) -> torch.Tensor:
        """Return the weighted sum of all divergences (fp64 scalar) since the last call."""
        return self.vocabulary.take_divergence() + self.labels.take_divergence()


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
