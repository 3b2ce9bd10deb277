"""Tensor parallelism (Shoeybi et al. 2019, Megatron-LM): replaces the layers of a plain module by sharded ones.

`shard` walks a module that knows no process group and replaces each `Linear` and `Embedding` by the role that the
model's sharding table gives its weight. Two conjugate operators carry the communication: `_Copy` (identity forward,
sum backward) at the entrance of a column-parallel layer and `_Sum` (sum forward, identity backward) at the exit of
a row-parallel one. Activations between blocks and the parameters of norms are equal on all tensor ranks.

With sequence parallelism (Korthikanti et al. 2022, section 4.2.2) each tensor rank holds a slice of the sequence
between the blocks: gathered at the entrance, and summed and scattered at the exit. Norms, residual sums and the biases
of row-parallel layers then see a slice, so the gradients of those parameters have to be summed over the group.

Legend: B batch, T time, D width, I and O features in and out, V vocabulary; O, I and V are local where a layer is
split along them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from engine.parallel.collectives import all_reduce, gather_along, reduce_scatter_along
from engine.parallel.cross_entropy import linear_cross_entropy
from engine.parallel.groups import Group
from engine.parallel.sharding import ParameterSpec

SEQUENCE_DIM = 1
"""Sequence dimension of (B, T, D)."""


class _Copy(torch.autograd.Function):
    """Identity forward, sum over the tensor group backward (Megatron's f)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)  # a view: torch handles an input that is returned unchanged in a way of its own

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        # Reduced in place, so cloned first: autograd may hand the same gradient to somebody else.
        return all_reduce(grads[0].contiguous().clone(), ctx.group), None


class _Sum(torch.autograd.Function):
    """Sum over the tensor group forward, identity backward (Megatron's g)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        return all_reduce(x.contiguous().clone(), group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return grads[0], None


class _SumScatter(torch.autograd.Function):
    """Sum over the tensor group forward, each rank keeping its slice of the sequence; gather backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return reduce_scatter_along(x, group, SEQUENCE_DIM)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return gather_along(grads[0], ctx.group, SEQUENCE_DIM), None


class _Whole(torch.autograd.Function):
    """Gather of the slices forward; backward each rank keeps its own slice: the gradient is equal on all ranks."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return gather_along(x, group, SEQUENCE_DIM)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return _own_slice(grads[0], ctx.group, SEQUENCE_DIM), None


class _GatheredLinear(torch.autograd.Function):
    """Column-parallel product with the gathered slices. Only the own slice is kept, and gathered once more backward
    (Korthikanti et al. 2022, section 4.2.2, equation 7)."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, group: Group
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.group = group
        return F.linear(gather_along(x, group, SEQUENCE_DIM), weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad  # not of what is frozen, nor of what it gave
        grad_x = grad_weight = None
        if needs_x:
            # Each rank has the part of the input's gradient that its output features give: (B, T, D) -> (B, T / n, D).
            grad_x = reduce_scatter_along(grads[0] @ weight, ctx.group, SEQUENCE_DIM)
        grad = grads[0].flatten(0, -2)
        if needs_weight:
            grad_weight = grad.T @ gather_along(x, ctx.group, SEQUENCE_DIM).flatten(0, -2)
        return grad_x, grad_weight, grad.sum(0) if needs_bias else None, None


class ColumnLinear(nn.Linear):
    """`nn.Linear` that holds some of the output features: (B, T, D) -> (B, T, O), O local.

    With `sequence_parallel` it is given this rank's slice, (B, T / group, D).
    """

    def __init__(self, whole: nn.Linear, out_features: int, group: Group, sequence_parallel: bool) -> None:
        super().__init__(whole.in_features, out_features, bias=whole.bias is not None, device="meta")
        self.group, self.sequence_parallel = group, sequence_parallel

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.sequence_parallel:
            return _apply(_GatheredLinear, input, self.weight, self.bias, self.group)
        return F.linear(_apply(_Copy, input, self.group), self.weight, self.bias)


class RowLinear(nn.Linear):
    """`nn.Linear` that holds some of the input features: (B, T, I), I local, -> (B, T, D), equal on all tensor ranks.

    The bias is whole on every rank and added once, after the sum. With `sequence_parallel` it returns this rank's
    slice.
    """

    def __init__(self, whole: nn.Linear, in_features: int, group: Group, sequence_parallel: bool) -> None:
        super().__init__(in_features, whole.out_features, bias=whole.bias is not None, device="meta")
        self.group, self.sequence_parallel = group, sequence_parallel

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        total = _apply(_SumScatter if self.sequence_parallel else _Sum, F.linear(input, self.weight), self.group)
        return total if self.bias is None else total + self.bias


class VocabularyEmbedding(nn.Embedding):
    """`nn.Embedding` that holds some of the rows: (B, T) -> (B, T, D), equal on all tensor ranks.

    With `sequence_parallel` it returns this rank's slice.
    """

    def __init__(self, whole: nn.Embedding, num_rows: int, group: Group, sequence_parallel: bool) -> None:
        super().__init__(num_rows, whole.embedding_dim, device="meta")
        self.group, self.sequence_parallel = group, sequence_parallel

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        # A token of another rank's rows looks up row 0 here and is set to 0: the sum over ranks has one term per token.
        local_BT = input - self.group.position * self.num_embeddings
        foreign_BT = (local_BT < 0) | (local_BT >= self.num_embeddings)
        rows_BTD = F.embedding(local_BT.masked_fill(foreign_BT, 0), self.weight)
        exit = _SumScatter if self.sequence_parallel else _Sum
        return _apply(exit, rows_BTD.masked_fill(foreign_BT.unsqueeze(-1), 0.0), self.group)


class SequenceParallelEmbedding(nn.Embedding):
    """`nn.Embedding`, whole on every tensor rank, that looks up this rank's slice: (..., T) -> (..., T / group, D)."""

    def __init__(self, whole: nn.Embedding, group: Group) -> None:
        super().__init__(whole.num_embeddings, whole.embedding_dim, device="meta")
        self.group = group

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.embedding(_own_slice(input, self.group, -1), self.weight)


def whole_rows(hidden: torch.Tensor, group: Group) -> torch.Tensor:
    """Return (B, T, D) from every tensor rank's slice. Collective over `group`.

    The caller must compute the same from it on all ranks: the gradient is not summed.
    """
    return _apply(_Whole, hidden, group)


def vocabulary_cross_entropy(
    hidden: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    targets: torch.Tensor,
    weights: torch.Tensor,
    vocab_size: int,
    group: Group,
    **options: Any,
) -> torch.Tensor:
    """Compute `linear_cross_entropy` with some rows of the weight on each rank. Collective over `group`, both ways."""
    # Backward each rank has the part of the hidden states' gradient that its columns give; `_Copy` sums them.
    copied = _apply(_Copy, hidden, group)
    return linear_cross_entropy(copied, weight_VD, bias_V, targets, weights, vocab_size, group, **options)


def shard(
    module: nn.Module,
    specs: Mapping[str, ParameterSpec],
    ties: Mapping[str, str],
    group: Group,
    sequence_parallel: bool = False,
) -> None:
    """Replace the layers of `module` (on the meta device, whole) by this rank's parts, in place.

    `specs` are the whole model's parameters by logical name and `ties` maps local to logical names. Parameters that
    modules share stay shared. A module of another kind keeps its class and has its split parameters cut: it
    communicates through the functions that it was built with. With `sequence_parallel` the hidden states between the
    blocks are this rank's slice of the sequence. Does nothing over one rank.
    """
    if group.size == 1:
        return
    swapped: dict[torch.Tensor, torch.Tensor] = {}
    # Duplicates too: a module that stands in two places is replaced in both, its weight once.
    for name, layer in list(module.named_modules(remove_duplicate=False)):
        if isinstance(layer, (nn.Linear, nn.Embedding)):
            local = f"{name}.weight"
            part = _part(layer, specs[ties.get(local, local)], group, sequence_parallel)
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


def _part(
    layer: nn.Linear | nn.Embedding, spec: ParameterSpec, group: Group, sequence_parallel: bool
) -> nn.Linear | nn.Embedding | None:
    role = spec.sharding.role
    if role == "replicated":
        return (
            SequenceParallelEmbedding(layer, group) if sequence_parallel and isinstance(layer, nn.Embedding) else None
        )
    rows, *columns = spec.local_shape(group.size)
    if isinstance(layer, nn.Embedding):
        return VocabularyEmbedding(layer, rows, group, sequence_parallel)
    if role == "row":
        return RowLinear(layer, columns[0], group, sequence_parallel)
    return ColumnLinear(layer, rows, group, sequence_parallel)


def _own_slice(tensor: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
    """Return this rank's part along `dim`, a view."""
    # Unflattening shifts a negative dim by one: -1 of (B, T) is cut to (B, n, T / n), whose n is dim -2.
    return tensor.unflatten(dim, (group.size, -1)).select(dim if dim >= 0 else dim - 1, group.position)


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> torch.Tensor:
    """Call `function.apply`, with the type that torch's stubs leave out."""
    return function.apply(*arguments)  # type: ignore[no-any-return]
