"""Saving a run and taking it up again: what goes into a checkpoint, and what must agree when one is loaded.

Who may go on from whom is the contract "Config on resume": keys of kind `meaning` must be equal, `schedule` keys may
change and are logged, `execution` keys (the layout among them) are free.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.checkpoint.folder import CHECKPOINTS, committed
from engine.checkpoint.load import load
from engine.checkpoint.manifest import CheckpointState, Manifest
from engine.checkpoint.retention import retain
from engine.checkpoint.save import Saver
from engine.checkpoint.verify import newest_verified
from engine.config.load import load_run
from engine.config.place import RankPlace
from engine.config.resume import compare, meaning_hash, refuse_new_meaning
from engine.config.save import FILE, save_run
from engine.config.schema import RunConfig
from engine.data.loader import Loader
from engine.errors import CheckpointError, ConfigError, EnvironmentProblem
from engine.logs import logger
from engine.parallel.agreement import on_first
from engine.parallel.groups import Groups
from engine.parallel.zero import StageEngine
from engine.train.state import TrainState

SHOWN_SAMPLES = 1024
"""Samples whose ids are hashed into the proof that a restart prints."""

_log = logger(__name__)


@dataclass(frozen=True)
class Restored:
    """Where a run goes on."""

    state: TrainState
    manifest: Manifest
    path: Path


class Restarts:
    """The checkpoints of one run, for one rank. Every method is collective over the world."""

    def __init__(self, config: RunConfig, groups: Groups, place: RankPlace) -> None:
        self.config, self.groups, self.place = config, groups, place
        self.folder = config.folder / CHECKPOINTS
        self._saver = Saver(self.folder, groups)

    def claim(self) -> None:
        """Takes the run folder for this start of the run, and writes the configuration there.

        Raises:
            ConfigError: the folder belongs to a run of another meaning.
            CheckpointError: a newer attempt of the same job owns it.
        """
        on_first(self._compare_config, self.groups.world, ConfigError)
        self._saver.claim(self.place.job, self.place.attempt)
        on_first(lambda: save_run(self.config, self.config.folder), self.groups.world, EnvironmentProblem)

    def save(self, state: TrainState, engine: StageEngine, loader: Loader) -> Path:
        """Commits a checkpoint and removes those that retention no longer keeps."""
        path = self._saver.save(
            engine.pieces(),
            engine.placements(),
            CheckpointState(
                step=state.step,
                tokens=state.tokens,
                zero_stage=self.config.parallel.zero_stage,
                config_hash=meaning_hash(self.config),
                config=self.config.model_dump(mode="json"),
                sections={
                    "progress": state.section(),
                    "loader": loader.state(),
                    "tokenizer": {"hash": loader.dataset.index.tokenizer_hash},
                    "rng": {"seed": self.config.seed},
                    "scheduler": {"stage": self.config.stages[0].name, "step": state.step},
                },
                hyperparameters=self._hyperparameters(engine),
            ),
            self.place.job,
            self.place.attempt,
        )
        retain(self.folder, self.config.checkpoint.keep_last, self.groups)
        return path

    def restore(self, engine: StageEngine, loader: Loader) -> Restored | None:
        """Loads the newest verified checkpoint into engine and loader; None where the run has none.

        Raises:
            CheckpointError: there are checkpoints and none of them verifies, or the newest is of another model.
        """
        path = newest_verified(self.folder, self.groups)
        if path is None:
            on_first(self._refuse_damaged, self.groups.world, CheckpointError)
            return None
        manifest = load(path, self.groups, engine.pieces(), engine.placements())
        if manifest.state.config_hash != meaning_hash(self.config):
            raise CheckpointError(
                f"{path} was saved by a run of another meaning",
                "the same model, data, seed and batch",
                "start afresh with another `folder`",
            )
        engine.refresh()
        state = TrainState.from_section(manifest.state.sections["progress"])
        engine.set_updates(state.updates)
        loader.restore(manifest.state.sections["loader"])
        return Restored(state, manifest, path)

    def _compare_config(self) -> None:
        """Refuses another meaning where something was trained already, and logs what else has changed."""
        folder = self.config.folder
        if not committed(self.folder) or not (folder / FILE).exists():
            return
        changes = compare(load_run(folder / FILE), self.config)
        refuse_new_meaning(changes, str(folder))
        for change in changes:
            if change.kind == "schedule":
                _log.warning("changed since this run was started: %s", change)

    def _refuse_damaged(self) -> None:
        """A run whose every checkpoint is damaged must not start over in silence."""
        if committed(self.folder):
            raise CheckpointError(
                f"none of the checkpoints in {self.folder} is whole",
                "at least one that verifies",
                "see `palimpsest checkpoint verify`; to start over, use another `folder`",
            )

    def _hyperparameters(self, engine: StageEngine) -> dict[str, dict[str, float]]:
        return {
            spec.name: {"weight_decay": group.weight_decay} for group in engine.parameter_groups for spec in group.specs
        }
