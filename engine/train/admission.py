"""The hook that fills the replay reservoir: at each checkpoint it admits the documents trained on since the last one.

Ranks share the look-up and merge what they find, so all have the same reservoir; keys are pure, so rows that a restart
trains on again change nothing. The section names files in `checkpoints/files/` (`engine.checkpoint.named_files`); the
main rank writes what has changed, and one compacted file at the end of a run stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from engine.checkpoint.folder import CHECKPOINTS
from engine.checkpoint.named_files import FOLDER
from engine.config.schema.reservoir import ReservoirConfig
from engine.config.schema.run import RunConfig
from engine.data.mixed_order import Cursor
from engine.data.replay.files import NamedFile, NamedGeneration, load, write
from engine.data.replay.generation import Generation
from engine.data.replay.reservoir import Reservoir, united
from engine.data.shards.tombstones import read_tombstones
from engine.data.trained_rows import trained_rows
from engine.errors import CheckpointError, DataError
from engine.logs import logger
from engine.parallel import collectives
from engine.parallel.agreement import on_all, on_first
from engine.train.hooks import Hook, Run
from engine.train.saved_reservoir import reservoir_settings

_MOST_FILES = 64
"""Files that a checkpoint names at most: the section stays small, and a restart reads few of them."""
_log = logger(__name__)


class Admission(Hook):
    """Hook that keeps the run's reservoir."""

    section = "reservoir"

    def __init__(self, config: RunConfig, reservoir: ReservoirConfig) -> None:
        self._config, self._recency = config, reservoir.recency
        self._settings = reservoir_settings(config, reservoir)
        self._folder = config.folder / CHECKPOINTS / FOLDER
        self._files: list[NamedFile] = []
        self._frozen: NamedGeneration | None = None
        self._run: Run | None = None
        self._admitted = Cursor(0, ())
        self.reservoir = Reservoir(self._settings, read_tombstones(config.folder))

    def begin_run_stage(self, run: Run) -> None:
        """Make the domains of a run stage known, and freeze the generation that it may replay."""
        self._run, stream = run, run.feed.stream
        self._admitted = stream.progress.cursor
        self._freeze(run)
        known = stream.tombstones | self.reservoir.tombstones
        if len(known - self.reservoir.tombstones):
            self.reservoir.drop(known)
        for number, part in enumerate(stream.parts):
            if not part.is_replay:
                self.reservoir.add_domain(self._domain(number), part.dataset.fingerprint, part.dataset.index.num_tokens)

    def before_other_shares(self, run: Run) -> None:
        """Admit what was trained on so far: afterwards the stream does not know the sources of earlier samples."""
        if self._run is not None:  # else nothing was trained on in this start
            self._admit(run)

    def after_rollback(self, run: Run) -> None:
        """Go on from where the run stands again; `restore` has loaded the reservoir of that step."""
        self.begin_run_stage(run)

    def generation(self, run: Run) -> Generation | None:
        """Return the generation that the run stage replays: what was admitted before it began. None where that is
        nothing. Raises `CheckpointError` where its file is missing or damaged."""
        self._freeze(run)
        return None if self._frozen is None else self._frozen.load(self._folder)

    def state(self) -> dict[str, Any]:
        """Admit what was trained on since the last checkpoint, write what has changed, and name the files. Collective
        over the world."""
        run = self._run
        assert run is not None, "a run stage has begun"
        self._admit(run)
        self._write(run, compact=run.ends_run_stage or self._is_long())
        return {
            "files": [named.to_json() for named in self._named()],
            "chain": [named.name for named in self._files],
            "generation": None if self._frozen is None else self._frozen.to_json(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Load the reservoir that a checkpoint names."""
        named = {file.name: file for file in map(NamedFile.from_json, state["files"])}
        self._files = [named[name] for name in state["chain"]]
        frozen = state["generation"]
        self._frozen = None if frozen is None else NamedGeneration.from_json(frozen, named, self._settings)
        self.reservoir = load(self._folder, self._files, self._settings, self.reservoir.tombstones)

    def end_run_stage(self, run: Run) -> None:
        """Say what is kept."""
        if run.is_main_rank:
            rows = ", ".join(f"{name} {found.size:,}" for name, found in sorted(self.reservoir.entries.items()))
            _log.info("reservoir: %s rows, %.1f MB", rows, self.reservoir.num_bytes / 1e6)

    def _write(self, run: Run, compact: bool) -> None:
        """Write the whole reservoir or, unless `compact`, what no file has of it yet. Collective over the world.

        Raises:
            CheckpointError: the file system refuses, on every rank; the next call writes what is missing then.
        """
        written = on_first(
            lambda: write(self._folder, self.reservoir, only_fresh=bool(self._files) and not compact),
            run.groups.world,
            CheckpointError,
        )
        self.reservoir.mark_written()
        if written is not None:
            self._files = [written] if compact else [*self._files, written]

    def _freeze(self, run: Run) -> None:
        """Freeze what was admitted, at the beginning of a run stage; inside of it the checkpoint has named it.

        Raises:
            CheckpointError: the reservoir was not written when the run stage before ended, and still cannot be.
        """
        if run.state.stage_step > 0:
            return
        # The run stage before was compacted into one file when its last step was saved, unless that save has failed and
        # the run has gone on (`checkpoint.on_failure`).
        if run.run_stage.replays_reservoir and (len(self._files) > 1 or self.reservoir.has_fresh):
            self._write(run, compact=True)
        first = self._files[0] if self._files else None
        # a checkpoint before the run stage's first step names the generation, too, with the settings of that start
        if self._frozen is None or self._frozen.file != first:
            self._frozen = None if first is None else NamedGeneration(first, self._settings)

    def _admit(self, run: Run) -> None:
        """Admit the documents of the samples since the last call. Collective over the world."""
        stream, world = run.feed.stream, run.groups.world
        share = self.reservoir.empty()
        weight = 1.0
        for _ in range(run.state.run_stage):  # not a power: those of C libraries differ
            weight *= self._recency

        def admit() -> None:
            span_tokens = self._settings.span_tokens
            found = trained_rows(stream, self._admitted, stream.position, span_tokens, world.position, world.size)
            for number, shard, rows in found:
                weights = None if weight == 1.0 else np.full(rows.inside.size, weight)
                entry = stream.parts[number].dataset.index.shards[shard]
                share.admit(self._domain(number), entry.content_hash, rows, weights)
            share.settle()

        on_all(admit, world, DataError)
        self.reservoir.merge(united(collectives.gather_objects(share, world)))
        self._admitted = stream.progress.cursor

    def _domain(self, number: int) -> str:
        """Return the domain of a source of the run stage."""
        assert self._run is not None
        return self._run.feed.stream.parts[number].name or self._run.run_stage.name

    def _is_long(self) -> bool:
        """Return True if reading the files one after the other has become more than writing one."""
        first, *later = self._files or [NamedFile("", 0, "")]
        return len(later) >= _MOST_FILES or sum(named.num_bytes for named in later) > max(first.num_bytes, 1 << 20)

    def _named(self) -> list[NamedFile]:
        extra = [] if self._frozen is None or self._frozen.file in self._files else [self._frozen.file]
        return [*self._files, *extra]
