"""One rank of a run: builds, restores or begins, goes step by step, evaluates, saves, and goes back past spikes.

The loop reads top to bottom in `Trainer.fit`. Every rank goes through the same calls in the same order; what only
one rank does (metrics, messages) waits for nobody.
"""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from functools import partial

import torch

from engine.config.rank_environment import RankEnvironment
from engine.config.schema.run import RunConfig
from engine.data.shards.damage import DamagedShard
from engine.errors import EXIT_DONE, EXIT_REQUEUE, DataError, EnvironmentProblem
from engine.heartbeat import Heartbeat
from engine.logs import logger, phase
from engine.models.families import family
from engine.optim.schedules import factor_of_step
from engine.parallel.agreement import on_all
from engine.parallel.boundary import Tensors
from engine.parallel.groups import Groups
from engine.parallel.meeting import agree_over
from engine.parallel.pipeline import Pipeline
from engine.train.build import build_pipeline
from engine.train.checks import check_invariants
from engine.train.evaluation import evaluate, is_recorded
from engine.train.facts import facts_of_data
from engine.train.feed import Feed, open_datasets
from engine.train.metrics import Metrics, Record, open_metrics
from engine.train.records import last_step
from engine.train.restart import SHOWN_SAMPLES, Restarts
from engine.train.signals import Stopping, StopSignals
from engine.train.stability import REMEDY, Guard, Unstable, Verdict
from engine.train.state import TrainState
from engine.train.step_totals import Sums
from engine.train.summary import Spent, process_seconds, summary

_log = logger(__name__)


