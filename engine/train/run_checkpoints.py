"""Saving a run and taking it up again: content of a checkpoint, and what must agree when one is loaded.

The contract "Config on resume" says which runs may go on from a checkpoint: keys of kind `meaning` must be equal,
`schedule` keys may change and are logged, `execution` keys (the layout among them) are free.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from engine.checkpoint import manifest_json
from engine.checkpoint.folder import CHECKPOINTS, Superseded, committed, owner_of, step_of
from engine.checkpoint.load import load
from engine.checkpoint.manifest import CheckpointState, Manifest
from engine.checkpoint.merge import SECTION as MERGE
from engine.checkpoint.node_memory import hosts
from engine.checkpoint.node_memory.node_store import NodeStore
from engine.checkpoint.node_memory.recall import Eligibility, Recall
from engine.checkpoint.retention import Retention, prune
from engine.checkpoint.saver import Saver
from engine.checkpoint.sections import check_sections
from engine.checkpoint.stores import Store
from engine.checkpoint.verify import is_whole
from engine.config.load import load_run
from engine.config.rank_environment import RankEnvironment
from engine.config.resume import compare, meaning_hash, meaning_hashes, refuse_new_meaning
from engine.config.save import FILE, save_run
from engine.config.schema.regularization import EMA
from engine.config.schema.run import RunConfig
from engine.errors import CheckpointError, ConfigError, EnvironmentProblem
from engine.logs import logger
from engine.parallel.agreement import on_first
from engine.parallel.groups import Groups, join_lines
from engine.parallel.zero import StageEngine
from engine.parallel.zero.other_weights import copy_weights
from engine.provenance import note_start
from engine.redact import redacted
from engine.train import saved
from engine.train.records import last_step, metric_of
from engine.train.state import TrainState

RUN_SECTIONS = ("progress", "loader", "tokenizer")
"""Sections of the run itself; all others are kept by hooks."""
SHOWN_SAMPLES = 1024
"""Number of samples whose ids are hashed for the message of a restart."""

_log = logger(__name__)


SectionStates = Mapping[str, Any]
"""State that parts of a run keep in a checkpoint, by name: JSON, equal on every rank."""


@dataclass(frozen=True)
class Restored:
    """State from which a run goes on."""

    state: TrainState
    manifest: Manifest
    path: Path

    @property
    def sections(self) -> SectionStates:
        """Everything that parts of the run have kept."""
        return self.manifest.state.sections


class RunCheckpoints:
    """The checkpoints of one run, for one rank. Every method is collective over the world."""

    def __init__(self, config: RunConfig, groups: Groups, environment: RankEnvironment) -> None:
        self.config, self.groups, self.environment = config, groups, environment
        self.folder = config.folder / CHECKPOINTS
        self._saver = Saver(self.folder, groups, self._committed)
        memory = config.checkpoint.memory
        connect = partial(join_lines, limit_seconds=config.launch.collective_limit_seconds)
        self._memory = NodeStore(memory.folder, config.folder, groups, environment, connect) if memory else None
        self._job_before = environment.job
        self.begun_step: int | None = None
        """Step of the last checkpoint that was begun on the disk."""
        self._metric: dict[int, float] = {}
        """`checkpoint.best_metric` of the committed checkpoints, by step, as far as it has been looked up."""

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
        self._job_before = before.job if before is not None else self.environment.job
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
        path, spread = self._choose(engine, go_back)
        if self._memory is not None and not go_back:
            self._tell_lost(0 if path is None else step_of(path))
        if self._memory is not None:  # what is there and not gone on from is of a past that will not be
            self._memory.keep_only(step_of(path) if path is not None and spread else None)
        if path is None:
            on_first(self._refuse_damaged, self.groups.world, CheckpointError)
            return None
        state = on_first(lambda: self._state_of(path), self.groups.world, CheckpointError)
        engine = engine_of(state.run_stage)
        shards, zero_moments = engine.parameter_shards(), engine.zero_moments
        if not spread and on_first(lambda: _is_merged(path), self.groups.world, CheckpointError):
            self._check_merged(path, state, engine)
            # merged weights have no moments: the optimizer begins anew
            zero_moments = frozenset(zero_moments) | {moment for shard in shards for moment in shard.moments}
        manifest = load(path, self.groups, shards, engine.placements(), spread, zero_moments)
        if EMA in engine.added_moments and EMA not in manifest.moments:
            copy_weights(engine, EMA)  # asked for since that checkpoint, or of merged weights
        # the working weights (bf16, say) from the fp32 master weights that were just loaded
        engine.refresh()
        # the count of Adam's bias correction, which is no tensor of a shard
        engine.set_updates(state.updates, state.updates_before)
        return Restored(state, manifest, path)

    def _check_merged(self, path: Path, state: TrainState, engine: StageEngine) -> None:
        """Raise `CheckpointError` where a run stage is not over and needs values that merged weights come without."""
        run_stage = self.config.stages[state.run_stage]
        needed = sorted(engine.added_moments.keys() - engine.zero_moments)
        if needed and state.stage_step < run_stage.num_steps:
            raise CheckpointError(
                f"{path} is merged and has no {', '.join(needed)}, which run stage {run_stage.name} goes on with",
                "a merged checkpoint of a run stage's last step, or of a run stage without regularization and reptile",
                "remove it to go on from the checkpoint before, or merge checkpoints of the run stage's end",
            )

    def _state_of(self, path: Path) -> TrainState:
        """Return the train state of a checkpoint, which has to be of a run of this meaning."""
        saved_state, meanings = manifest_json.read(path).state, meaning_hashes(self.config)
        check_sections(saved_state.sections, RUN_SECTIONS, path)
        state = TrainState.from_section(saved_state.sections["progress"])
        if state.run_stage >= len(meanings) or saved_state.config_hash != meanings[state.run_stage]:
            raise CheckpointError(
                f"{path} was saved by a run of another meaning",
                "the same model, data, seed and batch",
                "start afresh with another `folder`",
            )
        return state

    def _choose(self, engine: StageEngine, go_back: bool) -> tuple[Path | None, bool]:
        """Return the checkpoint to load, and True if it is spread over the nodes' memory.

        The disk's files are read only where memory has nothing newer.
        """
        on_disk = on_first(lambda: committed(self.folder), self.groups.world, CheckpointError)
        recall = Recall(self._memory) if self._memory is not None and not go_back else None
        wanted = engine.parameter_shards(), engine.zero_moments
        # Newest first. For each on the disk, memory is asked for something newer; None: for anything at all.
        for path in [*on_disk, None]:
            if recall is not None and (found := recall.newest(self._eligible(path), *wanted)) is not None:
                return found, True
            if path is not None and is_whole(path, self.groups):
                return path, False
        return None, False

    def _tell_lost(self, restored: int) -> None:
        """Log which steps are trained again because the nodes' memory that held them is lost."""
        assert self._memory is not None
        held = hosts.read(self.config.folder) if self.groups.world.position == 0 else None
        if held is not None and held.job == self._job_before and held.step > restored:
            _log.warning("%s", hosts.lost_words(held, restored, self._memory.hosts))

    def _eligible(self, on_disk: Path | None) -> Eligibility:
        """Return the conditions under which a generation is taken instead of `on_disk`. Collective over the world."""

        def attempt() -> int:
            try:
                manifest = manifest_json.read(on_disk) if on_disk is not None else None
            except CheckpointError:  # damaged, as will be said when it is its turn
                return 0
            return manifest.attempt if manifest is not None and manifest.job == self._job_before else 0

        # A start after a rollback trains a step again, with other samples: what an earlier attempt has of it is stale.
        least_attempt = on_first(attempt, self.groups.world, CheckpointError)
        least_step = step_of(on_disk) + 1 if on_disk is not None else 0
        return Eligibility(frozenset(meaning_hashes(self.config)), self._job_before, least_step, least_attempt)

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

    def _refuse_damaged(self) -> None:
        """Refuse to start a run over in silence whose every checkpoint is damaged, or gone."""
        if on_disk := committed(self.folder):
            _refuse_other_version(on_disk[0])
            raise CheckpointError(
                f"none of the checkpoints in {self.folder} is whole",
                "at least one that verifies",
                "see `palimpsest checkpoint verify`; to start over, use another `folder`",
            )
        step = saved.newest(self.config.folder)
        if step is not None:
            raise CheckpointError(
                f"{self.folder} holds no checkpoint, but this run has trained {last_step(self.config.folder)} "
                f"steps and saved step {step}: its checkpoints are gone",
                "the checkpoints of the run",
                "bring them back; to start over, use another `folder`",
            )

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
            self._metric = known | metric_of(self.config.folder, unknown, keep.best_metric)
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


def _is_merged(path: Path) -> bool:
    """Return True for a checkpoint that `palimpsest checkpoint merge` wrote. Raises `CheckpointError`: damaged."""
    return MERGE in manifest_json.read(path).state.sections


def _refuse_other_version(path: Path) -> None:
    """Raise `OtherVersion` for a checkpoint of another version of the format; other damage is told elsewhere."""
    try:
        manifest_json.read(path)
    except manifest_json.OtherVersion:
        raise
    except CheckpointError:
        return
