"""Mixout (Lee et al. 2020, arXiv 1909.11299, section 4): the passes of a step see a mixture of two sets of weights.

With w the present weights, u those of the run stage's beginning, p the share and M an element-wise mask that is 1 with
probability 1 - p, the passes compute with ((1 - M) u + M w - p u) / (1 - p), whose mean over masks is w; the gradient
of w is that of the mixture x M / (1 - p). Weights are w again when the step updates them, and in evaluations. A mask is
a function of seed, step, parameter and element, so it is the same in every layout.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator

import torch

from engine.config.schema.regularization import FIRST_WEIGHTS
from engine.models.dropout import mix32
from engine.parallel.groups import Group
from engine.parallel.sharding import ParameterSpec
from engine.parallel.state import ParameterShard
from engine.parallel.zero import StageEngine


@contextlib.contextmanager
def mixed_weights(engine: StageEngine, tensor: Group, share: float, seed: int, step: int) -> Iterator[None]:
    """Let the engine compute with mixed weights, and mask the gradient of this step.

    Each trained weight is kept beside the mixture meanwhile: 4 bytes more per weight. No save may be copying weights.
    Collective over the ZeRO group.
    """

    def kept(shard: ParameterShard) -> torch.Tensor:
        return _of_shard(mask(shard.spec, share, seed, step, shard.weight.device), shard, tensor)

    present = [(shard, shard.weight.clone()) for shard in engine.parameter_shards() if FIRST_WEIGHTS in shard.moments]
    with torch.no_grad():
        for shard, weight in present:
            first = shard.moments[FIRST_WEIGHTS]
            shard.weight.copy_(torch.where(kept(shard), (weight - share * first) / (1.0 - share), first))
    engine.refresh(frozen=False)
    engine.gradient_edit = lambda shard, gradient: gradient.mul_(kept(shard).to(gradient.device) / (1.0 - share))
    yield
    with torch.no_grad():
        for shard, weight in present:
            shard.weight.copy_(weight)
    # Not after an error, which may be one of this rank alone: the others would not come to this collective.
    engine.refresh(frozen=False)


def mask(spec: ParameterSpec, share: float, seed: int, step: int, device: torch.device) -> torch.Tensor:
    """Return the mask of a whole parameter in a step: True where the present weight counts."""
    digest = hashlib.sha256(f"mixout {seed} {step} {spec.name}".encode()).digest()
    low, high = (int.from_bytes(digest[at : at + 4], "little", signed=True) for at in (0, 4))
    numbers = torch.arange(torch.Size(spec.shape).numel(), dtype=torch.int64, device=device).to(torch.int32)
    bits = mix32(mix32(numbers ^ low) ^ high)
    return ((bits & 0x7FFFFFFF) >= int(share * 2**31)).view(spec.shape)


def _of_shard(whole: torch.Tensor, shard: ParameterShard, tensor: Group) -> torch.Tensor:
    part = shard.spec.part(whole, tensor.position, tensor.size)
    return part.reshape(-1)[shard.start : shard.start + shard.length]
