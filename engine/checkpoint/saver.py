"""Saving beside the training: stage at a step's end, write in the background, commit when every rank has written.

The background threads use no collective: two threads on one communicator would need one order over all ranks, and a
communicator of their own would cost a connection per rank and GPU memory. Instead each step's all-reduce, which is
there anyway, carries two numbers per rank, "done" and "failed" (`signals`); from their sums all ranks see at the same
step that all have written, or that one has failed, and act alike (`advance`). Rank 0 then writes the manifest and
renames the folder, in the background too.

Invariant: at most one save is in flight, every rank is at the same place of it between steps, and any rank's error
is every rank's error. Memory: one copy of what this rank stores, taken once. Does not decide when to save.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from engine.checkpoint.background import Background, CalledOff
from engine.checkpoint.folder import Owner, claim, partial_path
from engine.checkpoint.manifest import CheckpointState
from engine.checkpoint.save import StageTable, Written, build_manifest, commit, prepare, write_staged
from engine.checkpoint.staging import HostBuffer, Staged, reserve_for, stage_pieces
from engine.checkpoint.writers import Writer
from engine.errors import CheckpointError, PalimpsestError
from engine.logs import logger
from engine.parallel import collectives
from engine.parallel.agreement import on_all, on_first
from engine.parallel.groups import Groups
from engine.parallel.state import Piece, Placement

log = logger(__name__)


@dataclass
class _Flight:
    """A save between its staging and its end, as one rank sees it."""

    state: CheckpointState
    owner: Owner
    partial: Path
    tables: list[StageTable]
    staged: Staged
    writing: Background[Written]
    committing: bool = False
    """Every rank has written."""
    commit: Background[Path] | None = None
    """On rank 0, once it commits."""
    began_seconds: float = field(default_factory=time.perf_counter)


class Saver:
    """Saves a run's checkpoints into its folder `checkpoints/`; one per process, on every rank.

    `after_commit(path)` runs on rank 0, in the background, when `path` has been committed; what it raises is logged.
    """

    def __init__(
        self, folder: Path, groups: Groups, after_commit: Callable[[Path], object] = lambda path: None
    ) -> None:
        self.folder = folder
        self.groups = groups
        self._after_commit = after_commit
        self._buffer = HostBuffer()
        self._owner: Owner | None = None
        self._flight: _Flight | None = None

    @property
    def in_flight(self) -> int | None:
        """The step whose save has begun and not ended."""
        return self._flight.state.step if self._flight else None

    def claim(self, job: str, attempt: int) -> None:
        """Makes this start of the run the only one that may commit. Collective over `groups.world`.

        Call when the run starts, before anything is loaded; `begin` does it where it was not called.

        Raises:
            CheckpointError: on every rank, where a newer attempt of the job owns the folder (`Superseded`) or the
                file system refuses.
        """
        owner = Owner(job, attempt)
        if owner != self._owner:
            on_first(lambda: claim(self.folder, owner), self.groups.world, CheckpointError)
            self._owner = owner

    def reserve(self, pieces: list[Piece], placements: list[Placement]) -> None:
        """Takes the host memory of all saves to come, before the first step."""
        reserve_for(pieces, placements, Writer.of(self.groups), self.groups.layout.tensor, self._buffer)

    def save(
        self, pieces: list[Piece], placements: list[Placement], state: CheckpointState, job: str, attempt: int
    ) -> Path:
        """The folder of the committed checkpoint: `begin` and `settle`."""
        self.begin(pieces, placements, state, job, attempt)
        path = self.settle()
        assert path is not None, "a save has begun"
        return path

    def begin(
        self, pieces: list[Piece], placements: list[Placement], state: CheckpointState, job: str, attempt: int
    ) -> None:
        """Stages and starts writing. Collective over `groups.world`; no other save may be in flight.

        `pieces` are all live pieces of this rank and `placements` all parameters of its pipeline stage; what each
        rank stores of them follows from the placements. Call `hold_update` before the next update of the weights.

        Raises:
            CheckpointError: the same on every rank; earlier checkpoints are untouched and nothing half done remains.
        """
        assert self._flight is None, "settle the save before"
        self.claim(job, attempt)
        groups, owner = self.groups, Owner(job, attempt)
        writer = Writer.of(groups)
        staged = on_all(
            lambda: stage_pieces(pieces, placements, writer, groups.layout.tensor, self._buffer),
            groups.world,
            CheckpointError,
        )
        tables = collectives.gather_objects(StageTable(placements, state.hyperparameters), groups.pipe)
        sizes = collectives.gather_objects(staged.num_bytes, groups.world)
        partial = partial_path(self.folder, state.step, owner)
        on_first(lambda: prepare(partial, sizes), groups.world, CheckpointError)

        def write(called_off: threading.Event) -> Written:
            def going_on() -> None:
                if called_off.is_set():
                    raise CalledOff

            return write_staged(staged, partial, state.step, bool(pieces), going_on)

        writing = Background(write, f"checkpoint-{state.step}")
        self._flight = _Flight(state, owner, partial, tables, staged, writing)

    def hold_update(self) -> None:
        """Keeps the next update of weights and moments from overtaking the copies of a save that has begun."""
        if self._flight is not None and not self._flight.writing.done:
            self._flight.staged.hold_update()

    def signals(self) -> tuple[float, float]:
        """(done, failed), each 0 or 1: what this rank has to tell of the save in flight. Sum them over the world."""
        flight = self._flight
        if flight is None:
            return 0.0, 0.0
        if flight.committing:
            return float(flight.commit is not None and flight.commit.done), 0.0
        return float(flight.writing.done), float(flight.writing.failed)

    def advance(self, done: float, failed: float) -> Path | None:
        """Takes the save one step on where the sums of all ranks' `signals` say so; its folder once it is committed.

        Collective over `groups.world` (of small objects, twice per save; most calls do nothing).

        Raises:
            CheckpointError: the save has failed, the same on every rank; nothing half done remains.
        """
        flight = self._flight
        if flight is None:
            return None
        if flight.committing:
            return self._conclude(flight) if done else None
        if failed:
            flight.writing.call_off()
        if failed or done == self.groups.world.size:
            self._collect(flight)
        return None

    def settle(self) -> Path | None:
        """Waits for the save in flight; its folder, or None where there is none. Collective over `groups.world`.

        Raises:
            CheckpointError: as `advance`.
        """
        flight = self._flight
        if flight is None:
            return None
        if not flight.committing:
            self._collect(flight)
        return self._conclude(flight)

    def abandon(self) -> None:
        """Gives the save in flight up, if it still writes; for a rank that ends in an error. Not collective."""
        flight, self._flight = self._flight, None
        if flight is not None:
            flight.writing.call_off()
        if flight is not None and flight.commit is not None:
            flight.commit.call_off()  # takes no notice: a commit that has begun is carried to its end

    def _collect(self, flight: _Flight) -> None:
        """Hands every rank's report to rank 0, which starts the commit."""

        def report() -> Written | None:
            try:
                return flight.writing.result()
            except CalledOff:  # another rank has failed, and its error is the one to tell
                return None

        try:
            written = on_all(report, self.groups.world, CheckpointError)
        except PalimpsestError:
            self._flight = None
            # Collective: a rank that raised at once could have its launcher end rank 0 before this is done.
            on_first(lambda: shutil.rmtree(flight.partial, ignore_errors=True), self.groups.world, CheckpointError)
            raise
        reports = collectives.gather_objects(written, self.groups.world)
        flight.committing = True
        if self.groups.world.position == 0:
            flight.commit = Background(lambda _: self._commit(flight, reports), f"commit-{flight.state.step}")

    def _commit(self, flight: _Flight, reports: list[Written]) -> Path:
        try:
            manifest = build_manifest(flight.state, self.groups.layout, flight.tables, reports, flight.owner)
            path = commit(flight.partial, manifest)
        except BaseException:
            shutil.rmtree(flight.partial, ignore_errors=True)
            raise
        seconds = time.perf_counter() - flight.began_seconds
        log.info("saved %s, %.1f s after its step", path, seconds)
        try:
            self._after_commit(path)
        except Exception as error:  # the checkpoint stands; what is done about it later must not undo that
            log.error("after the commit of %s: %s", path.name, error)
        return path

    def _conclude(self, flight: _Flight) -> Path:
        self._flight = None
        commit = flight.commit
        return on_first(lambda: commit.result() if commit else flight.partial, self.groups.world, CheckpointError)
