"""The reservoir of a run folder as its checkpoints name it, for commands that look at a run and start none.

Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from engine.checkpoint import manifest_json
from engine.checkpoint.folder import CHECKPOINTS, committed
from engine.checkpoint.named_files import FOLDER
from engine.config.schema.reservoir import ReservoirConfig
from engine.config.schema.run import RunConfig
from engine.data.replay.files import NamedFile, NamedGeneration, load
from engine.data.replay.generation import Generation
from engine.data.replay.pinned import PinnedRows
from engine.data.replay.reservoir import Settings
from engine.data.shards.tombstones import NO_TOMBSTONES, Tombstones
from engine.data.source import WeightedDataset
from engine.data.stage import open_parts, with_reservoir
from engine.errors import CheckpointError, DataError


def reservoir_settings(config: RunConfig, reservoir: ReservoirConfig) -> Settings:
    """Return the settings of a run's reservoir."""
    return Settings(
        reservoir.rows,
        config.seed,
        reservoir.quota,
        dict(reservoir.shares) or None,
        reservoir.span_tokens,
        # a later run stage gives the documents that it shares with an earlier one another weight, and so may a copy of
        # a shard, whose name says nothing of its weights
        pure=reservoir.recency == 1.0 and reservoir.weight_column is None,
    )


def frozen_generation(config: RunConfig, number: int) -> Generation | None:
    """Return what run stage `number` replays of the run's reservoir; None where no checkpoint knows it.

    Raises:
        CheckpointError: a file that a checkpoint names is missing or damaged.
    """
    if config.reservoir is None:
        return None
    settings = reservoir_settings(config, config.reservoir)
    for saved in _saved(config):
        frozen = None
        if saved.run_stage == number and saved.section["generation"] is not None:
            frozen = NamedGeneration.from_json(saved.section["generation"], saved.files, settings)
        elif saved.run_stage == number - 1 and saved.section["chain"]:
            if saved.stage_step < config.stages[saved.run_stage].num_steps:
                return None  # the newest one: the run stage has not begun
            frozen = NamedGeneration(saved.files[saved.section["chain"][0]], settings)
        if frozen is not None:
            folder = config.folder / CHECKPOINTS / FOLDER
            return saved.with_pinned(frozen.load(folder), folder)
    return None


def kept_generation(config: RunConfig) -> tuple[str, Generation] | None:
    """Return the name of the newest checkpoint with a reservoir, and all that would be replayed of it now, rows of
    deleted documents included; None where there is none. Raises `CheckpointError` as `frozen_generation`."""
    if config.reservoir is None:
        return None
    for saved in _saved(config):
        settings = reservoir_settings(config, config.reservoir)
        return saved.name, saved.kept(config.folder / CHECKPOINTS / FOLDER, settings)
    return None


def generation_in(checkpoint: Path, config: RunConfig) -> Generation | None:
    """Return all that would be replayed of the reservoir in one checkpoint of a run, rows of deleted documents
    included; None where it has none. Raises `CheckpointError` as `frozen_generation`."""
    saved = None if config.reservoir is None else _read(checkpoint)
    if saved is None or config.reservoir is None:
        return None
    return saved.kept(checkpoint.parent / FOLDER, reservoir_settings(config, config.reservoir))


def pinned_files(config: RunConfig) -> Iterator[tuple[str, PinnedRows]]:
    """Yield the name and the rows of each file of pinned rows that the run's checkpoints name. Raises
    `CheckpointError` as `frozen_generation`."""
    seen: set[str] = set()
    for saved in _saved(config):
        for name in saved.section.get("pinned", []):
            if name not in seen:
                seen.add(name)
                yield name, PinnedRows(config.folder / CHECKPOINTS / FOLDER, [saved.files[name]])


def keeps_rows(config: RunConfig) -> bool:
    """Return True if a further run stage can replay the run's reservoir: it has rows, or no step is saved yet."""
    if config.reservoir is None:
        return False
    newest = next(iter(_saved(config)), None)
    return not committed(config.folder / CHECKPOINTS) if newest is None else bool(newest.section["chain"])


def open_stage(
    config: RunConfig, number: int, tokenizer_hash: str | None = None, tombstones: Tombstones = NO_TOMBSTONES
) -> list[WeightedDataset]:
    """Open all training data of run stage `number`, what it replays of the run's reservoir included.

    Raises:
        DataError: as `open_parts` and `with_reservoir`; or what the run stage replays is not known yet.
    """
    run_stage, vocab_size = config.stages[number], config.model.vocab_size
    parts = open_parts(run_stage, tokenizer_hash, vocab_size, tombstones)
    if not run_stage.replays_reservoir:
        return parts
    try:
        generation = frozen_generation(config, number)
    except CheckpointError as error:
        raise DataError(error.wrong, error.allowed, error.remedy) from error
    if generation is None:
        raise DataError(
            f"stage {run_stage.name} replays from the run's reservoir, and what that holds is known once the stage "
            "begins",
            "a run folder with a checkpoint of this stage, or of the end of the one before",
            f"train the stages before it, or set stages.{number}.replay.source",
        )
    return with_reservoir(config.stages, number, parts, generation, tokenizer_hash, vocab_size, tombstones)


class _Saved(NamedTuple):
    """The reservoir in a checkpoint."""

    name: str
    run_stage: int
    stage_step: int
    section: dict[str, Any]
    files: dict[str, NamedFile]

    def kept(self, folder: Path, settings: Settings) -> Generation:
        """Return all rows, from the files in `folder`. Raises `CheckpointError`."""
        files = [self.files[name] for name in self.section["chain"]]
        return self.with_pinned(load(folder, files, settings).freeze(), folder)

    def with_pinned(self, generation: Generation, folder: Path) -> Generation:
        """Return a generation with the copies that the checkpoint names. Raises `CheckpointError`."""
        pinned = [self.files[name] for name in self.section.get("pinned", [])]
        return replace(generation, pinned=PinnedRows(folder, pinned) if pinned else None)


def _saved(config: RunConfig) -> Iterator[_Saved]:
    """Yield the reservoirs of the run's checkpoints that can be read, newest first."""
    found = map(_read, committed(config.folder / CHECKPOINTS))
    return (saved for saved in found if saved is not None)


def _read(checkpoint: Path) -> _Saved | None:
    """Return the reservoir in a checkpoint; None where it cannot be read, or there is none."""
    try:
        sections = manifest_json.read(checkpoint).state.sections
        section, progress = sections["reservoir"], sections["progress"]
        files = {file.name: file for file in map(NamedFile.from_json, section["files"])}
        return _Saved(checkpoint.name, int(progress["run_stage"]), int(progress["stage_step"]), section, files)
    except (CheckpointError, KeyError):  # damaged, or from before the reservoir was switched on
        return None