class Trainer:
    """One rank of a run. `state` is where the run stands, equal on every rank."""

    def __init__(
        self,
        config: RunConfig,
        groups: Groups,
        place: RankEnvironment,
        device: torch.device,
        signals: StopSignals,
        heart: Heartbeat,
    ) -> None:
        self.config, self.groups, self.device, self.signals, self.heart = config, groups, device, signals, heart
        self.run_stage = config.stages[0]
        self.num_steps, self.batches = self.run_stage.num_steps, self.run_stage.batches
        self.sums = Sums(family(config.model).losses(config.model), groups, device)
        self.spent = Spent()
        self.restarts = Restarts(config, groups, place)
        with phase("taking the run folder"):
            self.restarts.claim()
        with phase("opening the data"):
            training, held_out = on_all(lambda: open_datasets(config, self.run_stage), groups.world, DataError)
            facts = on_all(lambda: facts_of_data(config, training, held_out), groups.world, DataError)
            agree_over(groups.world, facts)
            self.feed = on_all(
                lambda: Feed(training, held_out, config, self.run_stage, groups, device, lambda: signals.asked),
                groups.world,
                DataError,
            )
        with phase("building the model"):
            self.pipeline: Pipeline = build_pipeline(config, self.run_stage, groups, device)
        self.heart.beat(0, "load")
        with phase("looking for a checkpoint and loading it"):
            self.state = self._restore()
        with phase("taking the memory of saves"):
            self.restarts.reserve(self.pipeline.engine)
        self.speaks = groups.global_rank == 0
        with phase("opening metrics and trackers"):
            self.metrics = on_all(self._open_metrics, groups.world, EnvironmentProblem)

    def fit(self) -> int:
        """Trains to the end (`EXIT_DONE`) or until a signal (`EXIT_REQUEUE`). Collective over the world."""
        self.feed.start()
        self.spent.add("start", process_seconds())
        if self.state.step >= self.num_steps:
            _log.info("step %d of %d: nothing left to train", self.state.step, self.num_steps)
        with phase("the evaluation that the start before did not come to"):
            if self._evaluation_is_missing() and self._evaluate():
                return EXIT_REQUEUE
        first = self.state.step
        while self.state.step < self.num_steps:
            with phase("the first step") if self.state.step == first else nullcontext():
                stop = self._step()
            offending = self.guard.offending()
            if offending is not None and not stop:
                self._roll_back(offending)
                continue
            last = self.state.step == self.num_steps
            if stop or last or _due(self.state.step, self.config.checkpoint.every_steps):
                self._save(wait=stop or last)
            elif _due(self.state.step, self._memory_every_steps):
                self.heart.beat(self.state.step, "save")
                with self.spent.phase("checkpoints"):
                    self.restarts.keep(self.state, self.pipeline.engine, self.feed.stream)
            if stop and not last:
                return EXIT_REQUEUE
            if self._evaluates():
                stop = self._evaluate()
                if stop and not last:
                    self._save(wait=True)
                if stop:
                    return EXIT_REQUEUE
        return EXIT_DONE

    def close(self) -> None:
        """Ends threads and trackers; safe after an error."""
        self.heart.beat(self.state.step, "end")
        self.restarts.abandon()
        self.feed.close()
        self.metrics.close()

    def summary(self, code: int) -> str:
        """The last words of a run that ends with this exit code; rank 0 has them all."""
        return summary(self.config, self.state, self.spent, process_seconds(), code)

    def _step(self) -> bool:
        """One step, or none where a rank is to stop and has no data; returns whether any rank was asked to stop."""
        begin = time.perf_counter()
        state = self.state
        learning_rate = self.config.optimizer.learning_rate * factor_of_step(self.run_stage, state.step)
        position = self.feed.stream.position
        self.heart.beat(state.step, "data")
        try:
            inputs, weights_L, weights_KL = self._read()
        except Stopping:
            self.feed.step_back()
            return True
        self.heart.beat(state.step, "forward and backward")
        scales_L = self.sums.scales(weights_L)
        # DeepSpeed averages gradients over the data ranks; the factor undoes it.
        scales, by_domain = (self.groups.zero.size * scales_L).float(), self.sums.by_domain(len(weights_KL))
        apart = {} if by_domain is None else {"by_domain": by_domain}
        sums_L = self.pipeline.train(inputs, scales, **apart)
        flags = (float(self.signals.asked), *self.restarts.signals())
        self.heart.beat(state.step, "loss")
        losses, (stop, done, failed), sums_KL = self.sums.of_losses(sums_L * scales_L, flags, by_domain)
        verdict, gradient_norm = self._update(sum(losses), position, learning_rate)
        tokens = self._count_step(sum(losses), updated=verdict == "accept")
        seconds = time.perf_counter() - begin
        record: Record = {
            "step": state.step,
            **self.sums.record(losses, "loss"),
            **self.sums.record_domains(self.feed.domains, sums_KL, weights_KL, "loss"),
            "gradient_norm": gradient_norm,
            "learning_rate": learning_rate,
            "samples": state.samples,
            "tokens": state.tokens,
            "step_seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "data_wait_seconds": self.feed.wait_seconds,
        }
        record |= {f"{name}_samples": count for name, count in self.feed.stream.drawn().items()}
        length = self.run_stage.sequence_length
        record |= {f"tokens/{name}": count * length for name, count in self.feed.stream.trained().items()}
        if lost := len(self.feed.stream.lost):
            record["lost_shards"] = lost
        if verdict != "accept":
            record["skipped"] = 1
        self.metrics.write(record)
        self.spent.step(seconds, record["data_wait_seconds"], tokens)
        self.restarts.advance(done, failed)
        return stop > 0

    def _update(self, loss: float, position: int, learning_rate: float) -> tuple[Verdict, float]:
        """Updates the weights if the step is found to be sound; returns what it was found to be, and the gradient's
        norm. `position` is that of the step's first sample. Collective over the world."""
        step = self.state.step
        verdicts: list[Verdict] = []

        def accept(norm: float) -> bool:
            self.restarts.hold_update()
            verdicts.append(self.guard.judge(step, position, loss, norm))
            return verdicts[0] == "accept"

        self.heart.beat(step, "optimizer step")
        gradient_norm = self.pipeline.engine.step(learning_rate, accept)
        if self.config.checks:
            check_invariants(self.pipeline.engine, self.groups)
        if verdicts[0] != "accept":
            _log.warning("step %d is skipped: loss %.6g, gradient norm %.6g", step + 1, loss, gradient_norm)
        return verdicts[0], gradient_norm

    def _count_step(self, loss: float, updated: bool) -> int:
        """Moves the state past a step; returns its tokens."""
        state, samples = self.state, self.batches.size(self.state.step)
        state.step += 1
        state.updates += updated
        state.samples += samples
        state.tokens += samples * self.run_stage.sequence_length
        if math.isfinite(loss):
            state.loss = loss
        return samples * self.run_stage.sequence_length

    @property
    def _memory_every_steps(self) -> int | None:
        memory = self.config.checkpoint.memory
        return memory.every_steps if memory is not None else None

    @property
    def guard(self) -> Guard:
        """Judges steps, by what `state` remembers of those before."""
        return Guard(self.config.stability, self.state.stability)

    def _roll_back(self, first: int) -> None:
        """Goes back to the newest whole checkpoint, and leaves out the samples from position `first` to the last drawn.

        What is left out is saved at once, so that a restart knows of it. Collective over the world.

        Raises:
            Unstable: there is no checkpoint.
        """
        self.heart.beat(self.state.step, "load")
        stream, rollbacks, spiked = self.feed.stream, self.state.stability.rollbacks + 1, self.state.step
        left_out, end = stream.left_out, stream.position
        self.feed.close()
        self.metrics.close()
        restored = self.restarts.restore(self.pipeline.engine, stream, go_back=True)
        if restored is None:
            raise Unstable(
                f"step {spiked}: the loss spikes before the first checkpoint", "a checkpoint to go back to", REMEDY
            )
        for interval in (*left_out, (first, end)):
            stream.leave_out(*interval)
        self.state = restored.state
        self.state.stability = self.state.stability.after_rollback(rollbacks)
        self.metrics = on_all(self._open_metrics, self.groups.world, EnvironmentProblem)
        # Before the save: a kill between the two leaves a record that no checkpoint counts, which the next start cuts.
        step = self.state.step + 1
        self.metrics.write({"step": step, "rollback": rollbacks, "left_out_from": first, "left_out_to": end})
        self._save(wait=True)
        self.feed.start()
        _log.warning(
            "the loss spiked up to step %d: back at step %d, leaving out the samples at %d to %d",
            spiked,
            self.state.step,
            first,
            end - 1,
        )

    def _read(self) -> tuple[list[Tensors], torch.Tensor, torch.Tensor]:
        """Inputs and weights of the next step, of all rows and by domain; where the configuration says so, without the
        shards that turn out to be damaged.

        All ranks raise the same error, so all leave out the same shard. Collective over the world.
        """
        while True:
            try:
                return self.sums.of_weights(self.feed.step, len(self.feed.domains))
            except DamagedShard as error:
                if error.damage is None or self.run_stage.data.on_damage == "fail":
                    raise
                damage = error.damage
                on_all(partial(self.feed.quarantine, damage), self.groups.world, DataError)
                _log.warning("from step %d on without a damaged shard: %s", self.state.step + 1, error.wrong)

    def _evaluates(self) -> bool:
        """Whether there is an evaluation where the run stands."""
        step = self.state.step
        return step >= self.num_steps or _due(step, self.config.evaluation.every_steps)

    def _evaluation_is_missing(self) -> bool:
        """Whether the run was ended between the step where it stands and the evaluation that belonged there."""
        step, world = self.state.step, self.groups.world
        return step > 0 and self._evaluates() and not is_recorded(self.config.folder, step, world)

    def _evaluate(self) -> bool:
        """Records the held-out loss; returns whether any rank was asked to stop, so that the next start has to."""
        if self.feed.held_out is None:
            return False
        step, begin = self.state.step, time.perf_counter()
        with self.spent.phase("evaluation"):
            found = evaluate(
                self.pipeline,
                self.feed,
                self.sums,
                lambda: self.heart.beat(step, "evaluation"),
                lambda: self.signals.asked,
            )
        if found is not None:
            self.metrics.write({"step": step, **found, "validation_seconds": time.perf_counter() - begin})
        return found is None

    def _open_metrics(self) -> Metrics:
        if not self.speaks:
            return Metrics([])
        return open_metrics(self.config, self.state.step, self.state.stability.rollbacks)

    def _save(self, wait: bool) -> None:
        if self.state.step == 0:
            return  # stopped before the first step: the next start begins at the same place
        self.heart.beat(self.state.step, "save")
        begin = time.perf_counter()
        with self.spent.phase("checkpoints"):
            self.restarts.save(self.state, self.pipeline.engine, self.feed.stream, wait)
        _log.info("step %d was held up by its checkpoint for %.2f s", self.state.step, time.perf_counter() - begin)

    def _restore(self) -> TrainState:
        """Where the run goes on, or its beginning; says what shows that it is the same run."""
        restored = self.restarts.restore(self.pipeline.engine, self.feed.stream)
        if restored is None:
            if trained := last_step(self.config.folder):
                _log.warning("no checkpoint in %s: its metrics up to step %d are dropped", self.config.folder, trained)
            _log.info("starting at step 0 in layout %s, ZeRO-%d", self.groups.layout, self.config.parallel.zero_stage)
            return TrainState()
        saved, state = restored.manifest, restored.state
        _log.info(
            "resuming from %s: step %d, loss %.4f; saved in layout %s, ZeRO-%d, going on in layout %s, ZeRO-%d",
            restored.path,
            state.step,
            state.loss or float("nan"),
            saved.layout,
            saved.state.zero_stage,
            self.groups.layout,
            self.config.parallel.zero_stage,
        )
        _log.info(
            "next samples %s, hash of the next %d: %s",
            [tuple(sample) for sample in self.feed.stream.next_sample_ids(3)],
            SHOWN_SAMPLES,
            self.feed.stream.sample_hash(SHOWN_SAMPLES),
        )
        return state


def _due(step: int, every_steps: int | None) -> bool:
    return every_steps is not None and step % every_steps == 0
