"""Tensor parallelism (Shoeybi et al. 2019, Megatron-LM): swaps the layers of a plain module for sharded ones.

`shard` walks a module that knows no process group and replaces each `Linear` and `Embedding` by the role that the
model's sharding table gives its weight. Two conjugate operators carry the communication: `_Copy` (identity forward,
sum backward) at the entrance of a column-parallel layer and `_Sum` (sum forward, identity backward) at the exit of
a row-parallel one. Activations between blocks and the parameters of norms are equal on all tensor ranks.

Legend: B batch, T time, D width, I and O features in and out, V vocabulary; O, I and V are local where a layer is
split along them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from engine.parallel.collectives import all_reduce
from engine.parallel.groups import Group
from engine.parallel.sharding import ParameterSpec


class _Copy(torch.autograd.Function):
    """Identity forward, sum over the tensor group backward (Megatron's f)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return all_reduce(grads[0].contiguous().clone(), ctx.group), None


class _Sum(torch.autograd.Function):
    """Sum over the tensor group forward, identity backward (Megatron's g)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        return all_reduce(x.contiguous().clone(), group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return grads[0], None


class ColumnLinear(nn.Linear):
    """`nn.Linear` that holds some of the output features: (B, T, D) -> (B, T, O local)."""

    def __init__(self, whole: nn.Linear, out_features: int, group: Group) -> None:
        super().__init__(whole.in_features, out_features, bias=whole.bias is not None, device="meta")
        self.group = group

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(_apply(_Copy, input, self.group), self.weight, self.bias)


class RowLinear(nn.Linear):
    """`nn.Linear` that holds some of the input features: (B, T, I local) -> (B, T, D), equal on all tensor ranks.

    The bias is whole on every rank and added once, after the sum.
    """

    def __init__(self, whole: nn.Linear, in_features: int, group: Group) -> None:
        super().__init__(in_features, whole.out_features, bias=whole.bias is not None, device="meta")
        self.group = group

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        total = _apply(_Sum, F.linear(input, self.weight), self.group)
        return total if self.bias is None else total + self.bias


class VocabularyEmbedding(nn.Embedding):
    """`nn.Embedding` that holds some of the rows: (B, T) -> (B, T, D), equal on all tensor ranks."""

    def __init__(self, whole: nn.Embedding, num_rows: int, group: Group) -> None:
        super().__init__(num_rows, whole.embedding_dim, device="meta")
        self.group = group

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        local_BT = input - self.group.position * self.num_embeddings
        foreign_BT = (local_BT < 0) | (local_BT >= self.num_embeddings)
        rows_BTD = F.embedding(local_BT.masked_fill(foreign_BT, 0), self.weight)
        return _apply(_Sum, rows_BTD.masked_fill(foreign_BT.unsqueeze(-1), 0.0), self.group)


class _VocabularyCrossEntropy(torch.autograd.Function):
    """Weighted sum of token losses from logits that are split over the vocabulary.

    Three small collectives of shape (B, T): maximum, sum of exponentials, logit of the target. Saves the local
    softmax for the backward pass, which needs no communication.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits_BTV: torch.Tensor,
        targets_BT: torch.Tensor,
        weights_BT: torch.Tensor,
        vocab_size: int,
        group: Group,
    ) -> torch.Tensor:
        width = logits_BTV.shape[-1]
        first = group.position * width
        shifted_BTV = logits_BTV.float()
        real = max(min(vocab_size - first, width), 0)
        if real < width:
            shifted_BTV = shifted_BTV.clone() if shifted_BTV is logits_BTV else shifted_BTV
            shifted_BTV[..., real:] = -torch.inf
        max_BT = all_reduce(shifted_BTV.amax(-1), group, "max")
        shifted_BTV = shifted_BTV - max_BT.unsqueeze(-1)
        local_BT = targets_BT - first
        foreign_BT = (local_BT < 0) | (local_BT >= width)
        local_BT = local_BT.masked_fill(foreign_BT, 0)
        target_BT = shifted_BTV.gather(-1, local_BT.unsqueeze(-1)).squeeze(-1)
        target_BT = all_reduce(target_BT.masked_fill(foreign_BT, 0.0), group)
        softmax_BTV = shifted_BTV.exp_()
        total_BT = all_reduce(softmax_BTV.sum(-1), group)
        softmax_BTV.div_(total_BT.unsqueeze(-1))
        ctx.save_for_backward(softmax_BTV, local_BT, foreign_BT, weights_BT)
        ctx.dtype = logits_BTV.dtype
        return ((total_BT.log() - target_BT) * weights_BT).sum()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        softmax_BTV, local_BT, foreign_BT, weights_BT = ctx.saved_tensors
        one_BT = (~foreign_BT).to(softmax_BTV.dtype).unsqueeze(-1)
        grad_BTV = softmax_BTV.scatter_add_(-1, local_BT.unsqueeze(-1), -one_BT)  # in place: used once, then freed
        grad_BTV.mul_((weights_BT * grads[0]).unsqueeze(-1))
        return grad_BTV.to(ctx.dtype), None, None, None, None


def vocabulary_cross_entropy(
    logits_BTV: torch.Tensor, targets_BT: torch.Tensor, weights_BT: torch.Tensor, vocab_size: int, group: Group
) -> torch.Tensor:
    """The weighted sum of token losses, an fp32 scalar equal on all tensor ranks. Collective over `group`.

    Columns at or beyond `vocab_size` never enter the softmax. The gradient flows to the local logits alone.
    """
    return _apply(_VocabularyCrossEntropy, logits_BTV, targets_BT, weights_BT, vocab_size, group)


def shard(module: nn.Module, specs: dict[str, ParameterSpec], ties: dict[str, str], group: Group) -> None:
    """Swaps the layers of `module` (on the meta device, whole) for this rank's parts, in place.

    `specs` are the whole model's parameters by logical name and `ties` maps local to logical names. Parameters that
    were one before the swap are one after it. Does nothing over one rank.
    """
    if group.size == 1:
        return
    swapped: dict[int, Any] = {}
    for name, layer in list(module.named_modules(remove_duplicate=False)):
        if not isinstance(layer, (nn.Linear, nn.Embedding)):
            continue
        local = f"{name}.weight"
        spec = specs[ties.get(local, local)]
        part = _part(layer, spec, group)
        if part is None:
            continue
        before = id(layer.weight)
        part.weight = swapped.setdefault(before, part.weight)
        parent, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(parent), attribute, part)


def _part(layer: nn.Linear | nn.Embedding, spec: ParameterSpec, group: Group) -> nn.Linear | nn.Embedding | None:
    role = spec.sharding.role
    if role == "replicated":
        return None
    rows, *columns = spec.local_shape(group.size)
    if isinstance(layer, nn.Embedding):
        return VocabularyEmbedding(layer, rows, group)
    if role == "row":
        return RowLinear(layer, columns[0], group)
    return ColumnLinear(layer, rows, group)


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> torch.Tensor:
    """`function.apply` with the type that torch's stubs leave out."""
    return function.apply(*arguments)  # type: ignore[no-any-return]
