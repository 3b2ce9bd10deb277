"""One rank of a run: builds, restores or begins, and goes step by step to the end.

The loop reads top to bottom in `Trainer.fit`; heartbeat, signals and saves are in it, and everything else that happens
around a step is a hook (`engine.train.hooks`). Every rank makes the same calls in the same order; work of one rank
alone (metrics, messages) waits for nobody.
"""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch

from engine.config.rank_environment import RankEnvironment
from engine.config.schema.regularization import EMA
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
from engine.parallel.pipeline import Pipeline
from engine.parallel.zero import StageEngine, StepResult
from engine.train.build import build_pipeline, during, rebuild, stage_spec
from engine.train.checks import check_invariants
from engine.train.evaluation import is_recorded
from engine.train.feed import Feed
from engine.train.hooks import Hooks, Update
from engine.train.records import Record, last_step
from engine.train.requests import Requests
from engine.train.run_checkpoints import SHOWN_SAMPLES, Restored, RunCheckpoints
from engine.train.signals import Stopping, StopSignals
from engine.train.stability import REMEDY, Unstable
from engine.train.stage_run import RunData, StageRun
from engine.train.standard_hooks import standard_hooks
from engine.train.starting_weights import StartingWeights, with_fingerprint
from engine.train.state import TrainState
from engine.train.step_totals import Sums
from engine.train.summary import Spent, process_seconds, summary

_log = logger(__name__)


