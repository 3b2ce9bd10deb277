"""Layers of a pretrained model that learn at other rates, or later than others: keys of a task file made into those of
run stages.

A model's layers are numbered from the embeddings on; the head of a task is behind them all.
"""

from __future__ import annotations

import math

from pydantic import Field

from engine.config.load import Tree
from engine.config.schema.model import ModelConfig
from engine.config.schema.section import Section
from engine.config.schema.stage import UnfreezingConfig
from engine.errors import ConfigError
from engine.plan.parameters import model_entries


class LayerKeys(Section):
    """Keys of a task's stage that are made into others; `RunStage` says what they mean."""

    layer_decay: float | None = Field(default=None, gt=0.0, le=1.0)
    unfreezing: UnfreezingConfig | None = None


def decayed_rates(model: ModelConfig, decay: float) -> dict[str, float]:
    """Return factors of the learning rate by pattern: 1 for the head, `decay` for the last layer, `decay` squared for
    the one before it, and so on to the embeddings (Howard and Ruder 2018, arXiv 1801.06146, section 3.2)."""
    factors = {f"layers.{layer}.*": decay ** (model.num_layers - layer) for layer in range(model.num_layers)}
    return factors | {"embed_*": decay ** (model.num_layers + 1)}


def unfrozen_stages(
    stage: Tree, model: ModelConfig, unfreezing: UnfreezingConfig, steps_per_epoch: float, peak: float
) -> list[Tree]:
    """Return the run stages of a gradual unfreezing (Howard and Ruder 2018, section 3.3), from a resolved stage whose
    learning rate has this `peak`.

    The first trains the last layers and the head, each further one `unfreezing.layers` layers more, the last of them
    everything to the end of the stage's duration. The learning rate runs over all of them as it would over one.

    Raises:
        ConfigError: the duration is too short, is not in steps, or the schedule is none that can be cut.
    """
    count = math.ceil(model.num_layers / unfreezing.layers)
    each, total = max(1, math.ceil(unfreezing.epochs * steps_per_epoch)), stage["duration"].get("steps", 0)
    if total <= count * each:
        raise ConfigError(
            f"stages.0.unfreezing takes {count} x {each} steps until everything is trained, of {total} steps in all",
            f"a duration of more than {count * each} steps",
            "lengthen stages.0.duration, unfreeze more layers at a time, or for fewer epochs",
        )
    names = [entry.name for entry in model_entries(model)]
    stages = []
    for number in range(count + 1):
        first = number * each
        steps = each if number < count else total - first
        frozen = [f"layers.{layer}.*" for layer in range(max(0, model.num_layers - (number + 1) * unfreezing.layers))]
        if number < count and any(name.startswith("embed_") for name in names):
            frozen.insert(0, "embed_*")
        changes = {
            "name": f"{stage['name']}-{number + 1}",
            "duration": {"steps": steps},
            "freeze": [*dict.fromkeys((*stage.get("freeze", ()), *frozen))],
            "schedule": _part(stage["schedule"], first, steps, total, peak),
        }
        stages.append(stage | changes)
    return stages


def _part(schedule: Tree, first: int, steps: int, total: int, peak: float) -> Tree:
    """Return the schedule of the steps [first, first + steps) of `total`, as one of its own.

    Raises:
        ConfigError: it has another shape than `linear` and `constant`, or warms up for longer than the first part.
    """
    shape, warmup = schedule.get("shape"), schedule.get("warmup", 0)
    if shape not in ("linear", "constant") or schedule.get("unit", "steps") != "steps" or schedule.get("decay"):
        raise ConfigError(
            f"stages.0.schedule.shape = {shape} with stages.0.unfreezing",
            "linear or constant, in steps, to the end of the run stage",
            "leave the schedule out",
        )
    own = {"warmup": warmup if first == 0 else 0}
    if shape == "constant":
        return schedule | own
    if first == 0 and warmup > steps:
        raise ConfigError(
            f"stages.0.schedule.warmup = {warmup} with stages.0.unfreezing, whose first run stage has {steps} steps",
            "a warm-up within the first run stage",
            "shorten the warm-up",
        )
    last = schedule.get("final_factor", 0.1)

    def factor(step: int) -> float:
        return 1 - (1 - last) * max(0, step - warmup) / (total - warmup)

    begin, end = factor(first), factor(first + steps)
    return schedule | own | {"learning_rate": schedule.get("learning_rate", peak) * begin, "final_factor": end / begin}
