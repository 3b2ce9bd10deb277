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
from engine.parallel.cross_entropy import linear_cross_entropy
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


def vocabulary_cross_entropy(
    hidden: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    targets: torch.Tensor,
    weights: torch.Tensor,
    vocab_size: int,
    group: Group,
) -> torch.Tensor:
    """`linear_cross_entropy` where each rank holds some rows of the weight. Collective over `group`, both ways."""
    return linear_cross_entropy(_apply(_Copy, hidden, group), weight_VD, bias_V, targets, weights, vocab_size, group)


def shard(module: nn.Module, specs: dict[str, ParameterSpec], ties: dict[str, str], group: Group) -> None:
    """Swaps the layers of `module` (on the meta device, whole) for this rank's parts, in place.

    `specs` are the whole model's parameters by logical name and `ties` maps local to logical names. Parameters that
    were one before the swap are one after it. A module of another kind keeps its class and has its split parameters
    cut: it communicates through the functions that it was built with. Does nothing over one rank.
    """
    if group.size == 1:
        return
    swapped: dict[torch.Tensor, torch.Tensor] = {}
    for name, layer in list(module.named_modules(remove_duplicate=False)):
        if isinstance(layer, (nn.Linear, nn.Embedding)):
            local = f"{name}.weight"
            part = _part(layer, specs[ties.get(local, local)], group)
            if part is not None:
                part.weight = swapped.setdefault(layer.weight, part.weight)
                parent, _, attribute = name.rpartition(".")
                setattr(module.get_submodule(parent), attribute, part)
            continue
        for attribute, whole in list(layer.named_parameters(recurse=False)):
            local = f"{name}.{attribute}"
            spec = specs[ties.get(local, local)]
            if spec.sharding.role != "replicated":
                cut = nn.Parameter(torch.empty(spec.local_shape(group.size), device="meta"))
                setattr(layer, attribute, swapped.setdefault(whole, cut))


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
