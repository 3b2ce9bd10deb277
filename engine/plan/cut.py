"""The cut of a model into chunks of consecutive layers, such that the slowest chunk is as fast as it can be.

A pipeline stage holds one chunk, or several (`parallel.chunks_per_stage`). Training and `palimpsest plan` call the same
`stage_chunks`. The cost of a layer is its forward operations per row; the embedding is counted with the first layer and
the head with the last, as they live there, so the cut is a partition of one list of numbers into runs. Invariant: the
runs are consecutive, cover every layer once, and none is empty. A cut depends on the model, the lengths of a row (a
head that predicts some tokens only costs less) and the number of chunks alone, never on the data size, ZeRO stage or
batch; so it is computed once for all the layouts that a plan compares.
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
class ModelChunk:
    """Consecutive layers by global number, with the embedding if `first`, and the final norm and the head if `last`."""

    layers: range
    first: bool
    last: bool


def whole_model(model: ModelConfig) -> ModelChunk:
    """Return the chunk that is the whole model."""
    return ModelChunk(range(model.num_layers), first=True, last=True)


def layers_of(chunks: Sequence[ModelChunk]) -> Sequence[int]:
    """Return the global numbers of the layers of a stage with these chunks: a range for one chunk, else a tuple."""
    return _layers_of(tuple(chunks))


@lru_cache(maxsize=4096)
def _layers_of(chunks: tuple[ModelChunk, ...]) -> Sequence[int]:
    return chunks[0].layers if len(chunks) == 1 else tuple(layer for chunk in chunks for layer in chunk.layers)


def cut_layers(model: ModelConfig, num_chunks: int, lengths: RowLengths) -> list[range]:
    """Return the global layer numbers of every chunk of the model, in order.

    Raises:
        ConfigError: there are more chunks than layers.
    """
    if not 1 <= num_chunks <= model.num_layers:
        raise ConfigError(
            f"parallel.pipe x parallel.chunks_per_stage = {num_chunks} "
            f"does not fit model.num_layers = {model.num_layers}",
            f"1 to {model.num_layers}",
        )
    return list(_balanced(layer_costs(model, lengths), num_chunks))


@lru_cache
def stage_chunks(
    model: ModelConfig, pipe: int, chunks_per_stage: int, lengths: RowLengths
) -> tuple[tuple[ModelChunk, ...], ...]:
    """Cut the model into the chunks of every pipeline stage (Narayanan et al. 2021, section 2.2).

    Chunk c of a stage is chunk c * pipe + stage of the model: 8 chunks on 4 stages are (0, 4), (1, 5), (2, 6), (3, 7).

    Raises:
        ConfigError: there are more chunks than layers.
    """
    runs = cut_layers(model, pipe * chunks_per_stage, lengths)
    chunks = tuple(ModelChunk(run, first=number == 0, last=number == len(runs) - 1) for number, run in enumerate(runs))
    # Strided and not consecutive: a micro-batch visits all stages v times, which divides the bubble by v.
    return tuple(chunks[stage::pipe] for stage in range(pipe))


@lru_cache
def tied_stages(
    model: ModelConfig, pipe: int, chunks_per_stage: int, lengths: RowLengths
) -> Mapping[str, tuple[int, ...]]:
    """Return the stages (ascending) of every parameter that more than one of them holds, by logical name."""
    holders: dict[str, list[int]] = {}
    for stage, chunks in enumerate(stage_chunks(model, pipe, chunks_per_stage, lengths)):
        for entry in entries_of(model, chunks):
            holders.setdefault(entry.name, []).append(stage)
    return {name: tuple(stages) for name, stages in holders.items() if len(stages) > 1}


def entries_of(model: ModelConfig, chunks: Sequence[ModelChunk]) -> Entries:
    """Return the parameters of a stage with these chunks, each name once, and those of equal layers as one."""
    return _entries_of(model, tuple(chunks))


@lru_cache(maxsize=1024)
def _entries_of(model: ModelConfig, chunks: tuple[ModelChunk, ...]) -> Entries:
    entries = [entry for chunk in chunks for entry in counted_entries(model, chunk.layers, chunk.first, chunk.last)]
    return Entries(tuple({entry.name: entry for entry in entries}.values()))


def balance(costs: list[int], num_runs: int) -> list[range]:
    """Cut `costs` into consecutive, non-empty runs whose largest sum is as small as possible.

    Among such cuts the one with the smallest sum of squares (the most even), and among those the one whose early
    runs are shortest: early stages keep more micro-batches alive. `costs` are positive.

    Costs 3, 1, 1, 1, 2 in three runs: the smallest largest sum is 3, and (3) (1, 1) (1, 2) is chosen over
    (3) (1, 1, 1) (2), which has equal squares and a longer second run.
    """
    assert 1 <= num_runs <= len(costs)
    sums = (0, *accumulate(costs))
    # First the best largest sum, then the most even of the cuts that reach it, by dynamic programming from the end.
    limit = _smallest_limit(costs, num_runs)
    windows = _windows(sums, num_runs, limit)
    squares = {len(costs): 0}
    """By start, the least sum of squares of the runs from there on."""
    ends: list[dict[int, int]] = []
    # Runs from the last to the first: the starts of run r are the ends of run r - 1.
    for starts, ends_allowed in zip(windows[-2::-1], windows[:0:-1], strict=True):
        squares, best_ends = _extended(sums, limit, starts, ends_allowed, squares)
        ends.append(best_ends)
    cuts = [0]
    # The tables were made backwards; following the best ends from 0 on gives the cut.
    for best_ends in reversed(ends):
        cuts.append(best_ends[cuts[-1]])
    return [range(start, end) for start, end in pairwise(cuts)]


@lru_cache
def _balanced(costs: tuple[int, ...], num_runs: int) -> tuple[range, ...]:
    """Return `balance` from a cache: a ranking asks for few cuts, many times."""
    return tuple(balance(list(costs), num_runs))


def _windows(sums: Sequence[int], num_runs: int, limit: int) -> list[range]:
    """Positions at which each run can start, and the last one end, if no run's sum is to be above the limit.

    The items before a position have to fill the runs that come before it, and the items behind it the others.
    """
    count = len(sums) - 1
    latest, earliest = [0], [count]
    for _ in range(num_runs):
        # Greedy from both ends: the furthest that so many full runs reach, and the nearest from which so many suffice.
        latest.append(bisect_right(sums, sums[latest[-1]] + limit) - 1)
        earliest.append(bisect_left(sums, sums[earliest[-1]] - limit))
    return [
        # No run is empty: `before` runs take at least `before` items, and the rest leave one for each of theirs.
        range(max(before, earliest[num_runs - before]), min(latest[before], count - (num_runs - before)) + 1)
        for before in range(num_runs + 1)
    ]


def _extended(
    sums: Sequence[int], limit: int, starts: range, ends: range, squares: dict[int, int]
) -> tuple[dict[int, int], dict[int, int]]:
    """Return the least sum of squares from each of `starts` on, and the best end of the run that begins there.

    `squares` are the least sums from each of `ends` on.

    The smallest best end never falls as the start rises, for squares of sums satisfy the quadrangle inequality; so the
    best end of the middle start bounds those of both halves (Galil and Park 1992, divide and conquer).
    """
    found: dict[int, int] = {}
    best_ends: dict[int, int] = {}
    # A stack and no recursion: spans of starts that are still open, each with the ends that may be best there.
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
        # Monotone best ends: to the left of `middle` none lies beyond `end`, to the right none before it.
        open_spans += ((first, middle, low, end + 1), (middle + 1, stop, end, high))
    return found, best_ends


def _smallest_limit(costs: list[int], num_runs: int) -> int:
    """Return the smallest largest sum of `num_runs` runs, by bisection over the limit of a run.

    Under a limit, filling each run greedily needs the fewest runs."""
    # Costs are whole numbers, so the bisection ends at the exact limit.
    low, high = max(costs), sum(costs)
    while low < high:
        middle = (low + high) // 2
        if _runs_needed(costs, middle) <= num_runs:
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
