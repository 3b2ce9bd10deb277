"""The cut: which consecutive layers each part of the model holds, so that the slowest part is as fast as it can be.

A pipeline stage holds one part, or several as its chunks (virtual stages): see `stage_parts`. Training and `palimpsest
plan` call the same `cut`. The cost of a layer is its forward operations per row; the embedding is counted with the
first layer and the head with the last, as they live there, so the cut is a partition of one list of numbers into
runs. Invariant: the runs are consecutive, cover every layer once, and none is empty. A cut depends on the model, the
lengths of a row (a head that predicts some tokens only costs less) and the number of parts alone, never on the data
size, ZeRO stage or batch; so it is computed once for all the layouts that a plan compares.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from engine.config.lengths import RowLengths
from engine.config.schema.model import ModelConfig
from engine.errors import ConfigError
from engine.plan.operations import layer_costs
from engine.plan.parameters import stage_entries
from engine.plan.parts import Entries


@dataclass(frozen=True)
class Part:
    """Consecutive layers by global number, with the embedding if `first`, and the final norm and the head if `last`."""

    layers: range
    first: bool
    last: bool


def cut(model: ModelConfig, num_parts: int, lengths: RowLengths) -> list[range]:
    """Global layer numbers of every part, in order.

    The first part also holds the embedding, the last one the final norm and the head.

    Raises:
        ConfigError: there are more parts than layers.
    """
    if not 1 <= num_parts <= model.num_layers:
        raise ConfigError(
            f"parallel.pipe x parallel.virtual_stages = {num_parts} does not fit model.num_layers = {model.num_layers}",
            f"1 to {model.num_layers}",
        )
    return list(_balanced(layer_costs(model, lengths), num_parts))


def stage_parts(model: ModelConfig, pipe: int, virtual_stages: int, lengths: RowLengths) -> list[list[Part]]:
    """The parts of every stage: its chunk c is part c * pipe + stage (Narayanan et al. 2021, section 2.2)."""
    return [list(parts) for parts in _stage_parts(model, pipe, virtual_stages, lengths)]


@lru_cache
def _stage_parts(
    model: ModelConfig, pipe: int, virtual_stages: int, lengths: RowLengths
) -> tuple[tuple[Part, ...], ...]:
    runs = cut(model, pipe * virtual_stages, lengths)
    parts = tuple(Part(run, first=number == 0, last=number == len(runs) - 1) for number, run in enumerate(runs))
    return tuple(parts[stage::pipe] for stage in range(pipe))


def entries_of(model: ModelConfig, parts: list[Part]) -> Entries:
    """Parameters of a stage that holds these parts, each name once."""
    return _entries_of(model, tuple(parts))


@lru_cache(maxsize=1024)
def _entries_of(model: ModelConfig, parts: tuple[Part, ...]) -> Entries:
    entries = [entry for part in parts for entry in stage_entries(model, part.layers, part.first, part.last)]
    return Entries(tuple({entry.name: entry for entry in entries}.values()))


@lru_cache
def tied_stages(
    model: ModelConfig, pipe: int, virtual_stages: int, lengths: RowLengths
) -> Mapping[str, tuple[int, ...]]:
    """The stages, ascending, of every parameter that more than one pipeline stage holds, by logical name."""
    holders: dict[str, list[int]] = {}
    for stage, parts in enumerate(stage_parts(model, pipe, virtual_stages, lengths)):
        for entry in entries_of(model, parts):
            holders.setdefault(entry.name, []).append(stage)
    return {name: tuple(stages) for name, stages in holders.items() if len(stages) > 1}


def balance(costs: list[int], parts: int) -> list[range]:
    """`costs` cut into consecutive, non-empty runs whose largest sum is as small as possible.

    Among such cuts the one with the smallest sum of squares (the most even), and among those the one whose early
    runs are shortest: early stages keep more micro-batches alive. `costs` are positive.
    """
    assert 1 <= parts <= len(costs)
    limit = _smallest_limit(costs, parts)
    unreachable = (float("inf"), ())
    # best[i]: (sum of squares, lengths) of costs[i:] in the number of runs reached so far, none above the limit
    best: list[tuple[float, tuple[int, ...]]] = [unreachable] * len(costs) + [(0, ())]
    for _ in range(parts):
        best = [_extend(costs, start, limit, best) for start in range(len(costs))] + [unreachable]
    lengths = best[0][1]
    starts = [sum(lengths[:part]) for part in range(parts)]
    return [range(start, start + length) for start, length in zip(starts, lengths, strict=True)]


@lru_cache
def _balanced(costs: tuple[int, ...], parts: int) -> tuple[range, ...]:
    """`balance`, remembered: a ranking asks for few cuts, many times."""
    return tuple(balance(list(costs), parts))


def _extend(
    costs: list[int], start: int, limit: int, best: list[tuple[float, tuple[int, ...]]]
) -> tuple[float, tuple[int, ...]]:
    """The best cut of costs[start:] that has one run more than those in `best`."""
    found: tuple[float, tuple[int, ...]] = (float("inf"), ())
    total = 0
    for end in range(start + 1, len(costs) + 1):
        total += costs[end - 1]
        if total > limit:
            break
        squares, lengths = best[end]
        found = min(found, (squares + total * total, (end - start, *lengths)))
    return found


def _smallest_limit(costs: list[int], parts: int) -> int:
    """The smallest largest sum of `parts` runs, by bisection: filling each run greedily needs the fewest runs."""
    low, high = max(costs), sum(costs)
    while low < high:
        middle = (low + high) // 2
        if _runs_needed(costs, middle) <= parts:
            high = middle
        else:
            low = middle + 1
    return low


def _runs_needed(costs: list[int], limit: int) -> int:
    runs, total = 1, 0
    for cost in costs:
        if total + cost > limit:
            runs, total = runs + 1, 0
        total += cost
    return runs
