"""Validation loss: the mean over every target of the held-out data, each counted once, equal in every layout.

A run stage is evaluated on its own sets, and in a run of several on those of the earlier ones, too: what it forgets.
At its end come those of the later stages, and before its first step its own: what transfers to them
(`engine.train.ledger`). `validation_loss` is over its own sets alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from engine.config.schema.regularization import EMA
from engine.data.validation import ValidationSamples
from engine.errors import EXIT_USAGE, DataError, EnvironmentProblem, PalimpsestError
from engine.logs import logger, phase
from engine.parallel.agreement import on_first
from engine.parallel.collectives import Group
from engine.parallel.pipeline import Pipeline
from engine.parallel.zero.other_weights import weights_from
from engine.train.feed import Feed
from engine.train.hooks import Hook, Run
from engine.train.ledger_records import losses_risen
from engine.train.metrics import Record, is_evaluation
from engine.train.predictions import Measure, RowLogits
from engine.train.ranked_choice import RankedChoice
from engine.train.records import INITIAL_LOSS, VALIDATION_LOSS, records_of
from engine.train.step_totals import Sums, means

FORGETTING = "forgetting/"
"""Beginning of the names of what the sets of earlier run stages have lost."""
_log = logger(__name__)


class Forgotten(PalimpsestError):
    """An old domain has worsened beyond `evaluation.forgetting_limit`."""

    exit_code = EXIT_USAGE  # for a person to decide: a supervisor that started it again would only go on


class Validation(Hook):
    """Hook that records the validation loss every `evaluation.every_steps` steps and at the end of a run stage, the
    measures of a task's predictions, and what the sets of earlier run stages have lost since those ended."""

    def __init__(self, measure: Measure | None = None) -> None:
        """Make the hook; `measure` None means that the run has no task with measures."""
        self._measure = measure
        self._choices = RankedChoice()

    def start(self, run: Run) -> bool:
        """Open the questions of `evaluation.tasks`; make up for the evaluation that the start before did not come
        to."""
        self._choices.open(run)
        if run.state.step == 0 or not self._is_due(run):
            return False
        with phase("the evaluation that the start before did not come to"):
            if not is_recorded(run.config.folder, run.state.step, run.groups.world):
                return self._evaluate(run)
        self._raise_again(run)
        return False

    def after_rollback(self, run: Run) -> None:
        """Raise the ratio of replay again where the evaluation at this step did."""
        if run.state.step and self._is_due(run):
            self._raise_again(run)

    def between_steps(self, run: Run) -> bool:
        return self._is_due(run) and self._evaluate(run)

    @staticmethod
    def _is_due(run: Run) -> bool:
        every_steps = run.config.evaluation.every_steps
        return run.ends_run_stage or (every_steps is not None and run.state.step % every_steps == 0)

    def begin_run_stage(self, run: Run) -> None:
        """Record the loss of sets that come up now for the first time, in a run of several stages or one that replays
        text beside a task, as `initial_loss`.

        Every start that goes on exactly here comes here: the first one that is not stopped meanwhile records it."""
        state, feed, config = run.state, run.feed, run.config
        if state.stage_step or (len(config.stages) == 1 and feed.replayed is None):
            return
        # Before the first step of the run also those of later stages: the loss of the initial weights on each.
        sets = [feed.validation, feed.later if state.run_stage == 0 else None, feed.replayed]
        if not any(sets) or _is_recorded(run.config.folder, state.step, INITIAL_LOSS, run.groups.world):
            return
        record: Record = {}
        for samples in sets:
            if samples is not None:
                found = self._pass(run, samples, INITIAL_LOSS)
                if found is None:
                    return
                measures = {name: value for name, value in found.items() if not name.endswith(INITIAL_LOSS)}
                alone = {f"{INITIAL_LOSS}/{run.run_stage.name}": found[INITIAL_LOSS]}
                record |= _of_sets(found) if samples.names else measures | alone
        run.write({"step": state.step, **record})

    def _evaluate(self, run: Run) -> bool:
        """Return True if a stop was requested on any rank meanwhile, so that the next start has to evaluate."""
        feed, step, begin = run.feed, run.state.step, time.perf_counter()
        sets = (feed.earlier, feed.later if run.ends_run_stage else None, feed.replayed)
        others = [samples for samples in sets if samples]
        if feed.validation is None and not others and not run.config.evaluation.tasks:
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
            found = self._choices.evaluate(run)
            if found is None:
                return True
            record |= found
        forgotten = self._forgotten(run, record)
        run.write({"step": step, **record, **forgotten, "validation_seconds": time.perf_counter() - begin})
        beyond = self._beyond(run, forgotten)
        if beyond:
            self._raise_alarm(run, beyond)
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
        return {f"{FORGETTING}{name}": rise for name, rise in rises.items()} | whole

    @staticmethod
    def _beyond(run: Run, record: Record) -> dict[str, float]:
        """Return the sets that a record says are forgotten beyond the limit, and how far."""
        limit = run.config.evaluation.forgetting_limit
        rises = {name.removeprefix(FORGETTING): rise for name, rise in record.items() if name.startswith(FORGETTING)}
        return {name: rise for name, rise in rises.items() if limit is not None and rise > limit}

    @staticmethod
    def _raise_alarm(run: Run, beyond: dict[str, float]) -> None:
        """Warn, raise the ratio of replay, or save and end the run; the same on every rank.

        Raises:
            Forgotten: `evaluation.on_forgetting` is `stop`.
        """
        evaluation, step = run.config.evaluation, run.state.step
        named = ", ".join(f"{name} by {rise:.4f}" for name, rise in beyond.items())
        limit = f"{evaluation.forgetting_limit:g} nats per token"
        words = f"step {step}: the held-out loss of earlier stages has risen beyond {limit}: {named}"
        if evaluation.on_forgetting == "raise":
            ratio = next_ratio(run)
            if ratio is not None:
                run.raise_replay(ratio)
            what = "cannot be raised further" if ratio is None else f"is {ratio:g} from the next step on"
            _log.warning("%s; the ratio of replay %s", words, what)
            return
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

    def _raise_again(self, run: Run) -> None:
        """Raise the ratio of replay as the recorded evaluation of this step did: the checkpoint of a step is saved
        before its evaluation, and does not know of it. Collective over the world."""
        state, config = run.state, run.config
        if config.evaluation.on_forgetting != "raise" or (state.run_stage, state.stage_step) in (
            found[:2] for found in state.raised_ratios
        ):
            return
        records = on_first(lambda: records_of(config.folder, state.step), run.groups.world, EnvironmentProblem)
        beyond = [found for record in records if (found := self._beyond(run, record))]
        if beyond:
            self._raise_alarm(run, beyond[-1])

    def _pass(self, run: Run, samples: ValidationSamples, what: str) -> Record | None:
        step = run.state.step
        logits = None
        if self._measure is not None and samples is run.feed.validation and samples.is_measured:
            logits = RowLogits(samples, run.groups, run.config.parallel.micro_batch_size)
        found = evaluate(
            run.pipeline,
            run.feed,
            run.sums,
            lambda: run.heart.beat(step, "evaluation"),
            lambda: run.requests.stop_requested,
            samples,
            what,
            logits,
        )
        return found if found is None or logits is None else found | self._measured(run, samples, what, logits)

    def _measured(self, run: Run, samples: ValidationSamples, what: str, logits: RowLogits) -> Record:
        """Return the measures of predictions, by names that begin as `what` does. Collective over the world."""
        measure, rows = self._measure, logits.gathered()
        assert measure is not None
        # by one rank: all of them have to come to the same numbers, bit for bit
        found = on_first(lambda: measure(run.run_stage, samples.datasets[0], rows), run.groups.world, DataError)
        return {f"{what.removesuffix('loss')}{name}": value for name, value in found.items()}


