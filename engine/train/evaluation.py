"""The held-out loss: over every held-out target once, the same in every layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from engine.errors import EnvironmentProblem
from engine.parallel.agreement import on_first
from engine.parallel.collectives import Group
from engine.parallel.pipeline import Pipeline
from engine.train.feed import Feed
from engine.train.metrics import Record, is_evaluation
from engine.train.records import records_of
from engine.train.step_totals import Sums, means

VALIDATION_LOSS = "validation_loss"


def evaluate(
    pipeline: Pipeline, feed: Feed, sums: Sums, beat: Callable[[], None], asked: Callable[[], bool]
) -> Record | None:
    """The record of `validation_loss`, the mean over all held-out targets, and of `validation_loss/NAME` of each data
    set that has a name; or None where a rank is `asked` to stop.

    `beat` is called before each chunk. Collective over the world.
    """
    assert feed.held_out is not None
    names = feed.held_out.names
    shape = (1 + len(names), len(sums.names))  # of all data sets, then of each
    losses, weights = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    chunks = feed.held_out_chunks()
    for _ in range(feed.num_held_out_chunks):
        beat()
        inputs, weights_L, weights_KL = sums.of_weights(lambda: next(chunks), len(names))
        by_domain = sums.by_domain(len(names))
        sums_L = pipeline.evaluate(inputs, **({} if by_domain is None else {"by_domain": by_domain}))
        found, (stop,), found_KL = sums.of_losses(sums_L, (float(asked()),), by_domain)
        if stop:
            return None
        losses += torch.cat((torch.tensor([found], dtype=torch.float64), found_KL.cpu()))
        weights += torch.cat((weights_L.unsqueeze(0), weights_KL)).cpu()
    record = sums.record(means(losses[0].tolist(), weights[0].tolist()), VALIDATION_LOSS)
    return record | sums.record_domains(names, losses[1:], weights[1:], VALIDATION_LOSS)


def is_recorded(folder: Path, step: int, world: Group) -> bool:
    """Return on every rank what rank 0 finds: whether the run's metrics have an evaluation of the step."""
    return on_first(lambda: any(map(is_evaluation, records_of(folder, step))), world, EnvironmentProblem)
