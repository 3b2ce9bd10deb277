"""Output projection and cross entropy in one function, a few rows at a time: the logits of a batch never exist.

For a vocabulary far wider than the model, logits are the largest tensor of a training step. The projection, the
softmax and both gradients of some rows are computed together in the forward pass, which keeps the gradients of the
input and of the weight for the backward pass (Hsu et al. 2024, Liger Kernel, section 3.2, in plain torch; Wijmans
et al. 2024, Cut Cross-Entropy, keep less and compute the logits once more). The backward pass only scales them, so the
scale may differ at each step. Under ZeRO-3 the weight is needed in the forward pass alone.

Legend: B batch, T time, D width, N rows (tokens), C rows at a time, V vocabulary (the local part, with its padding),
K likeliest tokens of a teacher.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from engine.parallel.collectives import all_reduce
from engine.parallel.groups import ALONE, Group
from engine.plan.logits import rows_at_a_time


@dataclass(frozen=True)
class SoftTargets:
    """Distribution of a teacher over its K likeliest tokens, at each of N rows."""

    tokens_NK: torch.Tensor
    """int32, columns of the whole vocabulary."""
    probabilities_NK: torch.Tensor
    """fp32 or wider, of sum 1."""
    strength: float
    """Factor of the divergence from them, beside the cross entropy."""


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    targets: torch.Tensor,
    weights: torch.Tensor,
    vocab_size: int,
    group: Group = ALONE,
    into: torch.Tensor | None = None,
    smoothing: torch.Tensor | None = None,
    soft: SoftTargets | None = None,
    divergence: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the sum over tokens of weight x cross entropy of `hidden @ weight_VD.T + bias_V`, in fp32 or wider.

    `hidden` is (..., D), `targets` (int64) and `weights` have its shape without D. Columns from `vocab_size` on never
    enter the softmax. Softmax and sums are in fp32, the weight's gradient too until all rows are in it.

    Over more than one rank each holds V consecutive rows of the weight, and the result is equal on all of them. The
    gradient of `hidden` is then this rank's part of a sum over `group`. Collective over `group`, in the forward pass.

    `into` (contiguous, of the shape of `targets`) is filled with the tokens' terms of the sum, which carry no gradient.

    `smoothing` (of the shape of `targets`) is the share of each target's weight that is spread evenly over the first
    `vocab_size` columns, the target's among them (Szegedy et al. 2016, section 7). None means that none is.

    With `soft` the gradient is that of the sum over tokens of weight x (cross entropy + strength x KL(soft ||
    softmax)), while the value stays that of the cross entropy; the divergences' weighted sum, without strength, is
    added to the scalar `divergence`.
    """
    return _LinearCrossEntropy.apply(  # type: ignore[no-any-return]
        hidden.flatten(0, -2),
        weight_VD,
        bias_V,
        targets.flatten(),
        weights.flatten(),
        vocab_size,
        group,
        torch.is_grad_enabled(),  # asked here: inside of a function's forward pass it is always off
        None if into is None else into.view(-1),
        None if smoothing is None else smoothing.flatten(),
        soft,
        divergence,
    )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets_N: torch.Tensor,
        weights_N: torch.Tensor,
        vocab_size: int,
        group: Group,
        differentiate: bool,
        into_N: torch.Tensor | None,
        smoothing_N: torch.Tensor | None,
        soft: SoftTargets | None,
        divergence: torch.Tensor | None,
    ) -> torch.Tensor:
        wide = torch.promote_types(hidden_ND.dtype, torch.float32)
        num_rows, first_column = len(weight_VD), group.position * len(weight_VD)
        real = max(min(vocab_size - first_column, num_rows), 1)  # one masked column where all are padding
        used_VD, used_V = weight_VD[:real], None if bias_V is None else bias_V[:real]
        total = torch.zeros((), dtype=wide, device=hidden_ND.device)
        # one by one: a frozen weight has no gradient, and neither has what frozen layers alone have made
        of_hidden, of_weight, of_bias = (differentiate and needed for needed in ctx.needs_input_grad[:3])
        gradients = _Gradients(
            torch.empty_like(hidden_ND) if of_hidden else None,
            torch.zeros_like(weight_VD, dtype=wide) if of_weight else None,
            torch.zeros_like(bias_V, dtype=wide) if of_bias and bias_V is not None else None,
        )
        size = rows_at_a_time(num_rows)
        for start in range(0, len(hidden_ND), size):
            rows = slice(start, start + size)
            hidden_CD, weights_C = hidden_ND[rows], weights_N[rows].to(wide)
            logits_CV = F.linear(hidden_CD, used_VD, used_V)  # (C, V): all of the logits that exist at a time
            # A rank with nothing but padding still joins the collectives, with a column that no softmax sees.
            if first_column >= vocab_size:
                logits_CV.fill_(-torch.inf)
            logs_CV = _log_softmax(logits_CV, wide, group)
            del logits_CV
            smoothing_C = None if smoothing_N is None else smoothing_N[rows].to(wide)
            target = _TargetColumns(targets_N[rows], first_column, real, vocab_size, smoothing_C)
            # One rank has the target's log-probability, the others add 0; with smoothing each adds its columns' share.
            weighted_C = all_reduce(target.logs(logs_CV), group) * weights_C
            total -= weighted_C.sum()
            if into_N is not None:
                into_N[rows] = -weighted_C
            near = None if soft is None else _SoftColumns(soft, rows, first_column, real)
            if near is not None and divergence is not None:
                divergence += (near.divergence(logs_CV, group) * weights_C).sum()
            if gradients.hidden_ND is gradients.weight_VD is gradients.bias_V is None:
                del logs_CV
                continue
            # d loss / d logits = weight x (softmax - the target's distribution), made in place of the log-softmax.
            wide_CV = logs_CV.exp_()
            if near is not None:
                # and strength x weight x (softmax - soft targets)
                near.add_gradient(wide_CV)
            target.subtract(wide_CV)
            gradients.add(rows, wide_CV.mul_(weights_C.unsqueeze(-1)), hidden_CD, used_VD)
            del logs_CV, wide_CV  # before the logits of the next rows
        ctx.save_for_backward(*gradients)
        ctx.dtypes = hidden_ND.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        # In place, which spares a copy of each: torch refuses a second backward pass, which would find them scaled.
        scaled = (
            None if held is None else held.mul_(grads[0]).to(dtype)
            for held, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *scaled, *[None] * 9


class _Gradients(NamedTuple):
    """Gradients of a projection's input, weight and bias, as far as they are wanted; else None."""

    hidden_ND: torch.Tensor | None
    weight_VD: torch.Tensor | None
    bias_V: torch.Tensor | None

    def add(self, rows: slice, wide_CV: torch.Tensor, hidden_CD: torch.Tensor, used_VD: torch.Tensor) -> None:
        """Add what follows from the gradient of the logits of some rows, over the first columns of the vocabulary."""
        grad_CV, real = wide_CV.to(hidden_CD.dtype), len(used_VD)
        # Of this rank's columns only, so the hidden states' gradient is a part of a sum over the group.
        if self.hidden_ND is not None:
            torch.mm(grad_CV, used_VD, out=self.hidden_ND[rows])
        if self.weight_VD is not None:
            _add_product(self.weight_VD[:real], grad_CV.T, hidden_CD)
        if self.bias_V is not None:
            self.bias_V[:real] += wide_CV.sum(0)


class _TargetColumns:
    """Targets of some rows, as columns of this rank's part of the vocabulary; a share of each is spread over all."""

    def __init__(
        self,
        targets_C: torch.Tensor,
        first_column: int,
        real: int,
        vocab_size: int,
        smoothing_C: torch.Tensor | None,
    ) -> None:
        # Rank 1 of two with V = 100 holds columns 100 to 199: target 130 is its column 30, target 7 is foreign.
        columns_C = targets_C - first_column
        self.foreign_C = (columns_C < 0) | (columns_C >= real)
        self.columns_C1 = columns_C.masked_fill(self.foreign_C, 0).unsqueeze(-1)
        self.smoothing_C, self.vocab_size = smoothing_C, vocab_size
        self.is_padding = first_column >= vocab_size

    def logs(self, logs_CV: torch.Tensor) -> torch.Tensor:
        """Return the mean of the log-probabilities under each target's distribution (C,), as far as this rank has its
        columns."""
        logs_C = logs_CV.gather(-1, self.columns_C1).squeeze(-1).masked_fill(self.foreign_C, 0.0)
        if self.smoothing_C is None:
            return logs_C
        # a rank of padding alone has no column of the vocabulary, but -inf in the one that it computes
        mean_C = torch.zeros_like(logs_C) if self.is_padding else logs_CV.sum(-1) / self.vocab_size
        return torch.lerp(logs_C, mean_C, self.smoothing_C)

    def subtract(self, softmax_CV: torch.Tensor) -> None:
        """Turn softmax into softmax - the target's distribution, in place."""
        # Where the target is foreign, 0 is added to column 0, so that no row needs a branch.
        ones_C1 = (~self.foreign_C).to(softmax_CV.dtype).unsqueeze(-1)
        if self.smoothing_C is None:
            softmax_CV.scatter_add_(-1, self.columns_C1, -ones_C1)
            return
        share_C1 = self.smoothing_C.unsqueeze(-1)
        softmax_CV.scatter_add_(-1, self.columns_C1, -ones_C1 * (1.0 - share_C1))
        if not self.is_padding:
            softmax_CV.sub_(share_C1 / self.vocab_size)


class _SoftColumns:
    """Soft targets of some rows, as columns of this rank's part of the vocabulary."""

    def __init__(self, soft: SoftTargets, rows: slice, first_column: int, real: int) -> None:
        columns_CK = soft.tokens_NK[rows].long() - first_column
        foreign_CK = (columns_CK < 0) | (columns_CK >= real)
        self.strength, self.probabilities_CK = soft.strength, soft.probabilities_NK[rows]
        # As with the target: a foreign token adds 0 to column 0.
        self.columns_CK = columns_CK.masked_fill(foreign_CK, 0)
        self.own_CK = self.probabilities_CK.masked_fill(foreign_CK, 0.0)

    def divergence(self, logs_CV: torch.Tensor, group: Group) -> torch.Tensor:
        """Return KL(soft targets || softmax) of each row (C,). Collective over `group`."""
        # xlogy: 0 where the probability is 0
        entropy_C = -torch.xlogy(self.probabilities_CK, self.probabilities_CK).sum(-1)
        logs_CK = logs_CV.gather(-1, self.columns_CK)
        # a rank of padding alone has -inf everywhere, which times 0 would be NaN
        cross_C = (self.own_CK * logs_CK.masked_fill(self.own_CK == 0, 0.0)).sum(-1)
        return -all_reduce(cross_C, group) - entropy_C

    def add_gradient(self, softmax_CV: torch.Tensor) -> None:
        """Turn softmax into softmax + strength x (softmax - soft targets), in place."""
        softmax_CV.mul_(1.0 + self.strength).scatter_add_(-1, self.columns_CK, -self.strength * self.own_CK)


def _log_softmax(logits_CV: torch.Tensor, dtype: torch.dtype, group: Group) -> torch.Tensor:
    """Return the logarithm of the softmax over all columns of the group, for the columns on this rank."""
    if group.size == 1:
        return torch.log_softmax(logits_CV, -1, dtype=dtype)
    shifted_CV = logits_CV.to(dtype)
    # log softmax = x - max - log(sum(exp(x - max))), with maximum and sum over the columns of all ranks.
    shifted_CV = shifted_CV - all_reduce(shifted_CV.amax(-1), group, "max").unsqueeze(-1)
    total_C = all_reduce(shifted_CV.exp().sum(-1), group)
    return shifted_CV.sub_(total_C.log_().unsqueeze(-1))


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Compute `total += a @ b`, where the total may be of a wider dtype."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)  # no product in memory; torch has no such operation for two dtypes
    else:
        total += a @ b
