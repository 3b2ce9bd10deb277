"""The held-out loss: over every held-out target once, the same in every layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from engine.errors import EnvironmentProblem
from engine.parallel.agreement import on_first
from engine.parallel.collectives import Group
from engine.parallel.pipeline import Pipeline
from engine.train.feed import Feed
from engine.train.metrics import is_evaluation
from engine.train.records import records_of
from engine.train.sums import Sums


def evaluate(
    pipeline: Pipeline, feed: Feed, sums: Sums, beat: Callable[[], None], asked: Callable[[], bool]
) -> list[float] | None:
    """The mean of each loss over its held-out targets (0 where it has none), or None where a rank is `asked` to stop.

    `beat` is called before each chunk. Collective over the world.
    """
    losses, weights = [0.0] * len(sums.names), [0.0] * len(sums.names)
    chunks = feed.held_out_chunks()
    for _ in range(feed.num_held_out_chunks):
        beat()
        inputs, weights_L = sums.of_weights(lambda: next(chunks))
        found, (stop,) = sums.of_losses(pipeline.evaluate(inputs), (float(asked()),))
        if stop:
            return None
        losses = [total + one for total, one in zip(losses, found, strict=True)]
        weights = [total + one for total, one in zip(weights, weights_L.tolist(), strict=True)]
    return [loss / weight if weight else 0.0 for loss, weight in zip(losses, weights, strict=True)]


def is_recorded(folder: Path, step: int, world: Group) -> bool:
    """Return on every rank what rank 0 finds: whether the run's metrics have an evaluation of the step."""
    return on_first(lambda: any(map(is_evaluation, records_of(folder, step))), world, EnvironmentProblem)
