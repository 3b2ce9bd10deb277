"""Going on from a checkpoint: which one is taken, what must agree with the run, and its loading into the engine.

Which runs may go on from a checkpoint follows from the kinds of their keys: those of kind `meaning` must be equal,
`schedule` keys may change and are logged, `execution` keys (the layout among them) are free.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.checkpoint import manifest_json
from engine.checkpoint.folder import CHECKPOINTS, committed, step_of
from engine.checkpoint.load import load
from engine.checkpoint.manifest import Manifest
from engine.checkpoint.merge import SECTION as MERGE
from engine.checkpoint.node_memory import hosts
from engine.checkpoint.node_memory.node_store import NodeStore
from engine.checkpoint.node_memory.recall import Eligibility, Recall
from engine.checkpoint.sections import check_sections
from engine.checkpoint.verify import is_whole
from engine.config.resume import meaning_hashes
from engine.config.schema.regularization import EMA
from engine.config.schema.run import RunConfig
from engine.errors import CheckpointError
from engine.logs import logger
from engine.parallel.agreement import on_first
from engine.parallel.groups import Groups
from engine.parallel.zero import StageEngine
from engine.parallel.zero.other_weights import copy_weights
from engine.train import saved
from engine.train.records import last_step
from engine.train.state import TrainState

RUN_SECTIONS = ("progress", "loader", "tokenizer")
"""Sections of the run itself; all others are kept by hooks."""
SectionStates = Mapping[str, Any]
"""State that parts of a run keep in a checkpoint, by name: JSON, equal on every rank."""

_log = logger(__name__)


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


class Restorer:
    """Choice and loading of a checkpoint of one run, for one rank. Every method is collective over the world."""

    def __init__(self, config: RunConfig, groups: Groups, memory: NodeStore | None, job: str) -> None:
        self.config, self.groups = config, groups
        self.folder = config.folder / CHECKPOINTS
        self._memory = memory
        self.job_before = job
        """Job that used the folder before this start: generations in the nodes' memory are of that one."""

    def restore(self, engine: StageEngine, engine_of: Callable[[int], StageEngine], go_back: bool) -> Restored | None:
        """Load the newest verified checkpoint, as `RunCheckpoints.restore`, which settles the save in flight before."""
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
                "a merged checkpoint of a run stage's last step, or of one without regularization, reptile and adalora",
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
        if held is not None and held.job == self.job_before and held.step > restored:
            _log.warning("%s", hosts.lost_words(held, restored, self._memory.hosts))

    def _eligible(self, on_disk: Path | None) -> Eligibility:
        """Return the conditions under which a generation is taken instead of `on_disk`. Collective over the world."""

        def attempt() -> int:
            try:
                manifest = manifest_json.read(on_disk) if on_disk is not None else None
            except CheckpointError:  # damaged, as will be said when it is its turn
                return 0
            return manifest.attempt if manifest is not None and manifest.job == self.job_before else 0

        # A start after a rollback trains a step again, with other samples: what an earlier attempt has of it is stale.
        least_attempt = on_first(attempt, self.groups.world, CheckpointError)
        least_step = step_of(on_disk) + 1 if on_disk is not None else 0
        return Eligibility(frozenset(meaning_hashes(self.config)), self.job_before, least_step, least_attempt)

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
