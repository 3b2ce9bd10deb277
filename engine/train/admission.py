"""The hook that fills the replay reservoir: at each checkpoint it admits the documents trained on since the last one.

Ranks share the look-up and merge what they find, so all have the same reservoir; keys are pure, so rows that a restart
trains on again change nothing. The section names files in `checkpoints/files/` (`engine.checkpoint.named_files`); the
main rank writes what has changed, and at the end of a run stage one compacted file and, on request, copies of the rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from engine.checkpoint.folder import CHECKPOINTS
from engine.checkpoint.named_files import FOLDER
from engine.config.schema.reservoir import PinConfig, ReservoirConfig
from engine.config.schema.run import RunConfig
from engine.data.mixed_order import Cursor
from engine.data.replay.files import NamedFile, NamedGeneration, load, write
from engine.data.replay.generation import Generation
from engine.data.replay.pinned import PinnedRow, PinnedRows, chosen, write_pinned
from engine.data.replay.reservoir import Reservoir, united
from engine.data.replay.rows import Rows
from engine.data.shards.dataset import TokenDataset
from engine.data.shards.index import token_dtype
from engine.data.shards.tombstones import read_tombstones
from engine.data.stage import open_reservoir
from engine.data.stream import Stream
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
        self._weight_column, self._pin_config = reservoir.weight_column, reservoir.pin
        self._settings = reservoir_settings(config, reservoir)
        self._folder = config.folder / CHECKPOINTS / FOLDER
        self._files: list[NamedFile] = []
        self._frozen: NamedGeneration | None = None
        self._pinned: list[NamedFile] = []
        self._pinned_of: tuple[str, PinConfig | None] | None = None
        """Generation of which rows were pinned, and how; None where that is not known."""
        self._run: Run | None = None
        self._admitted = Cursor(0, ())
        self.reservoir = Reservoir(self._settings, read_tombstones(config.folder))

    def begin_run_stage(self, run: Run) -> None:
        """Make the domains of a run stage known, and freeze the generation that it may replay."""
        self._run, stream = run, run.feed.stream
        self._refuse_no_weights(stream)
        self._admitted = stream.progress.cursor
        self._freeze(run)
        known = stream.tombstones | self.reservoir.tombstones
        if len(known - self.reservoir.tombstones):
            self.reservoir.drop(known)
        for number, part in enumerate(stream.parts):
            if not part.is_replay:
                self.reservoir.add_domain(self._domain(number), part.dataset.fingerprint, part.dataset.index.num_tokens)

    def before_ratio_change(self, run: Run) -> None:
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
        if self._frozen is None:
            return None
        return replace(self._frozen.load(self._folder), pinned=self._pinned_rows())

    def state(self) -> dict[str, Any]:
        """Admit what was trained on since the last checkpoint, write what has changed, and name the files. Collective
        over the world."""
        run = self._run
        assert run is not None, "a run stage has begun"
        self._admit(run)
        self._write(run, compact=run.ends_run_stage or self._is_long())
        if run.ends_run_stage:
            self._pin(run)
        return {
            "files": [named.to_json() for named in self._named()],
            "chain": [named.name for named in self._files],
            "generation": None if self._frozen is None else self._frozen.to_json(),
            **({"pinned": [named.name for named in self._pinned]} if self._pinned else {}),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Load the reservoir that a checkpoint names."""
        named = {file.name: file for file in map(NamedFile.from_json, state["files"])}
        self._files = [named[name] for name in state["chain"]]
        self._pinned, self._pinned_of = [named[name] for name in state.get("pinned", ())], None
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
        # no `**`: C libraries round powers differently, and weights have to be equal bit for bit
        for _ in range(run.state.run_stage):
            weight *= self._recency

        def admit() -> None:
            span_tokens = self._settings.span_tokens
            found = trained_rows(stream, self._admitted, stream.position, span_tokens, world.position, world.size)
            for number, shard, rows in found:
                dataset = stream.parts[number].dataset
                weights = self._weights(dataset, shard, rows, weight)
                entry = dataset.index.shards[shard]
                share.admit(self._domain(number), entry.content_hash, rows, weights)
            share.settle()

        on_all(admit, world, DataError)
        self.reservoir.merge(united(collectives.gather_objects(share, world)))
        self._admitted = stream.progress.cursor

    def _weights(self, dataset: TokenDataset, shard: int, rows: Rows, factor: float) -> np.ndarray | None:
        """Return the weights of rows of a shard, (n,) float64: of their documents, times a factor. None is 1 for all.

        Raises:
            DataError: the weights of documents are asked for, and the data set has none.
        """
        if self._weight_column is None:
            return None if factor == 1.0 else np.full(rows.inside.size, factor)
        return dataset.column(self._weight_column, shard)[rows.documents].astype(np.float64) * factor

    def _refuse_no_weights(self, stream: Stream) -> None:
        """Raise `DataError` where the weights of documents are asked for, and a data set has none."""
        name = self._weight_column
        for number, part in enumerate(stream.parts):
            columns = part.dataset.index.columns
            if name is not None and not part.is_replay and name not in columns:
                raise DataError(
                    f"reservoir.weight_column = {name}, and the data of {self._domain(number)} in "
                    f"{part.dataset.location} has no such column",
                    f"one of {', '.join(columns)}" if columns else "shards that were prepared with --weight-key",
                    "prepare the data again with --weight-key KEY, or leave reservoir.weight_column out",
                )

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
        return [*self._files, *extra, *self._pinned]

    def _pinned_rows(self) -> PinnedRows | None:
        """Return the rows that are pinned; None where there are none. Raises `CheckpointError`."""
        return PinnedRows(self._folder, self._pinned) if self._pinned else None

    def _pin(self, run: Run) -> None:
        """Copy the rows that are replayed from here on, where `reservoir.pin` asks for it. Collective over the world.

        Raises:
            CheckpointError: the file system refuses, or a source is damaged, on every rank.
        """
        if self._pin_config is None:
            self._pinned = []
            return
        writing: Iterator[NamedFile] | None = None

        def write_next() -> NamedFile | None:
            nonlocal writing
            writing = self._pinning(run) if writing is None else writing
            try:
                return next(writing, None)
            except DataError as error:
                raise CheckpointError(f"rows cannot be pinned: {error.wrong}", error.allowed, error.remedy) from error

        generation = self.reservoir.freeze()
        if self._pinned_of == (generation.hash, self._pin_config):
            return  # the last step of a run stage may be saved more than once
        found: list[NamedFile] = []
        # a file at a time, so that the ranks which wait for the main rank are never silent for long
        while (named := on_first(write_next, run.groups.world, CheckpointError)) is not None:
            found.append(named)
        self._pinned, self._pinned_of = found, (generation.hash, self._pin_config)

    def _pinning(self, run: Run) -> Iterator[NamedFile]:
        """Write the pinned rows; yield their files. Rows whose source is gone and that were not pinned are left out."""
        config, pin = self._config, self._pin_config
        assert pin is not None
        item_bytes = np.dtype(token_dtype(config.model.vocab_size)).itemsize
        generation = replace(self.reservoir.freeze(), pinned=self._pinned_rows())
        generation = chosen(generation, pin.domains, pin.max_bytes, item_bytes)
        if not generation.num_rows:
            return
        # opened once more: this view lets go of its shards, which a thread may read that reads ahead
        stages = config.stages[: run.state.run_stage + 1]
        known = self.reservoir.tombstones
        view = open_reservoir(stages, generation, [], None, config.model.vocab_size, known, most_stale=1.0)

        def rows() -> Iterator[PinnedRow]:
            for number in range(view.num_shards):
                yield from view.rows(number)
                view.release()

        yield from write_pinned(self._folder, rows(), view.index)
        _log.info("reservoir: %d rows are pinned", view.generation.num_rows)
