"""The run stage in which a run stands, and its moves: begin, go on from a checkpoint, go over to the next, go back.

The model is built once for the whole run, the data of a run stage is opened when it begins, and the ZeRO engine is made
again only where a run stage trains other parameters than the one before. Exactly between two run stages a run stands
at the end of the earlier one (`ends_run_stage`). Every rank makes the same calls.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from engine.config.kept_moments import kept_moments
from engine.config.schema.regularization import EMA
from engine.config.schema.run import RunConfig
from engine.config.schema.stage import RunStage
from engine.data.replay.generation import Generation
from engine.errors import ConfigError, DataError
from engine.logs import logger, phase
from engine.parallel.agreement import on_all
from engine.parallel.groups import Groups
from engine.parallel.pipeline import Pipeline
from engine.parallel.zero import StageEngine
from engine.plan.frozen import num_trained
from engine.plan.parameters import num_parameters
from engine.train.build import build_pipeline, during, rebuild, stage_spec
from engine.train.evaluation import is_recorded
from engine.train.feed import Feed
from engine.train.hooks import Hooks
from engine.train.records import last_step
from engine.train.restore import Restored
from engine.train.run_checkpoints import SHOWN_SAMPLES, RunCheckpoints
from engine.train.stability import REMEDY, Unstable
from engine.train.stage_run import RunData, StageRun
from engine.train.starting_weights import StartingWeights
from engine.train.state import TrainState

_log = logger(__name__)


class CurrentRunStage:
    """Train state, model and open data of this rank, which move together from run stage to run stage."""

    def __init__(
        self,
        config: RunConfig,
        groups: Groups,
        device: torch.device,
        checkpoints: RunCheckpoints,
        hooks: Hooks,
        stop_requested: Callable[[], bool],
        generation: Callable[[], Generation | None],
    ) -> None:
        """Take the run folder, open the data and build the model; call `begin_or_resume` next.

        `stop_requested()` is True once this rank is to stop. `generation()` returns what a run stage that replays the
        run's reservoir is to replay; it is called before the data of such a run stage is opened.
        """
        self.config, self.groups, self.device = config, groups, device
        self._checkpoints, self._hooks = checkpoints, hooks
        self._stop_requested, self._generation = stop_requested, generation
        self._stage_run: StageRun | None = None
        with phase("taking the run folder"):
            self.state = checkpoints.acquire()
        with phase("opening the data"):
            self._data = RunData(config, groups)
            # A checkpoint at the end of a run stage goes on in the next one: the data of the completed one may be gone.
            first = self.state.run_stage + (self.ends_run_stage and not self.is_done)
            self._data.open(range(first, len(config.stages)))
        with phase("building the model"):
            spec = stage_spec(config, self.run_stage, groups)
            self.pipeline: Pipeline = build_pipeline(config, spec, groups, device)
            self.pipeline.spec = spec

    @property
    def run_stage(self) -> RunStage:
        """The run stage in which the run stands."""
        return self.config.stages[self.state.run_stage]

    @property
    def feed(self) -> Feed:
        """Batches of that run stage."""
        assert self._stage_run is not None, "opened by begin_or_resume"
        return self._stage_run.feed

    @property
    def ends_run_stage(self) -> bool:
        """True where no step of the run stage is left."""
        return self.state.stage_step >= self.run_stage.num_steps or self._hooks.ends_early()

    @property
    def is_done(self) -> bool:
        """True where no step of the run is left."""
        return self.ends_run_stage and self.state.run_stage + 1 == len(self.config.stages)

    def begin_or_resume(self) -> None:
        """Go on from the newest whole checkpoint, else begin the run; log what shows that it is the same run.

        Collective over the world.

        Raises:
            CheckpointError: there are checkpoints and none can be loaded.
        """
        restored = self._checkpoints.restore(self.pipeline.engine, self.engine_of)
        if restored is None:
            if trained := last_step(self.config.folder):
                _log.warning("no checkpoint in %s: its metrics up to step %d are dropped", self.config.folder, trained)
            self.state = TrainState()
            self._start_from_source()
            self.begin(0)
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

    def go_back(self, first: int) -> None:
        """Load the newest whole checkpoint on the disk, and leave out the samples from position `first` to the last one
        drawn. Counts the rollback. Reading ahead has ended then: `feed.start` begins it again. Collective over the
        world.

        Raises:
            Unstable: there is no checkpoint.
        """
        stream, before, spiked = self.feed.stream, self.state.run_stage, self.state.step
        # Taken before loading, which replaces both: earlier rollbacks stay in force.
        rollbacks, left_out = self.state.rollbacks + 1, (*stream.left_out, (first, stream.position))
        # The reading thread must not draw from a stream that is about to move back.
        self.feed.close()
        restored = self._checkpoints.restore(self.pipeline.engine, self.engine_of, go_back=True)
        if restored is None:
            raise Unstable(
                f"step {spiked}: the loss spikes before the first checkpoint", "a checkpoint to go back to", REMEDY
            )
        self._take(restored)
        self.state.rollbacks = rollbacks
        # positions count within a run stage, and the checkpoint may be of the one before
        self.state.left_out_later += [(before, *interval) for interval in left_out]
        self._leave_out()

    def begin(self, number: int) -> None:
        """Go over from the end of a run stage to the beginning of the next one, `number`. Collective over the world."""
        self.state.run_stage, self.state.stage_step = number, 0
        self._open().rewind()
        self._leave_out()
        if self.run_stage.optimizer_state == "reset":
            self._checkpoints.hold_update()  # a save may still copy the moments
            self.pipeline.engine.reset_moments()
            self.state.updates, self.state.updates_before = 0, [0] * number
        # Moments of another run have seen their updates before the first run stage, and count them as their own.
        self.state.updates_before.append(self.state.updates if number else 0)
        self.pipeline.engine.set_updates(self.state.updates, self.state.updates_before)
        if number > 0:
            _log.info("run stage %s begins at step %d", self.run_stage.name, self.state.step)
        if self.run_stage.freeze:
            trained, whole = num_trained(self.config.model, self.run_stage.freeze), num_parameters(self.config.model)
            _log.info("%s of %s parameters are trained (%.2f %%)", f"{trained:,}", f"{whole:,}", 100 * trained / whole)

    def raise_replay(self, ratio: float) -> None:
        """Replay at least this share of the samples from the next step on, to the end of the run stage."""
        state = self.state
        state.raised_ratios.append((state.run_stage, state.stage_step, ratio))
        self.feed.raise_replay(state.raised_in(state.run_stage))

    def close(self) -> None:
        """End the thread that reads data; safe to call twice."""
        if self._stage_run is not None:
            self._stage_run.close()

    def _take(self, restored: Restored) -> None:
        """Go on from what was loaded, exactly between two run stages in the later one.

        The data of the earlier one may be gone by then; only an evaluation that it lacks has to open it again.
        """
        self.state = restored.state
        self._hooks.restore(restored.sections)
        if self.ends_run_stage and not self.is_done and self._is_evaluated():
            self.begin(self.state.run_stage + 1)
        else:
            self._open()
            self.feed.restore(restored.sections["loader"], self.state.raised_in(self.state.run_stage))

    def _is_evaluated(self) -> bool:
        """Return True if no evaluation is missing where the run stands. Collective over the world."""
        no_data = self.run_stage.data.validation is None
        return no_data or is_recorded(self.config.folder, self.state.step, self.groups.world)

    def _open(self) -> StageRun:
        """Open the run stage in which the run stands, if it is not open, and close another one. Collective over the
        world."""
        number, groups = self.state.run_stage, self.groups
        if self._stage_run is not None and self._stage_run.number != number:
            self._stage_run.close()
            self._stage_run = None
        if self._stage_run is None:
            datasets = self._data.take(number, self._generation)
            self._stage_run = on_all(
                lambda: StageRun(
                    number,
                    self.config,
                    datasets,
                    groups,
                    self.device,
                    self.pipeline.spec,
                    self._stop_requested,
                ),
                groups.world,
                DataError,
            )
        # also where it is open: a rollback to the end of the run stage before has made that one's engine
        self.engine_of(number)
        self.pipeline.spec = self._stage_run.spec
        self.pipeline.engine.begin_run_stage(number)
        return self._stage_run

    def engine_of(self, number: int) -> StageEngine:
        """Return the engine, made again where a run stage trains other parameters, with the values that it keeps beside
        them. Collective over the world."""
        run_stage = self.config.stages[number]
        spec = during(self.pipeline.spec, self.config, run_stage)
        is_rebuilt = spec.frozen != self.pipeline.spec.frozen
        if is_rebuilt:
            self._checkpoints.hold_update()  # a save may still copy the weights
            self.pipeline.engine.keep_moments({})  # of the run stage before: nothing to carry over
            with phase(f"making the engine again: {len(spec.frozen)} of {len(spec.parameters)} parameters are frozen"):
                rebuild(self.pipeline, self.config, spec)
        # An average may be asked for within a run stage, where checkpoints lack it: `RunCheckpoints.restore` begins it.
        added = {name: name == EMA for name in kept_moments(self.config, run_stage)}
        if self.pipeline.engine.keep_moments(added) or is_rebuilt:
            self._checkpoints.reserve(self.pipeline.engine)
        return self.pipeline.engine

    def _leave_out(self) -> None:
        """Tell the stream of the samples that this run stage has to leave out since a rollback out of it."""
        later, number = self.state.left_out_later, self.state.run_stage
        for _, first, end in (interval for interval in later if interval[0] == number):
            self.feed.stream.leave_out(first, end)
        self.state.left_out_later = [interval for interval in later if interval[0] != number]

    def _start_from_source(self) -> None:
        """Fill in the weights that `init_from` names, and on request the moments, each rank its own rows.

        Collective over the world.
        """
        config = self.config
        if config.init_from is None:
            return
        with phase(f"reading the weights of {config.init_from.path}"):
            source = on_all(lambda: StartingWeights(config), self.groups.world, ConfigError)
            self.pipeline.engine.fill(source.rows, source.moment_rows if config.init_from.moments else None)
        if config.init_from.moments:
            self.state.updates = source.updates
        _log.info("this rank read %.1f MB of %s", source.bytes_read / 1e6, config.init_from.path)
