"""Checkpoints of a run: taking them over at a start, saving, and what a failed save means for the run.

Which checkpoint a run goes on from, and how it is loaded, is `engine.train.restore`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from engine.checkpoint import manifest_json
from engine.checkpoint.folder import CHECKPOINTS, Superseded, committed, owner_of, step_of
from engine.checkpoint.manifest import CheckpointState
from engine.checkpoint.node_memory.node_store import NodeStore
from engine.checkpoint.retention import Retention, prune
from engine.checkpoint.saver import Saver
from engine.checkpoint.stores import Store
from engine.config.load import load_run
from engine.config.metrics import cost
from engine.config.rank_environment import RankEnvironment
from engine.config.resume import compare, meaning_hash, refuse_new_meaning
from engine.config.save import FILE, save_run
from engine.config.schema.run import RunConfig
from engine.errors import CheckpointError, ConfigError, EnvironmentProblem
from engine.logs import logger
from engine.parallel.agreement import on_first
from engine.parallel.groups import Groups, join_lines
from engine.parallel.zero import StageEngine
from engine.provenance import note_start
from engine.redact import redacted
from engine.train import saved
from engine.train.records import metric_of
from engine.train.restore import Restored, Restorer, SectionStates
from engine.train.state import TrainState

SHOWN_SAMPLES = 1024
"""Number of samples whose ids are hashed for the message of a restart."""

_log = logger(__name__)


class RunCheckpoints:
    """The checkpoints of one run, for one rank. Every method is collective over the world."""

    def __init__(self, config: RunConfig, groups: Groups, environment: RankEnvironment) -> None:
        self.config, self.groups, self.environment = config, groups, environment
        self.folder = config.folder / CHECKPOINTS
        self._saver = Saver(self.folder, groups, self._committed)
        memory = config.checkpoint.memory
        connect = partial(join_lines, limit_seconds=config.launch.collective_limit_seconds)
        self._memory = NodeStore(memory.folder, config.folder, groups, environment, connect) if memory else None
        self._restorer = Restorer(config, groups, self._memory, environment.job)
        self.begun_step: int | None = None
        """Step of the last checkpoint that was begun on the disk."""
        self._metric: dict[int, float] = {}
        """Cost by `checkpoint.best_metric` of the committed checkpoints, by step, as far as it has been looked up."""

    def acquire(self) -> TrainState:
        """Take the checkpoints for this start of the run, and write the configuration to the folder.

        Returns the state of the newest checkpoint on the disk, a new one where there is none: about where the run goes
        on, before anything is loaded.

        Rank 0's process has taken the folder itself (`engine.run_folder`).

        Raises:
            ConfigError: the folder belongs to a run of another meaning.
            CheckpointError: a newer attempt of the same job owns it.
        """
        state = on_first(self._newest_state, self.groups.world, CheckpointError)
        on_first(lambda: self._compare_config(state.run_stage), self.groups.world, ConfigError)
        # Read before this start becomes the owner: generations in memory are of the job that used the folder last.
        before = on_first(lambda: owner_of(self.folder), self.groups.world, CheckpointError)
        self._restorer.job_before = before.job if before is not None else self.environment.job
        self._saver.acquire(self.environment.job, self.environment.attempt)
        if self._memory is not None:
            self._memory.acquire()
        on_first(self._note_start, self.groups.world, EnvironmentProblem)
        return state

    def reserve(self, engine: StageEngine) -> None:
        """Take the memory of all saves to come, before the first step.

        Raises:
            EnvironmentProblem: the nodes' memory has no room for the generations that `checkpoint.memory` asks for.
        """
        num_bytes = self._saver.reserve(engine.parameter_shards(), engine.placements())
        if self._memory is not None:
            self._memory.check_room(num_bytes)

    def save(self, state: TrainState, engine: StageEngine, sections: Callable[[], SectionStates], wait: bool) -> None:
        """Begin a checkpoint once the one before has ended; with `wait`, or unless saves are asynchronous, end it, too.

        `sections` returns the state of the parts of the run. It may write files that the checkpoint names: where that
        fails, the checkpoint has failed.

        Raises:
            CheckpointError: it failed, or the one before; with `checkpoint.on_failure: continue` only where `wait`
                asks for a checkpoint that is there.
        """
        # One host buffer serves all saves, so the one before has to be out of it.
        self._tolerate(self._saver.settle)

        def begin() -> None:
            kept = sections()
            self.begun_step = state.step
            self._begin(state, engine, kept)
            if wait or not self.config.checkpoint.asynchronous:
                self._saver.settle()

        # A caller that waits needs the checkpoint itself (the run ends, or has just left out samples), so it fails.
        if wait:
            begin()
        else:
            self._tolerate(begin)

    def keep(self, state: TrainState, engine: StageEngine, sections: Callable[[], SectionStates]) -> None:
        """Begin a checkpoint in the nodes' memory, except where another one is under way."""
        # Equal on every rank, so all begin or none does. A skipped one is made up for by the next.
        if self._saver.in_flight is None:
            self._tolerate(lambda: self._begin(state, engine, sections(), self._memory), optional=True)

    def _begin(
        self, state: TrainState, engine: StageEngine, sections: SectionStates, store: Store | None = None
    ) -> None:
        self._saver.begin(
            engine.parameter_shards(),
            engine.placements(),
            self._state(state, engine, sections),
            self.environment.job,
            self.environment.attempt,
            store,
        )

    def hold_update(self) -> None:
        """Hold the next update until the save in flight has copied the weights; call before each update."""
        self._saver.hold_update()

    def save_flags(self) -> tuple[float, float]:
        """Return this rank's report on the save in flight; `advance` takes the sums over the world."""
        return self._saver.save_flags()

    def advance(self, done: float, failed: float) -> None:
        """Advance the save in flight; call after each step.

        Raises:
            CheckpointError: it failed, and `checkpoint.on_failure` is `stop`.
        """
        self._tolerate(lambda: self._saver.advance(done, failed))

    def settle(self) -> None:
        """Wait for the save in flight and its commit; raises as `advance`."""
        self._tolerate(self._saver.settle)

    def finish(self, state: TrainState) -> bool:
        """Wait for the save in flight; return True if the disk has the newest checkpoint of this state."""
        self.settle()
        return on_first(lambda: saved.newest(self.config.folder) == state.step, self.groups.world, CheckpointError)

    def abandon(self) -> None:
        """End what writes in the background; for the end of a rank, not collective."""
        self._saver.abandon()

    def end(self, state: TrainState) -> None:
        """Give the nodes' memory back if the disk has the newest state; for the end of a run that has not failed."""
        if self._memory is None:
            return
        on_disk = on_first(lambda: committed(self.folder), self.groups.world, CheckpointError)
        # After a failed last save the memory holds the only copy of the newest steps.
        if on_disk and step_of(on_disk[0]) >= state.step:
            self._memory.end()

    def restore(
        self, engine: StageEngine, engine_of: Callable[[int], StageEngine], go_back: bool = False
    ) -> Restored | None:
        """Load the newest verified checkpoint; None means that the run has none.

        It goes into `engine_of(n)` where it is of run stage n, which may be another engine than `engine`: one that
        trains what that run stage trains. With `go_back` it is one on the disk, and what the nodes' memory has of the
        steps since is dropped.

        Raises:
            CheckpointError: there are checkpoints and none of them verifies, or the newest is of another model.
        """
        self.settle()  # a save in flight may become the newest checkpoint
        # The steps since are trained again, on other samples after a rollback: their metrics change.
        self._metric = {}
        return self._restorer.restore(engine, engine_of, go_back)

    def _note_start(self) -> None:
        save_run(self.config, self.config.folder)
        note_start(self.config.folder, self.environment.job, self.environment.attempt)
        if on_disk := committed(self.folder):  # of a run that began before commits were noted, or that was copied
            saved.note(self.config.folder, step_of(on_disk[0]))

    def _newest_state(self) -> TrainState:
        """Return the state of the newest checkpoint on the disk whose manifest can be read."""
        for path in committed(self.folder):
            try:
                sections = manifest_json.read(path).state.sections
            except CheckpointError:  # damaged, as will be said when it is its turn
                continue
            if "progress" in sections:
                return TrainState.from_section(sections["progress"])
        return TrainState()

    def _compare_config(self, run_stage: int) -> None:
        """Refuse another meaning where something was trained already, and log what else has changed.

        `run_stage` is the number of the run stage in which the run stands.
        """
        folder = self.config.folder
        if not committed(self.folder) or not (folder / FILE).exists():
            return
        before = load_run(folder / FILE)
        refuse_new_meaning(before, self.config, str(folder), run_stage)
        for change in compare(before, self.config, run_stage):
            if change.kind == "schedule":
                _log.warning("changed since this run was started: %s", change)

    def _tolerate(self, action: Callable[[], object], optional: bool = False) -> None:
        """Call an action that may fail to save; log the failure where the run goes on without that checkpoint."""
        # asked before the action, which may end the save in flight
        optional = optional or self._saver.goes_to(self._memory)
        try:
            action()
        # Another start trains this run by now: going on would do its work a second time.
        except Superseded:
            raise
        except CheckpointError as error:
            if optional:
                _log.warning("a checkpoint in the nodes' memory failed, and the run goes on: %s", error)
                return
            if self.config.checkpoint.on_failure == "stop":
                raise
            _log.error("a checkpoint could not be saved, and the run goes on: %s", error)

    def _committed(self, newest: Path) -> None:
        """Note the commit of `newest`, which was read back by its writers, and remove what is not to be kept.

        On rank 0, in the background.
        """
        keep = self.config.checkpoint
        if keep.keep_best:
            steps = [step_of(path) for path in committed(self.folder)]
            known = {step: self._metric[step] for step in steps if step in self._metric}
            # Each is looked up once: a commit costs the same however many checkpoints stay.
            unknown = [step for step in steps if step not in known]
            found = metric_of(self.config.folder, unknown, keep.best_metric)
            self._metric = known | {step: cost(keep.best_metric, value) for step, value in found.items()}
        ends = self.config.run_stage_ends
        retention = Retention(keep.keep_last, keep.keep_every, keep.keep_best, self._metric, ends)
        try:
            prune(self.folder, retention, newest)
        # also where the removal fails: the new checkpoint stands
        finally:
            saved.note(self.config.folder, step_of(newest))

    def _state(self, state: TrainState, engine: StageEngine, sections: SectionStates) -> CheckpointState:
        return CheckpointState(
            step=state.step,
            tokens=state.tokens,
            zero_stage=self.config.parallel.zero_stage,
            config_hash=meaning_hash(self.config, state.run_stage),
            config=redacted(self.config.model_dump(mode="json")),
            sections={"progress": state.section(), **sections},
            hyperparameters=self._hyperparameters(engine),
        )

    def _hyperparameters(self, engine: StageEngine) -> dict[str, dict[str, float]]:
        return {
            spec.name: {"weight_decay": group.weight_decay} for group in engine.parameter_groups for spec in group.specs
        }
