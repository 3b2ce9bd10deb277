"""One rank of a run: builds, restores or begins, and goes step by step to the end.

The loop reads top to bottom in `Trainer.fit`; heartbeat, signals and saves are in it, and everything else that happens
around a step is a hook (`engine.train.hooks`); moves between run stages are in `engine.train.current_run_stage`. Every
rank makes the same calls in the same order; work of one rank alone (metrics, messages) waits for nobody.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch

from engine.config.rank_environment import RankEnvironment
from engine.config.schema.run import RunConfig
from engine.config.schema.stage import RunStage
from engine.data.shards.damage import DamagedShard
from engine.errors import EXIT_DONE, EXIT_REQUEUE, ConfigError, DataError
from engine.heartbeat import Heartbeat
from engine.logs import logger, phase
from engine.optim.schedules import learning_rate
from engine.parallel.agreement import on_all
from engine.parallel.boundary import Tensors
from engine.parallel.groups import Groups
from engine.parallel.pipeline import DomainSums, Pipeline
from engine.parallel.zero import StepResult
from engine.train.adversarial import train_adversarially
from engine.train.checks import check_invariants
from engine.train.current_run_stage import CurrentRunStage
from engine.train.feed import Feed
from engine.train.hooks import Hooks, Update
from engine.train.mixed_objectives import balanced
from engine.train.mixout import mixed_weights
from engine.train.predictions import Measure
from engine.train.records import Record
from engine.train.requests import Requests
from engine.train.run_checkpoints import RunCheckpoints
from engine.train.signals import Stopping, StopSignals
from engine.train.standard_hooks import standard_hooks
from engine.train.starting_weights import with_fingerprint
from engine.train.state import TrainState
from engine.train.step_totals import Sums
from engine.train.summary import Spent, process_seconds, summary

_log = logger(__name__)


class Trainer:
    """One rank of a run."""

    def __init__(
        self,
        config: RunConfig,
        groups: Groups,
        environment: RankEnvironment,
        device: torch.device,
        signals: StopSignals,
        heart: Heartbeat,
        measure: Measure | None = None,
    ) -> None:
        """Build this rank's part of the run, and load where it goes on; `measure` measures the predictions of its
        task. Collective over the world."""
        if config.init_from is not None:
            given = config
            config = on_all(lambda: with_fingerprint(given), groups.world, ConfigError)
        self.config, self.groups, self.device, self.heart = config, groups, device, heart
        self.requests = Requests(config, signals, self.is_main_rank)
        self._save_requested = False
        self.spent = Spent()
        self.checkpoints = RunCheckpoints(config, groups, environment)
        self.hooks = Hooks(standard_hooks(config, self.is_main_rank, measure))
        self.current = CurrentRunStage(
            config,
            groups,
            device,
            self.checkpoints,
            self.hooks,
            stop_requested=lambda: self.requests.stop_requested,
            generation=lambda: self.hooks.generation(self),
        )
        self.sums = Sums(self.pipeline.spec.losses, groups, device)
        # A long phase without a beat counts as a hang, so the supervisor has to know what this one is.
        self.heart.beat(0, "load")
        with phase("looking for a checkpoint and loading it"):
            self.current.begin_or_resume()
        with phase("taking the memory of saves"):
            self.checkpoints.reserve(self.pipeline.engine)

    @property
    def state(self) -> TrainState:
        """Counts of what is done, equal on every rank."""
        return self.current.state

    @property
    def run_stage(self) -> RunStage:
        """The run stage in which the run stands."""
        return self.current.run_stage

    @property
    def feed(self) -> Feed:
        """Batches of that run stage."""
        return self.current.feed

    @property
    def pipeline(self) -> Pipeline:
        """This rank's part of the model, for the rows of that run stage."""
        return self.current.pipeline

    @property
    def ends_run_stage(self) -> bool:
        """True where no step of the run stage is left."""
        return self.current.ends_run_stage

    @property
    def is_done(self) -> bool:
        """True where no step of the run is left."""
        return self.current.is_done

    @property
    def ends_early(self) -> bool:
        """True where the run ends before its last step."""
        return self.is_done and self.state.step < self.config.num_steps

    @property
    def is_main_rank(self) -> bool:
        """True on global rank 0."""
        return self.groups.global_rank == 0

    def fit(self) -> int:
        """Train to the end (`EXIT_DONE`) or until a signal (`EXIT_REQUEUE`). Collective over the world."""
        self.feed.start()
        self.spent.add("start", process_seconds())
        if self.is_done:
            _log.info("step %d of %d: nothing left to train", self.state.step, self.config.num_steps)
        if self.hooks.start(self):
            return EXIT_REQUEUE
        self.hooks.begin_run_stage(self)
        first = self.state.step
        while not self.is_done:
            if self.ends_run_stage:
                self.current.begin(self.state.run_stage + 1)
                self.feed.start()
                self.hooks.begin_run_stage(self)
            with phase("the first step") if self.state.step == first else nullcontext():
                stop = self._step()
            # Before a save that is due: a state after spikes is not one to keep.
            if not stop and self.hooks.roll_back(self):
                continue
            if stop or self.ends_run_stage or self._save_is_due():
                self.save(wait=stop or self.is_done)
            # Time is short after a signal: an evaluation that is due here is made up for by the next start.
            if stop and not self.is_done:
                return EXIT_REQUEUE
            # A signal came during an evaluation: the step may have no checkpoint yet.
            if self.hooks.between_steps(self):
                if not self.is_done:
                    self.save(wait=True)
                return EXIT_REQUEUE
            if self.ends_run_stage:
                self.hooks.end_run_stage(self)
        return EXIT_DONE

    def close(self) -> None:
        """End threads and trackers; safe after an error."""
        self.heart.beat(self.state.step, "end")
        self.checkpoints.abandon()
        self.current.close()
        self.hooks.close()

    def summary(self, code: int) -> str:
        """Return the summary of a run that ends with this exit code; only the main rank has all of it."""
        return summary(self.config, self.state, self.spent, process_seconds(), code)

    def _step(self) -> bool:
        """Take one step, but none where a rank stops without its data; return True if any rank requests a stop."""
        begin = time.perf_counter()
        state = self.state
        rate = learning_rate(self.config.optimizer, self.run_stage, state.stage_step)
        # before reading, which moves the stream past the step's samples
        position = self.feed.stream.position
        self.heart.beat(state.step, "data")
        try:
            inputs, weights_L, weights_KL = self._read()
        except Stopping:
            # Another rank may have had its data: all of them go back to before the step, which the next start repeats.
            self.feed.step_back()
            return True
        self.pipeline.spec = self.feed.spec
        self.heart.beat(state.step, "forward and backward")
        self.hooks.before_forward(self, inputs, weights_L)
        scales_L = self.sums.scales(weights_L)
        # DeepSpeed averages gradients over the data ranks; the factor undoes it.
        scales, by_domain = (self.groups.zero.size * scales_L).float(), self.sums.by_domain(len(weights_KL))
        sums_L = self._passes(inputs, scales, by_domain)
        # Requests and reports on the save in flight travel in the all-reduce of the losses: no collective more.
        requests = (float(self.requests.stop_requested), float(self.requests.save_requested))
        self.heart.beat(state.step, "loss")
        # fp64 (L,): a mean over all targets of the batch, whatever the layout
        flags = (*requests, *self.checkpoints.save_flags())
        losses, (stop, save, done, failed), sums_KL = self.sums.of_losses(sums_L * scales_L, flags, by_domain)
        self._save_requested = save > 0
        updated, gradient_norm, penalties = self._update(sum(losses), position, rate)
        tokens = state.count_step(self.run_stage, self.feed.row_length, updated, sum(losses))
        seconds = time.perf_counter() - begin
        record: Record = {
            "step": state.step,
            **self.sums.record(losses, "loss"),
            **self.sums.record_domains(self.feed.domains, sums_KL, weights_KL, "loss"),
            **{f"regularization/{name}": value for name, value in penalties.items()},
            "gradient_norm": gradient_norm,
            "learning_rate": rate,
            "samples": state.samples,
            "tokens": state.tokens,
            "step_seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "data_wait_seconds": self.feed.wait_seconds,
        }
        self.write(record | self.hooks.after_step(self))
        self.spent.step(seconds, record["data_wait_seconds"], tokens)
        self.checkpoints.advance(done, failed)
        return stop > 0

    def _passes(self, inputs: list[Tensors], scales_L: torch.Tensor, by_domain: DomainSums | None) -> torch.Tensor:
        """Run all passes of a step; return the summed losses. Collective over the world."""
        mixout = self.run_stage.regularization.mixout
        if mixout is None:
            return self._plain_passes(inputs, scales_L, by_domain)
        self.checkpoints.hold_update()  # a save may still copy the weights
        engine, tensor = self.pipeline.engine, self.groups.tensor
        with mixed_weights(engine, tensor, mixout.share, self.feed.seed, self.state.step):
            return self._plain_passes(inputs, scales_L, by_domain)

    def _plain_passes(
        self, inputs: list[Tensors], scales_L: torch.Tensor, by_domain: DomainSums | None
    ) -> torch.Tensor:
        """Run the passes of a step with the present weights; return the summed losses."""
        adversarial = self.run_stage.regularization.adversarial
        if adversarial is None:
            return self.pipeline.train(inputs, scales_L, by_domain)
        given = (self.pipeline, self.groups, self.config, inputs, scales_L, by_domain)
        return train_adversarially(*given, adversarial.epsilon)

    def _update(self, loss: float, position: int, rate: float) -> StepResult:
        """Update the weights if all hooks accept that.

        `position` is that of the step's first sample. Collective over the world.
        """
        step, engine = self.state.step, self.pipeline.engine

        def accept(norm: float) -> bool:
            # Only here, after backward: until now the save in flight has copied beside the computation.
            self.checkpoints.hold_update()
            update = Update(step, position, loss, norm, rate, engine.gradient_shards)
            return self.hooks.before_update(self, update)

        self.heart.beat(step, "optimizer step")
        result = engine.step(rate, accept)
        if self.config.checks:
            check_invariants(engine, self.groups)
        return result

    def write(self, record: Record) -> None:
        """Hand a record to all hooks."""
        self.hooks.take_record(record)

    def go_back(self, first: int) -> None:
        """Load the newest whole checkpoint on the disk, and leave out the samples from position `first` to the last one
        drawn. Raises as `CurrentRunStage.go_back`. Collective over the world."""
        self.heart.beat(self.state.step, "load")
        self.current.go_back(first)
        self.hooks.after_rollback(self)

    def raise_replay(self, ratio: float) -> None:
        """Replay at least this share of the samples from the next step on, to the end of the run stage. Collective over
        the world."""
        self.hooks.before_ratio_change(self)
        self.current.raise_replay(ratio)

    def _read(self) -> tuple[list[Tensors], torch.Tensor, torch.Tensor]:
        """Return inputs and weights of the next step, of all rows and by domain.

        Where the configuration says so, it does without the shards that turn out to be damaged.

        All ranks raise the same error, so all leave out the same shard. Collective over the world.
        """
        while True:
            try:
                inputs, weights_L, weights_KL = self.sums.of_weights(self.feed.step, len(self.feed.domains))
                break
            except DamagedShard as error:
                if error.damage is None or self.run_stage.data.on_damage == "fail":
                    raise
                damage = error.damage
                on_all(partial(self.feed.quarantine, damage), self.groups.world, DataError)
                _log.warning("from step %d on without a damaged shard: %s", self.state.step + 1, error.wrong)
        replay = self.run_stage.replay
        if replay is None or replay.objective is None:
            return inputs, weights_L, weights_KL
        return balanced(inputs, weights_KL, replay.loss_weight)

    def save(self, wait: bool) -> None:
        """Begin a checkpoint; with `wait`, end it, too. Collective over the world."""
        if self.state.step == 0:
            return  # stopped before the first step: the next start begins at the same place
        self.heart.beat(self.state.step, "save")
        begin = time.perf_counter()
        with self.spent.phase("checkpoints"):
            self.checkpoints.save(self.state, self.pipeline.engine, self._sections, wait)
        self.requests.saved()
        _log.info("step %d was held up by its checkpoint for %.2f s", self.state.step, time.perf_counter() - begin)

    def save_in_memory(self) -> None:
        """Begin a checkpoint in the nodes' memory, except while another one is under way. Collective over the world."""
        self.heart.beat(self.state.step, "save")
        with self.spent.phase("checkpoints"):
            self.checkpoints.keep(self.state, self.pipeline.engine, self._sections)

    def _save_is_due(self) -> bool:
        every_steps = self.config.checkpoint.every_steps
        return self._save_requested or (every_steps is not None and self.state.step % every_steps == 0)

    def _sections(self) -> dict[str, Any]:
        """Return what the parts of the run keep in a checkpoint, by name."""
        stream = self.feed.stream
        return {
            "loader": stream.state(),
            "tokenizer": {"hash": stream.parts[0].dataset.index.tokenizer_hash},
            **self.hooks.sections(),
        }
