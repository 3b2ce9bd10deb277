"""Validation loss: the mean over every target of the held-out data, each counted once, equal in every layout."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from engine.errors import EnvironmentProblem
from engine.logs import phase
from engine.parallel.agreement import on_first
from engine.parallel.collectives import Group
from engine.parallel.pipeline import Pipeline
from engine.train.feed import Feed
from engine.train.hooks import Hook, Run
from engine.train.metrics import Record, is_evaluation
from engine.train.records import records_of
from engine.train.step_totals import Sums, means

VALIDATION_LOSS = "validation_loss"


class Validation(Hook):
    """Hook that records the validation loss every `evaluation.every_steps` steps and at the end of a run stage."""

    def start(self, run: Run) -> bool:
        """Make up for the evaluation that the start before did not come to."""
        step = run.state.step
        with phase("the evaluation that the start before did not come to"):
            missing = step > 0 and self._is_due(run) and not is_recorded(run.config.folder, step, run.groups.world)
            return missing and self._evaluate(run)

    def between_steps(self, run: Run) -> bool:
        return self._is_due(run) and self._evaluate(run)

    @staticmethod
    def _is_due(run: Run) -> bool:
        every_steps = run.config.evaluation.every_steps
        return run.ends_run_stage or (every_steps is not None and run.state.step % every_steps == 0)

    @staticmethod
    def _evaluate(run: Run) -> bool:
        """Return True if any rank was asked to stop meanwhile, so that the next start has to evaluate."""
        if run.feed.validation is None:
            return False
        step, begin = run.state.step, time.perf_counter()
        with run.spent.phase("evaluation"):
            found = evaluate(
                run.pipeline,
                run.feed,
                run.sums,
                lambda: run.heart.beat(step, "evaluation"),
                lambda: run.signals.stop_requested,
            )
        if found is not None:
            run.write({"step": step, **found, "validation_seconds": time.perf_counter() - begin})
        return found is None


def evaluate(
    pipeline: Pipeline, feed: Feed, sums: Sums, beat: Callable[[], None], stop_requested: Callable[[], bool]
) -> Record | None:
    """Return the record of `validation_loss`, the mean over all validation targets, and of `validation_loss/NAME` of
    each data set that has a name; or None where any rank was asked to stop.

    `beat` is called before each chunk. Collective over the world.
    """
    assert feed.validation is not None
    names = feed.validation.names
    shape = (1 + len(names), len(sums.names))  # of all data sets, then of each
    # fp64, and divided once at the end: the mean of the chunks' means would weigh a short last chunk too much.
    losses, weights = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    chunks = feed.validation_chunks()
    for _ in range(feed.num_validation_chunks):
        beat()
        # Every rank draws exactly `num_validation_chunks` times, also one that reads nothing: each turn is collective.
        inputs, weights_L, weights_KL = sums.of_weights(lambda: next(chunks), len(names))
        by_domain = sums.by_domain(len(names))
        sums_L = pipeline.evaluate(inputs, **({} if by_domain is None else {"by_domain": by_domain}))
        # The request to stop travels with the losses, so all ranks leave the loop after the same chunk.
        found, (stop,), found_KL = sums.of_losses(sums_L, (float(stop_requested()),), by_domain)
        if stop:
            return None
        # (1, L) over (K, L)
        losses += torch.cat((torch.tensor([found], dtype=torch.float64), found_KL.cpu()))
        weights += torch.cat((weights_L.unsqueeze(0), weights_KL)).cpu()
    record = sums.record(means(losses[0].tolist(), weights[0].tolist()), VALIDATION_LOSS)
    return record | sums.record_domains(names, losses[1:], weights[1:], VALIDATION_LOSS)


def is_recorded(folder: Path, step: int, world: Group) -> bool:
    """Return True if the run's metrics have an evaluation of the step, as rank 0 finds. Collective over `world`."""
    return on_first(lambda: any(map(is_evaluation, records_of(folder, step))), world, EnvironmentProblem)
