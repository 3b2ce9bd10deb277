"""Validation loss: the mean over every target of the held-out data, each counted once, equal in every layout.

A run stage is evaluated on its own sets, and in a run of several on those of the earlier ones, too: what it forgets.
At its end come those of the later stages, and before its first step its own: what transfers to them
(`engine.train.ledger`). `validation_loss` is over its own sets alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import torch

from engine.config.schema.regularization import EMA
from engine.data.validation import ValidationSamples
from engine.errors import EXIT_USAGE, EnvironmentProblem, PalimpsestError
from engine.logs import logger, phase
from engine.parallel.agreement import on_first
from engine.parallel.collectives import Group
from engine.parallel.pipeline import Pipeline
from engine.parallel.zero.other_weights import weights_from
from engine.train.feed import Feed
from engine.train.hooks import Hook, Run
from engine.train.ledger_records import losses_risen
from engine.train.metrics import Record, is_evaluation
from engine.train.records import INITIAL_LOSS, VALIDATION_LOSS, records_of
from engine.train.step_totals import Sums, means

_log = logger(__name__)


class Forgotten(PalimpsestError):
    """An old domain has worsened beyond `evaluation.forgetting_limit`."""

    exit_code = EXIT_USAGE  # for a person to decide: a supervisor that started it again would only go on


class Validation(Hook):
    """Hook that records the validation loss every `evaluation.every_steps` steps and at the end of a run stage, and
    what the sets of earlier run stages have lost since those ended."""

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

    def begin_run_stage(self, run: Run) -> None:
        """Record the loss of sets that come up now for the first time, in a run of several stages, as `initial_loss`.

        Every start that goes on exactly here comes here: the first one that is not stopped meanwhile records it."""
        state, feed, config = run.state, run.feed, run.config
        if state.stage_step or len(config.stages) == 1:
            return
        # Before the first step of the run also those of later stages: the loss of the initial weights on each.
        sets = [feed.validation, feed.later if state.run_stage == 0 else None]
        if not any(sets) or _is_recorded(run.config.folder, state.step, INITIAL_LOSS, run.groups.world):
            return
        record: Record = {}
        for samples in sets:
            if samples is not None:
                found = self._pass(run, samples, INITIAL_LOSS)
                if found is None:
                    return
                alone = {f"{INITIAL_LOSS}/{run.run_stage.name}": found[INITIAL_LOSS]}
                record |= _of_sets(found) if samples.names else alone
        run.write({"step": state.step, **record})

    def _evaluate(self, run: Run) -> bool:
        """Return True if a stop was requested on any rank meanwhile, so that the next start has to evaluate."""
        feed, step, begin = run.feed, run.state.step, time.perf_counter()
        others = [samples for samples in (feed.earlier, feed.later if run.ends_run_stage else None) if samples]
        if feed.validation is None and not others:
            return False
        record: Record = {}
        with run.spent.phase("evaluation"):
            for samples in [*others, *([feed.validation] if feed.validation else [])]:
                found = self._pass(run, samples, VALIDATION_LOSS)
                if found is None:
                    return True
                # A loss over the sets of several other stages together says nothing.
                record |= found if samples is feed.validation else _of_sets(found)
            if run.run_stage.ema is not None and feed.validation is not None:
                found = self._averaged(run, feed.validation)
                if found is None:
                    return True
                record |= found
        forgotten = self._forgotten(run, record)
        run.write({"step": step, **record, **forgotten, "validation_seconds": time.perf_counter() - begin})
        self._raise_alarm(run, forgotten)
        return False

    @staticmethod
    def _forgotten(run: Run, record: Record) -> Record:
        """Return the rise of the loss of each earlier stage's set since that stage ended, and the mean of them."""
        config, number = run.config, run.state.run_stage
        if number == 0:
            return {}
        # Rank 0 alone has the records of earlier starts, and all ranks have to come to the same alarm.
        rises = on_first(
            lambda: losses_risen(config.folder, list(config.stages), number, record),
            run.groups.world,
            EnvironmentProblem,
        )
        whole = {"forgetting": fmean(rises.values())} if rises else {}
        return {f"forgetting/{name}": rise for name, rise in rises.items()} | whole

    @staticmethod
    def _raise_alarm(run: Run, forgotten: Record) -> None:
        """Warn, or save and end the run, where a set is forgotten beyond the limit; equal on every rank.

        Raises:
            Forgotten: `evaluation.on_forgetting` is `stop`.
        """
        evaluation, step = run.config.evaluation, run.state.step
        limit = evaluation.forgetting_limit
        beyond = {name: rise for name, rise in forgotten.items() if limit is not None and "/" in name and rise > limit}
        if not beyond:
            return
        named = ", ".join(f"{name.partition('/')[2]} by {rise:.4f}" for name, rise in beyond.items())
        words = f"step {step}: the held-out loss of earlier stages has risen beyond {limit:g} nats per token: {named}"
        if evaluation.on_forgetting == "warn":
            _log.warning("%s", words)
            return
        if run.checkpoints.begun_step != step:
            run.save(wait=True)  # what was trained is for the user to judge
        raise Forgotten(
            words,
            "evaluation.forgetting_limit",
            "raise the limit, or the share of earlier data in this stage, or lower its learning rate, and train again: "
            "the run goes on from here",
        )

    def _averaged(self, run: Run, samples: ValidationSamples) -> Record | None:
        """Return the losses of the averaged weights, or None where a stop was requested on any rank."""
        run.checkpoints.hold_update()  # a save may still copy weights and average, which change places
        with weights_from(run.pipeline.engine, EMA):
            return self._pass(run, samples, f"{EMA}_{VALIDATION_LOSS}")

    @staticmethod
    def _pass(run: Run, samples: ValidationSamples, what: str) -> Record | None:
        step = run.state.step
        return evaluate(
            run.pipeline,
            run.feed,
            run.sums,
            lambda: run.heart.beat(step, "evaluation"),
            lambda: run.requests.stop_requested,
            samples,
            what,
        )


def evaluate(
    pipeline: Pipeline,
    feed: Feed,
    sums: Sums,
    beat: Callable[[], None],
    stop_requested: Callable[[], bool],
    samples: ValidationSamples,
    what: str = VALIDATION_LOSS,
) -> Record | None:
    """Return the record of `what`, the mean over all targets of the samples, and of `WHAT/NAME` of each data set that
    has a name; or None where a stop was requested on any rank.

    `beat` is called before each chunk. Collective over the world.
    """
    names = samples.names
    shape = (1 + len(names), len(sums.names))  # of all data sets, then of each
    # fp64, and divided once at the end: the mean of the chunks' means would weigh a short last chunk too much.
    losses, weights = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    chunks = feed.validation_chunks(samples)
    for _ in range(feed.num_validation_chunks(samples)):
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
    record = sums.record(means(losses[0].tolist(), weights[0].tolist()), what)
    return record | sums.record_domains(names, losses[1:], weights[1:], what)


def _of_sets(record: Record) -> Record:
    """Return the entries of single data sets."""
    return {name: value for name, value in record.items() if "/" in name}


def is_recorded(folder: Path, step: int, world: Group) -> bool:
    """Return True if the run's metrics have an evaluation of the step, as rank 0 finds. Collective over `world`."""
    return on_first(lambda: any(map(is_evaluation, records_of(folder, step))), world, EnvironmentProblem)


def _is_recorded(folder: Path, step: int, name: str, world: Group) -> bool:
    def find() -> bool:
        return any(key.startswith(name) for record in records_of(folder, step) for key in record)

    return on_first(find, world, EnvironmentProblem)
