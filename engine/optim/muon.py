"""Muon: orthogonalised momentum for the matrices of linear layers; AdamW for everything else (Jordan et al. 2024).

The update of a matrix needs all of it, and each rank holds a flat range of its tensor-parallel part. So momentum is
kept where the weight is, and per step the update's shards go to one owner per matrix, which orthogonalises it and sends
the shards back: every matrix is computed once, and each rank owns its share of the work. Fused projections are
orthogonalised block by block, each as a matrix of its own. Updates are scaled to the size of AdamW's (Liu et al. 2025,
Muon is Scalable for LLM Training, section 2.2), so that learning rate and weight decay carry over.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from engine.parallel.collectives import exchange
from engine.parallel.groups import ALONE, Group
from engine.parallel.sharding import ParameterSpec
from engine.parallel.state import Placement, ShardRange

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of x, x^3 and x^5 (Jordan et al. 2024): steep at 0, and in return not exact at 1."""
ITERATIONS = 5
"""Number of iterations: five take every singular value between 0.003 and 1 to one between 0.68 and 1.21."""
MATCHED_RMS = 0.2
"""Root mean square of AdamW's updates, to which Muon's are scaled."""


class Muon(torch.optim.AdamW):
    """AdamW whose groups marked `matrices` are updated by Muon. Its tensors may be flat shards: see `attach`."""

    def __init__(self, groups: list[dict[str, Any]], momentum: float, **adamw: Any) -> None:
        super().__init__(groups, **adamw)
        self.momentum = momentum
        self._parts: dict[int, list[ShardRange]] = {}
        self._placements: dict[str, Placement] = {}
        self._zero = self._tensor = ALONE

    def attach(
        self,
        parts: Iterable[tuple[torch.Tensor, list[ShardRange]]],
        placements: list[Placement],
        zero: Group,
        tensor: Group,
    ) -> None:
        """Set the parameters that lie in each tensor that this optimizer updates.

        `zero` are the ranks that share a tensor-parallel part (this rank alone where it holds all of it), `tensor`
        those that share the parameter.
        """
        self._parts = {id(held): described for held, described in parts}
        self._placements = {placement.spec.name: placement for placement in placements}
        self._zero, self._tensor = zero, tensor

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every tensor that has a gradient; gradients of matrices are used up.

        Collective over `zero` and `tensor` where there are matrices: all ranks step the same groups in the same order.
        """
        assert closure is None
        for group in self.param_groups:
            if group["matrices"]:
                self._step_matrices(group, [held for held in group["params"] if held.grad is not None])
        # AdamW takes what still has a gradient: matrices have none left. Under ZeRO-3 DeepSpeed steps one sub-group per
        # call, which may be matrices alone.
        if any(held.grad is not None for group in self.param_groups for held in group["params"]):
            super().step()

    def _step_matrices(self, group: dict[str, Any], tensors: list[torch.Tensor]) -> None:
        specs: list[ParameterSpec] = []
        updates: list[torch.Tensor] = []
        weights: list[torch.Tensor] = []
        for held in tensors:
            assert held.grad is not None
            momentum = self.state[held]["momentum_buffer"]
            momentum.mul_(self.momentum).add_(held.grad)
            # Nesterov's form, in the gradient's memory, which nobody needs any more.
            update = held.grad.add_(momentum, alpha=self.momentum).view(-1)
            held.grad = None
            for spec, _, offset, length in self._parts[id(held)]:
                specs.append(spec)
                updates.append(update.narrow(0, offset, length))
                weights.append(held.view(-1).narrow(0, offset, length))
        for weight, update in zip(weights, self._orthogonal(specs, updates), strict=True):
            # Decoupled weight decay, as in AdamW.
            weight.mul_(1.0 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])

    def _orthogonal(self, specs: list[ParameterSpec], shards: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return this rank's shards of the scaled, orthogonalised updates, from its shards of the updates.

        Two levels: data ranks join the shards of a tensor-parallel part on one of them, tensor ranks the parts of a
        matrix. Lists are by parameter in the order of `specs`, with an empty shard where this rank holds nothing.
        """
        zero, tensor = self._zero, self._tensor
        lengths = [self._lengths(spec) for spec in specs]
        by_data_rank = Owners([cost(spec) for spec in specs], lengths, zero)
        own = by_data_rank.gather(shards)
        # All tensor ranks of a data rank own parts of the same matrices: owners depend on specs alone.
        owned = [specs[index] for index in own]
        shares = [[spec.local_numel(tensor.size)] * tensor.size for spec in owned]
        by_tensor_rank = Owners([cost(spec) for spec in owned], shares, tensor)
        parts_here = [torch.cat(parts) for parts in own.values()]
        whole = by_tensor_rank.gather(parts_here)
        for index, parts in whole.items():
            spec = owned[index]
            shape = spec.local_shape(tensor.size)
            update = scaled_orthogonal(spec, spec.join([part.view(shape) for part in parts]))
            # In the place of the parts that it was joined from: the way back sends a part to every rank.
            whole[index] = [spec.part(update, rank, tensor.size).reshape(-1) for rank in range(tensor.size)]
        local = by_tensor_rank.scatter(whole, like=parts_here)
        returned = {index: list(part.split(lengths[index])) for index, part in zip(own, local, strict=True)}
        return by_data_rank.scatter(returned, like=shards)

    def _lengths(self, spec: ParameterSpec) -> list[int]:
        """Return the number of elements of a parameter's local part on every rank of `zero`."""
        local = spec.local_numel(self._tensor.size)
        if self._zero.size == 1:
            return [local]
        return [self._placements[spec.name].range_of(rank, local)[1] for rank in range(self._zero.size)]


