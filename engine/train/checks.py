"""Invariants of parallel training, held after a step where `checks` is on: equal copies are equal, gradients are gone.

What several ranks hold the same of must be the same, bit for bit: working weights (under ZeRO-0 the whole state)
over the data ranks, parameters that tensor parallelism does not split over the tensor ranks, and tied weights
over their stages. It costs a hash of the state per step, so it is off unless asked for.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import xxhash

from engine.errors import PalimpsestError
from engine.parallel.collectives import first_error, gather_objects
from engine.parallel.groups import Group, Groups
from engine.parallel.state import ParameterShard
from engine.parallel.zero import StageEngine

Copies = dict[str, torch.Tensor]
"""Tensors by a description of each, for messages."""


class InvariantBroken(PalimpsestError):
    """Ranks that must agree do not, or a gradient outlived its step: a defect of the engine or of a device."""


def check_invariants(engine: StageEngine, groups: Groups) -> None:
    """Check that copies are equal and that no gradient is left. Call between two steps. Collective over the world.

    Raises:
        InvariantBroken: on every rank; names each parameter that broke one, and the ranks.
    """
    problems = [
        f"rank {groups.global_rank}: the gradient of {name} was not cleared" for name in engine.uncleared_gradients()
    ]
    # Every rank goes on to the last comparison whatever it has found: each gathers hashes over its group.
    for relation, group, copies in _shared(engine, groups):
        problems += _differences(relation, group, copies)
    error = None
    if problems:
        shown = problems[:20] + (["..."] if len(problems) > 20 else [])
        error = InvariantBroken(
            "an invariant of parallel training is broken:\n  " + "\n  ".join(shown),
            "equal copies on every rank, and no gradient between steps",
            "resume from the last checkpoint; if it comes back on other machines, report it",
        )
    # The ranks of one group may have found a problem that no other rank knows of.
    failed = first_error(error, groups.world)
    if failed is not None:
        raise failed


def _shared(engine: StageEngine, groups: Groups) -> Iterator[tuple[str, Group, Copies]]:
    """Yield (relation, group, copies) of all that ranks of a group hold alike, in the same order on each of them."""
    shards = engine.parameter_shards()
    trained = [shard for shard in shards if shard.moments]  # frozen weights have none
    whole = {shard.spec.name for shard in trained} if engine.zero_stage == 0 else set()
    # Each data rank holds a range of its own of the state under ZeRO-1 to 3, and of frozen weights under ZeRO-0, too:
    # of these only the working weights are alike.
    working = {
        f"{spec.name} (working weights)": weight for spec, weight in engine.working_weights() if spec.name not in whole
    }
    yield "data ranks", groups.zero, working | (_states(trained) if whole else {})
    yield "tensor ranks", groups.tensor, _states(shard for shard in shards if shard.spec.sharding.dim is None)
    # sorted: a stage may be in several ties, and their collectives need one order
    for stages, group in sorted(groups.ties.items()):
        tied = {spec.name for held in engine.parameter_groups if held.tied == stages for spec in held.specs}
        yield "the stages of a tie", group, _states(shard for shard in shards if shard.spec.name in tied)


def _states(shards: Iterator[ParameterShard] | list[ParameterShard]) -> Copies:
    copies: Copies = {}
    for shard in shards:
        copies[f"{shard.spec.name} (master weights)"] = shard.weight
        copies |= {f"{shard.spec.name} ({moment})": values for moment, values in shard.moments.items()}
    return copies


def _differences(relation: str, group: Group, copies: Copies) -> list[str]:
    """One line per tensor that the ranks hold differently. Collective over `group`."""
    if group.size == 1:
        return []
    # 16 hex digits per tensor travel, not the tensor.
    hashes = gather_objects({what: _hash(tensor) for what, tensor in copies.items()}, group)
    lines = []
    for what in sorted(set().union(*hashes)):
        holders: dict[str, list[int]] = {}
        for global_rank, held in zip(group.ranks, hashes, strict=True):
            holders.setdefault(held.get(what, "nothing"), []).append(global_rank)
        if len(holders) > 1:
            parts = ", ".join(f"{ranks} hold {digest}" for digest, ranks in holders.items())
            lines.append(f"{what} differs between {relation}: {parts}")
    return lines


def _hash(tensor: torch.Tensor) -> str:
    # Hashed as bytes: NaNs of equal bits are equal, 0.0 and -0.0 are not.
    return xxhash.xxh3_64(tensor.detach().contiguous().cpu().view(torch.uint8).numpy().data).hexdigest()
