"""The cut: which consecutive layers each part of the model holds, so that the slowest part is as fast as it can be.

A pipeline stage holds one part, or several as its chunks: see `stage_parts`. Training and `palimpsest
plan` call the same `cut`. The cost of a layer is its forward operations per row; the embedding is counted with the
first layer and the head with the last, as they live there, so the cut is a partition of one list of numbers into
runs. Invariant: the runs are consecutive, cover every layer once, and none is empty. A cut depends on the model, the
lengths of a row (a head that predicts some tokens only costs less) and the number of parts alone, never on the data
size, ZeRO stage or batch; so it is computed once for all the layouts that a plan compares.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise

from engine.config.objectives import RowLengths
from engine.config.schema.model import ModelConfig
from engine.errors import ConfigError
from engine.plan.operations import layer_costs
from engine.plan.parameters import counted_entries
from engine.plan.parts import Entries


@dataclass(frozen=True)
class Part:
    """Consecutive layers by global number, with the embedding if `first`, and the final norm and the head if `last`."""

    layers: range
    first: bool
    last: bool


def layers_of(parts: Sequence[Part]) -> Sequence[int]:
    """Global numbers of the layers of a stage that holds these parts: a range if there is one, else a tuple."""
    return _layers_of(tuple(parts))


@lru_cache(maxsize=4096)
def _layers_of(parts: tuple[Part, ...]) -> Sequence[int]:
    return parts[0].layers if len(parts) == 1 else tuple(layer for part in parts for layer in part.layers)


def cut(model: ModelConfig, num_parts: int, lengths: RowLengths) -> list[range]:
    """Global layer numbers of every part, in order.

    The first part also holds the embedding, the last one the final norm and the head.

    Raises:
        ConfigError: there are more chunks than layers.
    """
    if not 1 <= num_parts <= model.num_layers:
        raise ConfigError(
            f"parallel.pipe x parallel.chunks_per_stage = {num_parts} "
            f"does not fit model.num_layers = {model.num_layers}",
            f"1 to {model.num_layers}",
        )
    return list(_balanced(layer_costs(model, lengths), num_parts))


def stage_parts(model: ModelConfig, pipe: int, chunks_per_stage: int, lengths: RowLengths) -> list[list[Part]]:
    """The parts of every stage: its chunk c is part c * pipe + stage (Narayanan et al. 2021, section 2.2)."""
    return [list(parts) for parts in _stage_parts(model, pipe, chunks_per_stage, lengths)]


@lru_cache
def _stage_parts(
    model: ModelConfig, pipe: int, chunks_per_stage: int, lengths: RowLengths
) -> tuple[tuple[Part, ...], ...]:
    runs = cut(model, pipe * chunks_per_stage, lengths)
    parts = tuple(Part(run, first=number == 0, last=number == len(runs) - 1) for number, run in enumerate(runs))
    return tuple(parts[stage::pipe] for stage in range(pipe))


def entries_of(model: ModelConfig, parts: list[Part]) -> Entries:
    """Parameters of a stage that holds these parts, each name once, and those of equal layers as one."""
    return _entries_of(model, tuple(parts))


@lru_cache(maxsize=1024)
def _entries_of(model: ModelConfig, parts: tuple[Part, ...]) -> Entries:
    entries = [entry for part in parts for entry in counted_entries(model, part.layers, part.first, part.last)]
    return Entries(tuple({entry.name: entry for entry in entries}.values()))


@lru_cache
def tied_stages(
    model: ModelConfig, pipe: int, chunks_per_stage: int, lengths: RowLengths
) -> Mapping[str, tuple[int, ...]]:
    """The stages, ascending, of every parameter that more than one pipeline stage holds, by logical name."""
    holders: dict[str, list[int]] = {}
    for stage, parts in enumerate(stage_parts(model, pipe, chunks_per_stage, lengths)):
        for entry in entries_of(model, parts):
            holders.setdefault(entry.name, []).append(stage)
    return {name: tuple(stages) for name, stages in holders.items() if len(stages) > 1}


def balance(costs: list[int], parts: int) -> list[range]:
    """`costs` cut into consecutive, non-empty runs whose largest sum is as small as possible.

    Among such cuts the one with the smallest sum of squares (the most even), and among those the one whose early
    runs are shortest: early stages keep more micro-batches alive. `costs` are positive.
    """
    assert 1 <= parts <= len(costs)
    sums = (0, *accumulate(costs))
    limit = _smallest_limit(costs, parts)
    windows = _windows(sums, parts, limit)
    squares = {len(costs): 0}
    """By start, the least sum of squares of the runs from there on."""
    ends: list[dict[int, int]] = []
    for starts, ends_allowed in zip(windows[-2::-1], windows[:0:-1], strict=True):
        squares, best_ends = _extended(sums, limit, starts, ends_allowed, squares)
        ends.append(best_ends)
    cuts = [0]
    for best_ends in reversed(ends):
        cuts.append(best_ends[cuts[-1]])
    return [range(start, end) for start, end in pairwise(cuts)]


@lru_cache
def _balanced(costs: tuple[int, ...], parts: int) -> tuple[range, ...]:
    """`balance`, remembered: a ranking asks for few cuts, many times."""
    return tuple(balance(list(costs), parts))


def _windows(sums: Sequence[int], parts: int, limit: int) -> list[range]:
    """The positions at which each run can start, and the last one end, if no run's sum is to be above the limit.

    What lies before a position has to make so many runs as come before it, and what lies behind it the others.
    """
    count = len(sums) - 1
    latest, earliest = [0], [count]
    for _ in range(parts):
        latest.append(bisect_right(sums, sums[latest[-1]] + limit) - 1)
        earliest.append(bisect_left(sums, sums[earliest[-1]] - limit))
    return [
        range(max(before, earliest[parts - before]), min(latest[before], count - (parts - before)) + 1)
        for before in range(parts + 1)
    ]


def _extended(
    sums: Sequence[int], limit: int, starts: range, ends: range, squares: dict[int, int]
) -> tuple[dict[int, int], dict[int, int]]:
    """The least sum of squares from each of `starts` on, and the end of the run that begins there; `squares` are those
    from each of `ends` on.

    The smallest best end never falls as the start rises, for squares of sums satisfy the quadrangle inequality; so the
    best end of the middle start bounds those of both halves (Galil and Park 1992, divide and conquer).
    """
    found: dict[int, int] = {}
    best_ends: dict[int, int] = {}
    open_spans = [(starts.start, starts.stop, ends.start, ends.stop)]
    while open_spans:
        first, stop, low, high = open_spans.pop()
        if first >= stop:
            continue
        middle = (first + stop) // 2
        before = sums[middle]
        last = min(high, bisect_right(sums, before + limit))
        found[middle], end = min(
            ((sums[end] - before) ** 2 + squares[end], end) for end in range(max(low, middle + 1), last)
        )
        best_ends[middle] = end
        open_spans += ((first, middle, low, end + 1), (middle + 1, stop, end, high))
    return found, best_ends


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