class Owners:
    """Assignment of tensors, of which all ranks of a group hold shards, to the ranks that compute them, by cost.

    `lengths` gives the length of every rank's shard by tensor. Both methods are collective over the group. Costs 5, 3
    and 3 on two ranks: the first tensor goes to rank 0, the others to rank 1.
    """

    def __init__(self, costs: list[int], lengths: list[list[int]], group: Group) -> None:
        self.lengths, self.group = lengths, group
        self.owners = [0] * len(costs)
        loads = [0] * group.size
        # The largest first, each to the rank with the least work (Graham 1969, longest processing time). Ties go to the
        # lower number, so that all ranks find the same owners without a message.
        for index in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
            self.owners[index] = loads.index(min(loads))
            loads[self.owners[index]] += costs[index]
        # By owner: what goes to one rank is then one run of the flat tensor that `exchange` sends.
        self.order = sorted(range(len(costs)), key=lambda index: (self.owners[index], index))
        self.mine = [index for index in self.order if self.owners[index] == group.position]

    def gather(self, shards: list[torch.Tensor]) -> dict[int, list[torch.Tensor]]:
        """Return the flat shards of all ranks, in order, of each tensor that this rank owns."""
        if self.group.size == 1 or not shards:
            return {index: [shards[index]] for index in self.mine}
        received = exchange(torch.cat([shards[index] for index in self.order]), *self._sizes(), self.group)
        # By rank, and within a rank by tensor: with tensors 1 and 2 on 2 ranks, parts are 1 2 1 2.
        cuts = [self.lengths[index][rank] for rank in range(self.group.size) for index in self.mine]
        parts = list(received.split(cuts)) if cuts else []
        return {index: parts[number :: len(self.mine)] for number, index in enumerate(self.mine)}

    def scatter(self, shards: dict[int, list[torch.Tensor]], like: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return this rank's shard of every tensor, from the owners' shards for all ranks: inverse of `gather`.

        `like` are the tensors that were gathered.
        """
        if self.group.size == 1 or not like:
            return [shards[index][0] for index in range(len(self.owners))]
        # The way back: what `gather` received is sent, and the other way round. A rank that owns nothing sends nothing,
        # but must take part.
        outgoing, incoming = self._sizes()
        flat = [shards[index][rank] for rank in range(self.group.size) for index in self.mine]
        received = exchange(torch.cat(flat) if flat else like[0].new_empty(0), incoming, outgoing, self.group)
        parts = received.split([self.lengths[index][self.group.position] for index in self.order])
        found = dict(zip(self.order, parts, strict=True))
        return [found[index] for index in range(len(self.owners))]

    def _sizes(self) -> tuple[list[int], list[int]]:
        """Return the number of elements that `gather` sends to each rank, and that it receives from each."""
        outgoing = [0] * self.group.size
        for owner, lengths in zip(self.owners, self.lengths, strict=True):
            outgoing[owner] += lengths[self.group.position]
        incoming = [sum(self.lengths[index][rank] for index in self.mine) for rank in range(self.group.size)]
        return outgoing, incoming


def cost(spec: ParameterSpec) -> int:
    """Return the multiplications of one product in a parameter's orthogonalisation; the others are proportional."""
    rows, columns = spec.shape
    split = [(block, columns) if spec.sharding.dim == 0 else (rows, block) for block in spec.blocks()]
    return sum(m * n * min(m, n) for m, n in split)


def scaled_orthogonal(spec: ParameterSpec, update_RC: torch.Tensor) -> torch.Tensor:
    """Return the update (R, C) with each block orthogonalised and scaled by 0.2 x sqrt(max(rows, columns))."""
    # An orthogonal R x C matrix has min(R, C) singular values of 1, so its elements have a root mean square of
    # 1 / sqrt(max(R, C)); the factor makes that 0.2.
    dim = spec.sharding.dim
    assert dim is not None, "matrices that Muon updates are split by tensor parallelism"
    blocks = [
        orthogonal(block) * (MATCHED_RMS * math.sqrt(max(block.shape))) for block in update_RC.split(spec.blocks(), dim)
    ]
    return torch.cat(blocks, dim)


def orthogonal(matrix_RC: torch.Tensor) -> torch.Tensor:
    """Approximate the orthogonal factor of a matrix (R, C): singular values go to about 1, vectors stay.

    A quintic Newton-Schulz iteration (Jordan et al. 2024, with their coefficients), in bf16 on a GPU as there.
    """
    a, b, c = COEFFICIENTS
    x = matrix_RC.bfloat16() if matrix_RC.is_cuda else matrix_RC
    # With the smaller side first, so that the Gram matrix is the smaller of the two.
    if tall := x.shape[0] > x.shape[1]:
        x = x.T
    # The Frobenius norm is at least the largest singular value: all are at most 1, where the iteration converges.
    x = x / (x.norm() + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if tall else x).to(matrix_RC.dtype)
