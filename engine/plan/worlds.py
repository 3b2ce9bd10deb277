"""World sizes on which a run can start, and why its neighbours cannot: asked of `engine.config.resolve`, not retold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engine.config.resolve import Layout, examine
from engine.config.schema.run import RunConfig
from engine.errors import PalimpsestError


@dataclass(frozen=True)
class Refusal:
    """A layout that was tried, as overrides, and the rules that it breaks."""

    layout: str
    problems: tuple[PalimpsestError, ...]


def valid_worlds(config: RunConfig, largest: int) -> list[int]:
    """Every world size up to `largest` on which the configuration can start as it is."""
    return [world for world in range(1, largest + 1) if not examine(config, world)[1]]


def with_parallel(config: RunConfig, **changes: Any) -> RunConfig:
    """The configuration with other values in its `parallel` section."""
    return config.model_copy(update={"parallel": config.parallel.model_copy(update=changes)})


def neighbours(config: RunConfig, world_size: int) -> tuple[list[Layout], list[Refusal]]:
    """Other ways to use the same world: layouts that would start, and those that would not with the reasons.

    Tried are every other ZeRO stage, and every pipe x tensor that divides the world, with what is left as data ranks.
    """
    fitting: list[Layout] = []
    refused: list[Refusal] = []
    parallel = config.parallel
    for zero_stage in range(4):
        if zero_stage != parallel.zero_stage:
            _try(with_parallel(config, zero_stage=zero_stage), world_size, f"ZeRO-{zero_stage}", None, refused)
    for pipe in divisors(world_size):
        for tensor in divisors(world_size // pipe):
            if (pipe, tensor) != (parallel.pipe, parallel.tensor):
                changed = with_parallel(config, pipe=pipe, tensor=tensor, data=None)
                _try(changed, world_size, f"pipe {pipe} x tensor {tensor}", fitting, refused)
    return fitting, refused


def _try(config: RunConfig, world_size: int, name: str, fitting: list[Layout] | None, refused: list[Refusal]) -> None:
    layout, problems = examine(config, world_size)
    if problems:
        refused.append(Refusal(name, tuple(problems)))
    elif fitting is not None and layout is not None:
        fitting.append(layout)


def divisors(number: int) -> list[int]:
    """All of them, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]
