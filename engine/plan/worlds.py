"""World sizes on which a run can start, and the rules that forbid others, as `engine.config.resolve` has them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from engine.config.resolve import Layout, check, examine, find_layout
from engine.config.rules.model import divisors
from engine.config.schema.run import RunConfig
from engine.errors import ConfigError, PalimpsestError, report

LARGEST_WORLD = 2**16
"""Ranks. No plan is made of more."""
SHOWN = 16
"""Worlds that an error names."""


@dataclass(frozen=True)
class Refusal:
    """A rule, and the layouts that were tried and break it, as overrides; its numbers are those of the first one."""

    problem: PalimpsestError
    layouts: tuple[str, ...]


def valid_worlds(config: RunConfig, largest: int) -> list[int]:
    """Return every world size up to `largest` on which the configuration can start as it is."""
    if check(config):
        return []
    parallel = config.parallel
    fixed = parallel.pipe * parallel.tensor * parallel.sequence
    worlds = [fixed * data for data in _data_sizes(config, largest // fixed)]
    return [world for world in worlds if world <= largest and not find_layout(config, world)[1]]


def _data_sizes(config: RunConfig, largest: int) -> Iterable[int]:
    """Return candidate numbers of data ranks, ascending; all that can be valid are among them."""
    sizes = [size for stage in config.stages for size in stage.batches.sizes]
    if config.parallel.data is not None:
        return [config.parallel.data]
    if config.elastic.pad_batch:
        # Any number of ranks divides a padded batch, as long as each rank has a sample of its own.
        return range(1, min(largest, *sizes) + 1)
    return divisors(math.gcd(*sizes))


def refusal(config: RunConfig, world_size: int, problems: list[PalimpsestError]) -> ConfigError:
    """Return the error of a run that breaks these rules on a world, with worlds on which it would start, if any.

    Rules that do not depend on the world are named alone: no world mends them.
    """
    told = report(problems, f"this run cannot start on {world_size:,} rank{'s' if world_size > 1 else ''}")
    if check(config):
        return told
    worlds = valid_worlds(config, LARGEST_WORLD)
    # Near in ratio and not in difference: from 8 ranks, 4 and 16 are equally far.
    nearest = sorted(sorted(worlds, key=lambda world: abs(math.log(world / world_size)))[:SHOWN])
    shown = ", ".join(map(str, nearest)) + (" and other numbers of" if len(worlds) > SHOWN else "")
    others = f"as it is, the run starts on {shown} ranks" if worlds else "as it is, the run starts on no world"
    return ConfigError(told.wrong, told.allowed, f"{told.remedy}; {others}" if told.remedy else others)


def with_parallel(config: RunConfig, **changes: Any) -> RunConfig:
    """Return the configuration with other values in its `parallel` section."""
    return config.model_copy(update={"parallel": config.parallel.model_copy(update=changes)})


def neighbours(config: RunConfig, world_size: int) -> tuple[list[Layout], list[Refusal]]:
    """Return other layouts of the same world that would start, and the rules that forbid others, each once.

    Tried are every other ZeRO stage, and every pipe x tensor that divides the world, with what is left as data ranks.
    """
    fitting: list[Layout] = []
    refused: dict[str, tuple[PalimpsestError, list[str]]] = {}
    parallel = config.parallel
    # A changed ZeRO stage keeps the layout, so only its refusals are of interest (`fitting` is None).
    for zero_stage in range(4):
        if zero_stage != parallel.zero_stage:
            _try(with_parallel(config, zero_stage=zero_stage), world_size, f"ZeRO-{zero_stage}", None, refused)
    for pipe in divisors(world_size):
        for tensor in divisors(world_size // pipe):
            if (pipe, tensor) != (parallel.pipe, parallel.tensor):
                changed = with_parallel(config, pipe=pipe, tensor=tensor, data=None)
                _try(changed, world_size, f"pipe {pipe} x tensor {tensor}", fitting, refused)
    return fitting, [Refusal(problem, tuple(layouts)) for problem, layouts in refused.values()]


def _try(
    config: RunConfig,
    world_size: int,
    name: str,
    fitting: list[Layout] | None,
    refused: dict[str, tuple[PalimpsestError, list[str]]],
) -> None:
    layout, problems = examine(config, world_size)
    if not problems and fitting is not None and layout is not None:
        fitting.append(layout)
    for problem in problems:
        refused.setdefault(cause(problem), (problem, []))[1].append(name)


def cause(problem: PalimpsestError) -> str:
    """Return the text that rules that differ in numbers alone share: the key that is wrong, and what is allowed."""
    # "parallel.tensor = 3 does not divide ..., one of 1, 2, 4" and the same with other numbers are one rule to a user.
    key = problem.wrong.partition(" = ")[0]
    return re.sub(r"\d+", "0", f"{key}: {re.sub(r'(, )?[0-9]+', '', problem.allowed)}")
