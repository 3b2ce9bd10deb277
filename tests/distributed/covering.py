"""The cases of the parity matrix: a covering of all pairs of values, small enough to run.

Any two of a model, a layout (as a whole), a ZeRO stage, a schedule and each option that can stand together do so in one
of the cases at least: a defect that two of them make together is met. Greedy, in the manner of AETG (Cohen et al.
1997): the next case is the one of some random completions of a pair that is missing which brings the most new
pairs. Deterministic; the first cases bring the most.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import asdict
from functools import cache
from typing import Any

from tests.distributed.batches import GLOBAL_BATCH
from tests.distributed.cases import MODELS, Case

LAYOUTS = (
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
)
"""(pipe, tensor, data), worlds of at most 8."""
FACTORS: dict[str, tuple[Any, ...]] = {
    "model": ("gpt2-deep", "gpt2-padded", "llama-deep", "bert-deep", "modernbert-deep", "t5", "t5-v1.1"),
    "layout": LAYOUTS,
    "zero_stage": (0, 1, 2, 3),
    "schedule": (("1f1b", 1), ("gpipe", 1), ("1f1b", 2)),
    "decay": (True, False),
    "attention": ("document", "row"),
    "micro_batch_size": (1, 2, 4),
    "recompute": ("none", "selective", "full"),
    "gather": (None, "step"),
    "reduce": (None, "step"),
}
"""Micro-batches of 4 rows are fewer than four stages, and on two data ranks fewer than two."""
SEED = 5
TRIES = 200
"""Random completions after which a pair counts as one that cannot be."""
CHOICES = 30
"""Possible ones among which the best is taken."""

Choice = dict[str, Any]
"""A value for every factor."""


@cache
def covering(largest_world: int = 8) -> tuple[Case, ...]:
    """The cases, in worlds of at most so many ranks."""
    rng = random.Random(SEED)
    missing = set(
        itertools.chain.from_iterable(
            itertools.product([(one, value) for value in FACTORS[one]], [(other, value) for value in FACTORS[other]])
            for one, other in itertools.combinations(FACTORS, 2)
        )
    )
    cases = []
    for pair in sorted(missing, key=repr):
        if pair not in missing:
            continue
        found = list(itertools.islice(_completions(dict(pair), largest_world, rng), CHOICES))
        if found:
            best = max(found, key=lambda choice: len(_pairs(choice) & missing))
            missing -= _pairs(best)
            cases.append(_case(best))
    return tuple(cases)


def _completions(given: Choice, largest_world: int, rng: random.Random):
    for _ in range(TRIES):
        choice = {name: given.get(name, rng.choice(values)) for name, values in FACTORS.items()}
        if _possible(_case(choice), largest_world):
            yield choice


def _pairs(choice: Choice) -> set[tuple[tuple[str, Any], tuple[str, Any]]]:
    return set(itertools.combinations(choice.items(), 2))


def _case(choice: Choice) -> Case:
    (pipe, tensor, data), (schedule, virtual_stages) = choice["layout"], choice["schedule"]
    rest = {name: value for name, value in choice.items() if name not in ("layout", "schedule")}
    return Case(pipe=pipe, tensor=tensor, data=data, schedule=schedule, virtual_stages=virtual_stages, **rest)


def _possible(case: Case, largest_world: int) -> bool:
    """What `engine.config` accepts (a test asks it), short of worlds that are too large."""
    model = MODELS[case.model]
    return (
        case.world_size <= largest_world
        and case.pipe * case.virtual_stages <= model["num_layers"]
        and model["num_heads"] % case.tensor == model.get("num_kv_heads", model["num_heads"]) % case.tensor == 0
        and (case.pipe > 1 or (case.schedule, case.virtual_stages) == ("1f1b", 1))
        and (case.gather is None or case.zero_stage == 3)
        and (case.reduce is None or case.zero_stage >= 2)
        and GLOBAL_BATCH % (case.micro_batch_size * case.data) == 0
    )


def values_of(case: Case) -> dict[str, Any]:
    """The value of every factor that a case has."""
    fields = asdict(case)
    return {name: fields[name] for name in FACTORS if name not in ("layout", "schedule")} | {
        "layout": (case.pipe, case.tensor, case.data),
        "schedule": (case.schedule, case.virtual_stages),
    }
