"""The cases of the parity matrix: a covering of what can stand together, small enough to run.

Any two values of a model, a layout (as a whole), a ZeRO stage, a schedule and each option stand together in one case at
least, and so do any values of the factors that meet in the same lines of code (`TOGETHER`): a defect that two of them
make together, or those, is met. What is possible is asked of `engine.config`, so a rule that falls brings its cases.
Greedy, in the manner of AETG (Cohen et al. 1997): the next case is the one of many random ones that brings the most
that is missing; what none of them has is looked for by itself. Deterministic; the first cases bring the most.

A case in bf16 is held to wider bounds, so it stands for the pairs that bf16 is in, and for no others.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator
from functools import cache
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


@cache
def covering() -> tuple[Case, ...]:
    """The cases of the matrix."""
    rng = random.Random(SEED)
    cases, missing = _greedy(_pool(), (1 << len(_places())) - 1, limit=None)
    for target, place in _places().items():
        if missing >> place & 1:
            more, missing = _greedy(_masked(_draws(dict(target), TRIES, rng)), missing, limit=1)
            cases += more
    return tuple(cases)


def first_cases(number: int, largest_world: int) -> list[Case]:
    """The first of a covering in worlds of at most so many ranks: those bring most."""
    small = [(mask, case) for mask, case in _pool() if case.world_size <= largest_world]
    return _greedy(small, (1 << len(_places())) - 1, limit=number)[0]


@cache
def targets() -> tuple[Target, ...]:
    """Everything that shall stand together, possible or not."""
    groups = itertools.chain(itertools.combinations(FACTORS, 2), TOGETHER)
    return tuple(
        tuple(zip(names, values, strict=True))
        for names in groups
        for values in itertools.product(*(FACTORS[name] for name in names))
    )


def covered(choice: Choice) -> set[Target]:
    """The targets that a case with these values stands for."""
    groups = itertools.chain(itertools.combinations(FACTORS, 2), TOGETHER)
    return {
        tuple((name, choice[name]) for name in names)
        for names in groups
        if choice["dtype"] == "fp32" or "dtype" in names
    }


def values_of(case: Case) -> Choice:
    """The value of every factor that a case has."""
    composed = {
        "model": case.model.removesuffix(DROPOUT),
        "dropout": case.model.endswith(DROPOUT),
        "layout": (case.pipe, case.tensor, case.data),
        "schedule": (case.schedule, case.virtual_stages),
    }
    return {name: composed[name] if name in composed else getattr(case, name) for name in FACTORS}


@cache
def _places() -> dict[Target, int]:
    """The bit of each target."""
    return {target: place for place, target in enumerate(targets())}


@cache
def _pool() -> list[tuple[int, Case]]:
    return _masked(_draws({}, DRAWS, random.Random(SEED)))


def _masked(draws: Iterable[Choice]) -> list[tuple[int, Case]]:
    """Bits of the targets that each stands for, and the case."""
    return [(sum(1 << _places()[target] for target in covered(choice)), case_of(choice)) for choice in draws]


def _greedy(pool: list[tuple[int, Case]], missing: int, limit: int | None) -> tuple[list[Case], int]:
    """Cases until they bring nothing more, or so many; and what is missing then."""
    cases: list[Case] = []
    while pool and (limit is None or len(cases) < limit):
        mask, case = max(pool, key=lambda one: ((one[0] & missing).bit_count(), -one[1].world_size))
        if mask & missing == 0:
            break
        missing &= ~mask
        cases.append(case)
    return cases, missing


def _draws(given: Choice, number: int, rng: random.Random) -> Iterator[Choice]:
    """Those of so many random choices with the `given` values that can be."""
    for _ in range(number):
        plain = rng.random()  # few options at once in some draws, or hardly anything could be
        choice = {
            name: given[name] if name in given else _draw(values, plain if name in OPTIONS else 0.0, rng)
            for name, values in FACTORS.items()
        }
        if possible(choice):
            yield choice


def _draw(values: tuple[Any, ...], plain: float, rng: random.Random) -> Any:
    return values[0] if rng.random() < plain else values[int(rng.random() * len(values))]


def possible(choice: Choice) -> bool:
    """Whether the world is small enough, every option does something, and `engine.config` accepts the case."""
    pipe, tensor, data = choice["layout"]
    if (
        pipe * tensor * data * choice["sequence"] > LARGEST_WORLD
        or (pipe == 1 and choice["schedule"] != ("1f1b", 1))
        or (tensor == 1 and choice["sequence_parallel"])
        or (choice["zero_stage"] < 2 and choice["reduce"])
    ):
        return False
    case = case_of(choice)
    return not examine(config_of(case), case.world_size)[1]


def case_of(choice: Choice) -> Case:
    """The case that has these values."""
    (pipe, tensor, data), (schedule, virtual_stages) = choice["layout"], choice["schedule"]
    composed = ("model", "dropout", "layout", "schedule")
    return Case(
        model=choice["model"] + DROPOUT * choice["dropout"],
        pipe=pipe,
        tensor=tensor,
        data=data,
        schedule=schedule,
        virtual_stages=virtual_stages,
        **{name: value for name, value in choice.items() if name not in composed},
    )