def next_ratio(run: Run) -> float | None:
    """Return the ratio of replay that an alarm raises it to; None where none is left, or nothing is replayed."""
    stream = run.feed.stream
    if stream.shares.ratios is None or run.ends_run_stage:
        return None
    now = stream.shares.ratio(run.state.stage_step)
    return next((ratio for ratio in run.config.evaluation.raised_ratios if Fraction(str(ratio)) > now), None)


def evaluate(
    pipeline: Pipeline,
    feed: Feed,
    sums: Sums,
    beat: Callable[[], None],
    stop_requested: Callable[[], bool],
    samples: ValidationSamples,
    what: str = VALIDATION_LOSS,
    logits: RowLogits | None = None,
) -> Record | None:
    """Return the record of `what`, the mean over all targets of the samples, and of `WHAT/NAME` of each data set that
    has a name; or None where a stop was requested on any rank.

    `beat` is called before each chunk. `logits` takes those of a task's head. Collective over the world.
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
        pipeline.spec = feed.spec
        given: dict[str, Any] = {} if by_domain is None else {"by_domain": by_domain}
        made: list[torch.Tensor] = []
        if logits is not None:
            given["logits"] = made
        sums_L = pipeline.evaluate(inputs, **given)
        if logits is not None:
            logits.add(made)
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
