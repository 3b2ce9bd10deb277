"""The cases of the parity matrix: a covering of what can stand together, small enough to run.

Any two values of a model, a layout (as a whole), a ZeRO stage, a schedule and each option stand together in one case at
least, and so do any values of the factors that meet in the same lines of code (`TOGETHER`): a defect that two of them
make together, or those, is met. What is possible is asked of `engine.config`, so a rule that falls brings its cases.
Greedy, in the manner of AETG (Cohen et al. 1997): the next case is the one of many random ones that brings the most
that is missing; what none of them has is looked for by itself. Deterministic; the first cases bring the most.

Every process that collects the tests makes this covering, so `engine.config` is not asked about each of the random
choices as a whole but about their parts (`RULED`), of which there are few, and about the cases in the end.

A case in bf16 is held to wider bounds, so it stands for the pairs that bf16 is in, and for no others.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from operator import itemgetter
from typing import Any

from engine.config.resolve import examine
from tests.distributed.cases import DROPOUT, Case, config_of

FACTORS: dict[str, tuple[Any, ...]] = {
    "model": ("gpt2-deep", "llama-deep", "bert-deep", "modernbert-deep", "t5", "t5-v1.1"),
    "dropout": (False, True),
    "vocab_multiple": (8, 128),  # with 128 three of four tensor ranks hold no real token
    "layout": (  # (pipe, tensor, data)
        (1, 1, 2),
        (1, 4, 2),
        (2, 1, 2),
        (2, 2, 1),
        (2, 2, 2),
        (2, 4, 1),
        (3, 1, 2),
        (3, 2, 1),
        (4, 1, 1),
        (4, 1, 2),
        (4, 2, 1),
    ),
    "sequence": (1, 2),
    "sequence_parallel": (False, True),
    "zero_stage": (0, 1, 2, 3),
    "schedule": (("1f1b", 1), ("gpipe", 1), ("1f1b", 2), ("1f1b", 3), ("zb-h1", 1)),
    "decay": (True, False),
    "attention": ("document", "row"),
    "micro_batch_size": (1, 2, 4),  # micro-batches of 4 rows are fewer than four stages, on two data ranks than two
    "recompute": ("none", "selective", "full"),
    "gather": (None, "step"),
    "reduce": (None, "step"),
    "gather_within": (None, 2),
    "optimizer": ("adamw", "muon"),
    "offload": ("none", "optimizer"),
    "dtype": ("fp32", "bf16"),
}
TOGETHER = (
    ("schedule", "zero_stage", "gather", "reduce"),
    ("schedule", "recompute", "dropout"),
    ("zero_stage", "sequence", "sequence_parallel"),
)
RULED = (
    ("layout", "sequence", "micro_batch_size"),
    ("model", "layout", "schedule"),
    ("model", "layout", "vocab_multiple"),
    ("model", "layout", "sequence", "sequence_parallel"),
    ("layout", "sequence", "zero_stage", "schedule", "gather", "reduce", "gather_within"),
    ("zero_stage", "optimizer", "offload", "dtype"),
)
"""Factors that one rule or several rules of `engine.config` read together; a test holds them to the whole."""
OPTIONS = tuple(name for name in FACTORS if name not in ("model", "layout", "zero_stage", "schedule"))
LARGEST_WORLD = 8
SEED = 5
DRAWS = 30000
"""Random choices among which the next case is looked for; most of them are none that can be."""
TRIES = 400
"""Random completions after which what is missing counts as something that cannot be."""

Choice = dict[str, Any]
"""A value for every factor."""
Target = tuple[tuple[str, Any], ...]
"""Values that shall stand together."""
Bits = list[tuple[Callable[[tuple[Any, ...]], Any], dict[Any, int]]]
"""For some factors: their values out of a value of each, and the bit of the target that these are."""


@cache
def covering() -> tuple[Case, ...]:
    """The cases of the matrix."""
    rng = random.Random(SEED)
    cases, missing = _greedy(_pool(), (1 << len(targets())) - 1, limit=None)
    for place, target in enumerate(targets()):
        if missing >> place & 1:
            more, missing = _greedy(_masked(_draws(dict(target), TRIES, rng)), missing, limit=1)
            cases += more
    return tuple(cases)


def first_cases(number: int, largest_world: int) -> list[Case]:
    """The first of a covering in worlds of at most so many ranks: those bring most."""
    small = [(mask, case) for mask, case in _pool() if case.world_size <= largest_world]
    return _greedy(small, (1 << len(targets())) - 1, limit=number)[0]


def groups() -> Iterator[tuple[str, ...]]:
    """Factors of which any values shall stand together."""
    return itertools.chain(itertools.combinations(FACTORS, 2), TOGETHER)


@cache
def targets() -> tuple[Target, ...]:
    """Everything that shall stand together, possible or not."""
    return tuple(
        tuple(zip(names, values, strict=True))
        for names in groups()
        for values in itertools.product(*(FACTORS[name] for name in names))
    )


def covered(choice: Choice) -> set[Target]:
    """The targets that a case with these values stands for."""
    return {
        tuple((name, choice[name]) for name in names)
        for names in groups()
        if choice["dtype"] == "fp32" or "dtype" in names
    }


def values_of(case: Case) -> Choice:
    """The value of every factor that a case has."""
    composed = {
        "model": case.model.removesuffix(DROPOUT),
        "dropout": case.model.endswith(DROPOUT),
        "layout": (case.pipe, case.tensor, case.data),
        "schedule": (case.schedule, case.chunks_per_stage),
    }
    return {name: composed[name] if name in composed else getattr(case, name) for name in FACTORS}


@cache
def _pool() -> list[tuple[int, Case]]:
    return _masked(_draws({}, DRAWS, random.Random(SEED)))


def _masked(draws: Iterable[tuple[Any, ...]]) -> list[tuple[int, Case]]:
    """Bits of the targets that each stands for (`covered`), and the case."""
    dtype = list(FACTORS).index("dtype")
    every, in_bf16 = _bits("fp32"), _bits("bf16")
    return [
        (
            sum(bits[chosen(values)] for chosen, bits in (every if values[dtype] == "fp32" else in_bf16)),
            case_of(dict(zip(FACTORS, values, strict=True))),
        )
        for values in draws
    ]


@cache
def _bits(dtype: str) -> Bits:
    """Of the groups that a case in `dtype` stands for."""
    found: Bits = []
    places = {target: place for place, target in enumerate(targets())}
    for names in groups():
        if dtype == "fp32" or "dtype" in names:
            combined = itertools.product(*(FACTORS[name] for name in names))
            bits = {values: 1 << places[tuple(zip(names, values, strict=True))] for values in combined}
            found.append((itemgetter(*_numbers(names)), bits))
    return found


def _numbers(names: tuple[str, ...]) -> list[int]:
    """Where factors stand among all."""
    return [list(FACTORS).index(name) for name in names]


def _greedy(pool: list[tuple[int, Case]], missing: int, limit: int | None) -> tuple[list[Case], int]:
    """Cases until they bring nothing more, or so many; and what is missing then.

    The next is the one that brings most, of these the smallest world, of these the first. What a case brings only
    shrinks, so whichever still brings what puts it first is that one, and the others need not be counted again.
    """
    cases: list[Case] = []
    queue = [((-len(targets()), case.world_size, place), mask, case) for place, (mask, case) in enumerate(pool)]
    heapq.heapify(queue)
    while queue and (limit is None or len(cases) < limit):
        (before, world_size, place), mask, case = heapq.heappop(queue)
        brings = (mask & missing).bit_count()
        if brings < -before:
            heapq.heappush(queue, ((-brings, world_size, place), mask, case))
        elif brings == 0:
            break
        elif accepted(case):
            missing &= ~mask
            cases.append(case)
    return cases, missing


def _draws(given: Choice, number: int, rng: random.Random) -> Iterator[tuple[Any, ...]]:
    """Those of so many random choices with the `given` values that can be, a value for each factor in order."""
    drawn = [
        ((given[name],) if name in given else values, name in given, name in OPTIONS)
        for name, values in FACTORS.items()
    ]
    random_number = rng.random
    for _ in range(number):
        plain = random_number()  # few options at once in some draws, or hardly anything could be
        chosen = tuple(
            [
                values[0]
                if is_given or random_number() < (plain if is_option else 0.0)
                else values[int(random_number() * len(values))]
                for values, is_given, is_option in drawn
            ]
        )
        if _possible(chosen):
            yield chosen


def possible(choice: Choice) -> bool:
    """Whether the world is small enough, every option does something, and `engine.config` accepts the case."""
    return _possible(tuple(choice[name] for name in FACTORS))


def _possible(values: tuple[Any, ...]) -> bool:
    return all(_part_possible(names, chosen(values)) for names, chosen in _RULED)


_RULED = [(names, itemgetter(*_numbers(names))) for names in RULED]


@cache
def _part_possible(names: tuple[str, ...], values: tuple[Any, ...]) -> bool:
    """Whether these values are possible where every other factor has its first value."""
    choice = {name: options[0] for name, options in FACTORS.items()} | dict(zip(names, values, strict=True))
    return does_something(choice) and accepted(case_of(choice))


def does_something(choice: Choice) -> bool:
    """Whether the world is small enough and every option says something there."""
    pipe, tensor, data = choice["layout"]
    return not (
        pipe * tensor * data * choice["sequence"] > LARGEST_WORLD
        or (pipe == 1 and choice["schedule"] != ("1f1b", 1))
        or (tensor == 1 and choice["sequence_parallel"])
        or (choice["zero_stage"] < 2 and choice["reduce"])
    )


def accepted(case: Case) -> bool:
    """Whether `engine.config` accepts a case as a whole."""
    return not examine(config_of(case), case.world_size)[1]


def case_of(choice: Choice) -> Case:
    """The case that has these values."""
    (pipe, tensor, data), (schedule, chunks_per_stage) = choice["layout"], choice["schedule"]
    composed = ("model", "dropout", "layout", "schedule")
    return Case(
        model=choice["model"] + DROPOUT * choice["dropout"],
        pipe=pipe,
        tensor=tensor,
        data=data,
        schedule=schedule,
        chunks_per_stage=chunks_per_stage,
        **{name: value for name, value in choice.items() if name not in composed},
    )