class Trainer:
    """One rank of a run. `state` counts what is done, equal on every rank."""

    def __init__(
        self,
        config: RunConfig,
        groups: Groups,
        environment: RankEnvironment,
        device: torch.device,
        signals: StopSignals,
        heart: Heartbeat,
    ) -> None:
        if config.init_from is not None:
            given = config
            config = on_all(lambda: with_fingerprint(given), groups.world, ConfigError)
        self.config, self.groups, self.device, self.heart = config, groups, device, heart
        self.requests = Requests(config, signals, self.is_main_rank)
        self._save_requested = False
        self.spent = Spent()
        self.checkpoints = RunCheckpoints(config, groups, environment)
        self.hooks = Hooks(standard_hooks(config))
        with phase("taking the run folder"):
            self.state = self.checkpoints.acquire()
        with phase("opening the data"):
            self._data = RunData(config, groups)
            # A checkpoint at the end of a run stage goes on in the next one: the data of the completed one may be gone.
            first = self.state.run_stage + (self.ends_run_stage and not self.is_done)
            self._data.open(range(first, len(config.stages)))
        with phase("building the model"):
            spec = stage_spec(config, self.run_stage, groups)
            self.pipeline: Pipeline = build_pipeline(config, spec, groups, device)
            self.pipeline.spec = spec
        self.sums = Sums(spec.losses, groups, device)
        self.stage_run: StageRun | None = None
        # A long phase without a beat counts as a hang, so the supervisor has to know what this one is.
        self.heart.beat(0, "load")
        with phase("looking for a checkpoint and loading it"):
            self._restore()
        with phase("taking the memory of saves"):
            self.checkpoints.reserve(self.pipeline.engine)

    @property
    def run_stage(self) -> RunStage:
        """The run stage in which the run stands."""
        return self.config.stages[self.state.run_stage]

    @property
    def feed(self) -> Feed:
        """Batches of that run stage."""
        assert self.stage_run is not None, "opened when the trainer is made"
        return self.stage_run.feed

    @property
    def ends_run_stage(self) -> bool:
        """True where no step of the run stage is left."""
        return self.state.stage_step >= self.run_stage.num_steps

    @property
    def is_done(self) -> bool:
        """True where no step of the run is left."""
        return self.ends_run_stage and self.state.run_stage + 1 == len(self.config.stages)

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
                self._begin_run_stage(self.state.run_stage + 1)
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
        if self.stage_run is not None:
            self.stage_run.close()
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
        self.heart.beat(state.step, "forward and backward")
        self.hooks.before_forward(self, inputs)
        scales_L = self.sums.scales(weights_L)
        # DeepSpeed averages gradients over the data ranks; the factor undoes it.
        scales, by_domain = (self.groups.zero.size * scales_L).float(), self.sums.by_domain(len(weights_KL))
        sums_L = self.pipeline.train(inputs, scales, by_domain)
        # Requests and reports on the save in flight travel in the all-reduce of the losses: no collective more.
        requests = (float(self.requests.stop_requested), float(self.requests.save_requested))
        self.heart.beat(state.step, "loss")
        # fp64 (L,): a mean over all targets of the batch, whatever the layout
        flags = (*requests, *self.checkpoints.save_flags())
        losses, (stop, save, done, failed), sums_KL = self.sums.of_losses(sums_L * scales_L, flags, by_domain)
        self._save_requested = save > 0
        updated, gradient_norm, penalties = self._update(sum(losses), position, rate)
        tokens = self._count_step(sum(losses), updated)
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

    def _count_step(self, loss: float, updated: bool) -> int:
        """Move the state past a step; return its tokens."""
        state, samples = self.state, self.run_stage.batches.size(self.state.stage_step)
        state.step += 1
        state.stage_step += 1
        state.updates += updated
        state.samples += samples
        state.tokens += samples * self.run_stage.sequence_length
        # The state goes into JSON, which has no NaN.
        if math.isfinite(loss):
            state.loss = loss
        return samples * self.run_stage.sequence_length

    def write(self, record: Record) -> None:
        """Hand a record to all hooks."""
        self.hooks.take_record(record)

    def go_back(self, first: int) -> None:
        """Load the newest whole checkpoint on the disk, and leave out the samples from position `first` to the last one
        drawn. Counts the rollback. Reading ahead has ended then: `feed.start` begins it again. Collective over the
        world.

        Raises:
            Unstable: there is no checkpoint.
        """
        self.heart.beat(self.state.step, "load")
        stream, before, spiked = self.feed.stream, self.state.run_stage, self.state.step
        # Taken before loading, which replaces both: earlier rollbacks stay in force.
        rollbacks, left_out = self.state.rollbacks + 1, (*stream.left_out, (first, stream.position))
        # The reading thread must not draw from a stream that is about to move back.
        self.feed.close()
        restored = self.checkpoints.restore(self.pipeline.engine, self._engine_of, go_back=True)
        if restored is None:
            raise Unstable(
                f"step {spiked}: the loss spikes before the first checkpoint", "a checkpoint to go back to", REMEDY
            )
        self._take(restored)
        self.state.rollbacks = rollbacks
        # positions count within a run stage, and the checkpoint may be of the one before
        self.state.left_out_later += [(before, *interval) for interval in left_out]
        self._leave_out()
        self.hooks.after_rollback(self)

    def raise_replay(self, ratio: float) -> None:
        """Replay at least this share of the samples from the next step on, to the end of the run stage. Collective over
        the world."""
        state = self.state
        self.hooks.before_other_shares(self)
        state.raised_ratios.append((state.run_stage, state.stage_step, ratio))
        self.feed.raise_replay(state.raised_in(state.run_stage))

    def _read(self) -> tuple[list[Tensors], torch.Tensor, torch.Tensor]:
        """Return inputs and weights of the next step, of all rows and by domain.

        Where the configuration says so, it does without the shards that turn out to be damaged.

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

    def _take(self, restored: Restored) -> None:
        """Go on from what was loaded, exactly between two run stages in the later one.

        The data of the earlier one may be gone by then; only an evaluation that it lacks has to open it again.
        """
        self.state = restored.state
        self.hooks.restore(restored.sections)
        if self.ends_run_stage and not self.is_done and self._is_evaluated():
            self._begin_run_stage(self.state.run_stage + 1)
        else:
            self._open_run_stage()
            self.feed.restore(restored.sections["loader"], self.state.raised_in(self.state.run_stage))

    def _is_evaluated(self) -> bool:
        """Return True if no evaluation is missing where the run stands. Collective over the world."""
        no_data = self.run_stage.data.validation is None
        return no_data or is_recorded(self.config.folder, self.state.step, self.groups.world)

    def _begin_run_stage(self, number: int) -> None:
        """Go over from the end of a run stage to the beginning of the next one, `number`. Collective over the world."""
        self.state.run_stage, self.state.stage_step = number, 0
        self._open_run_stage().rewind()
        self._leave_out()
        if self.run_stage.optimizer_state == "reset":
            self.checkpoints.hold_update()  # a save may still copy the moments
            self.pipeline.engine.reset_moments()
            self.state.updates, self.state.updates_before = 0, [0] * number
        self.state.updates_before.append(self.state.updates)
        self.pipeline.engine.set_updates(self.state.updates, self.state.updates_before)
        if number > 0:
            _log.info("run stage %s begins at step %d", self.run_stage.name, self.state.step)

    def _open_run_stage(self) -> StageRun:
        """Open the run stage in which the run stands, if it is not open, and close another one. Collective over the
        world."""
        number, groups = self.state.run_stage, self.groups
        if self.stage_run is not None and self.stage_run.number != number:
            self.stage_run.close()
            self.stage_run = None
        if self.stage_run is None:
            datasets = self._data.take(number, lambda: self.hooks.generation(self))
            self.stage_run = on_all(
                lambda: StageRun(
                    number,
                    self.config,
                    datasets,
                    groups,
                    self.device,
                    self.pipeline.spec,
                    lambda: self.requests.stop_requested,
                ),
                groups.world,
                DataError,
            )
        # also where it is open: a rollback to the end of the run stage before has made that one's engine
        self._engine_of(number)
        self.pipeline.spec = self.stage_run.spec
        self.pipeline.engine.begin_run_stage(number)
        return self.stage_run

    def _engine_of(self, number: int) -> StageEngine:
        """Return the engine, made again where a run stage trains other parameters, with the values that it keeps beside
        them. Collective over the world."""
        run_stage = self.config.stages[number]
        spec = during(self.pipeline.spec, self.config, run_stage)
        is_rebuilt = spec.frozen != self.pipeline.spec.frozen
        if is_rebuilt:
            self.checkpoints.hold_update()  # a save may still copy the weights
            self.pipeline.engine.keep_moments({})  # of the run stage before: nothing to carry over
            with phase(f"making the engine again: {len(spec.frozen)} of {len(spec.parameters)} parameters are frozen"):
                rebuild(self.pipeline, self.config, spec)
        # An average may be asked for within a run stage, where checkpoints lack it: `RunCheckpoints.restore` begins it.
        added = {name: name == EMA for name in run_stage.added_moments}
        if self.pipeline.engine.keep_moments(added) or is_rebuilt:
            self.checkpoints.reserve(self.pipeline.engine)
        return self.pipeline.engine

    def _leave_out(self) -> None:
        """Tell the stream of the samples that this run stage has to leave out since a rollback out of it."""
        later, number = self.state.left_out_later, self.state.run_stage
        for _, first, end in (interval for interval in later if interval[0] == number):
            self.feed.stream.leave_out(first, end)
        self.state.left_out_later = [interval for interval in later if interval[0] != number]

    def _start_from_source(self) -> None:
        """Fill in the weights that `init_from` names, each rank its own rows. Collective over the world."""
        config = self.config
        if config.init_from is None:
            return
        with phase(f"reading the weights of {config.init_from.path}"):
            source = on_all(lambda: StartingWeights(config), self.groups.world, ConfigError)
            self.pipeline.engine.fill(source.rows)
        _log.info("this rank read %.1f MB of %s", source.bytes_read / 1e6, config.init_from.path)

    def _restore(self) -> None:
        """Go on from the newest whole checkpoint, where there is one; tell what shows that it is the same run."""
        restored = self.checkpoints.restore(self.pipeline.engine, self._engine_of)
        if restored is None:
            if trained := last_step(self.config.folder):
                _log.warning("no checkpoint in %s: its metrics up to step %d are dropped", self.config.folder, trained)
            self.state = TrainState()
            self._start_from_source()
            self._begin_run_stage(0)
            _log.info("starting at step 0 in layout %s, ZeRO-%d", self.groups.layout, self.config.parallel.zero_stage)
            return
        self._take(restored)
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
