"""Saving beside the training: stage at a step's end, write in the background, commit when every rank has written.

The background threads use no collective: two threads on one communicator would need one order over all ranks, and a
communicator of their own would cost a connection per rank and GPU memory. Instead each step's all-reduce, which is
there anyway, carries two numbers per rank, "done" and "failed" (`signals`); from their sums all ranks see at the same
step that all have written, or that one has failed, and act alike (`advance`). What then makes the save stand goes on
in the background, too; where a save goes and what that is, is a `Store`'s business: the run's folder on the disk
(`DiskStore`), or the memory of the nodes (`NodeStore`).

Invariant: at most one save is in flight, whatever its store, so that one buffer serves all; every rank is at the same
point of it between steps, and any rank's error is every rank's error. Memory: one copy of what this rank stores, taken
once. Does not decide when to save.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from engine.checkpoint.background import Background, Cancelled
from engine.checkpoint.folder import Owner
from engine.checkpoint.manifest import CheckpointState
from engine.checkpoint.staging import HostBuffer, Staged, reserve_for, stage_shards
from engine.checkpoint.stores import DiskStore, Save, StageTable, Store, Written
from engine.checkpoint.writers import Writer
from engine.errors import CheckpointError, PalimpsestError
from engine.parallel import collectives
from engine.parallel.agreement import on_all
from engine.parallel.groups import Groups
from engine.parallel.state import ParameterShard, Placement


@dataclass
class _Flight:
    """A save between its staging and its end, as one rank sees it."""

    save: Save
    store: Store
    staged: Staged
    writing: Background[Written]
    committing: bool = False
    """True once every rank has written."""
    commit: Background[Path] | None = None
    """Work of this rank once all have written; None if it has none."""


class Saver:
    """Saver of a run's checkpoints, into its folder `checkpoints/` or another store; one per process, on every rank.

    `after_commit(path)` runs on rank 0, in the background, when `path` has been committed; what it raises is logged.
    """

    def __init__(
        self, folder: Path, groups: Groups, after_commit: Callable[[Path], object] = lambda path: None
    ) -> None:
        self.groups = groups
        self.disk = DiskStore(folder, groups, after_commit)
        self._buffer = HostBuffer()
        self._owner: Owner | None = None
        self._flight: _Flight | None = None

    @property
    def in_flight(self) -> int | None:
        """Step whose save has begun and not ended; None where there is none."""
        return self._flight.save.step if self._flight else None

    def goes_to(self, store: Store | None) -> bool:
        """Return True if a save to this store is in flight."""
        return self._flight is not None and self._flight.store is store

    def acquire(self, job: str, attempt: int) -> None:
        """Make this start of the run the only one that may commit. Collective over `groups.world`.

        Call when the run starts, before anything is loaded; `begin` does it where it was not called.

        Raises:
            CheckpointError: on every rank, where a newer attempt of the job owns the folder (`Superseded`) or the
                file system refuses.
        """
        owner = Owner(job, attempt)
        if owner != self._owner:
            self.disk.acquire(owner)
            self._owner = owner

    def reserve(self, shards: list[ParameterShard], placements: list[Placement]) -> int:
        """Take the host memory of all saves to come, before the first step; return its bytes."""
        return reserve_for(shards, placements, Writer.of(self.groups), self.groups.layout.tensor, self._buffer)

    def save(
        self,
        shards: list[ParameterShard],
        placements: list[Placement],
        state: CheckpointState,
        job: str,
        attempt: int,
    ) -> Path:
        """Save and wait (`begin`, then `settle`); return the folder of the committed checkpoint."""
        self.begin(shards, placements, state, job, attempt)
        path = self.settle()
        assert path is not None, "a save has begun"
        return path

    def begin(
        self,
        shards: list[ParameterShard],
        placements: list[Placement],
        state: CheckpointState,
        job: str,
        attempt: int,
        store: Store | None = None,
    ) -> None:
        """Stage and start writing, to the disk or another store; no other save may be in flight.

        Collective over `groups.world`.

        `shards` are all live shards of this rank and `placements` all parameters of its pipeline stage; what each
        rank stores of them follows from the placements. Call `hold_update` before the next update of the weights.

        Raises:
            CheckpointError: the same on every rank; earlier checkpoints are untouched and nothing half done remains.
        """
        assert self._flight is None, "settle the save before"
        self.acquire(job, attempt)
        groups, owner, store = self.groups, Owner(job, attempt), store or self.disk
        writer = Writer.of(groups)
        staged = on_all(
            lambda: stage_shards(shards, placements, writer, groups.layout.tensor, self._buffer),
            groups.world,
            CheckpointError,
        )
        tables = collectives.gather_objects(StageTable(placements, state.hyperparameters), groups.pipe)
        # Every rank has every size: a store checks room for all files before the first is begun.
        sizes = collectives.gather_objects((staged.num_bytes, staged.most_header_bytes), groups.world)
        save = Save(state, owner, store.partial(state.step, owner), tables, sizes)
        store.prepare(save)

        def write(cancelled: threading.Event) -> Written:
            def check_cancelled() -> None:
                if cancelled.is_set():
                    raise Cancelled

            return store.write(save, staged, bool(shards), check_cancelled)

        self._flight = _Flight(save, store, staged, Background(write, f"checkpoint-{state.step}"))

    def hold_update(self) -> None:
        """Keep the next update of weights and moments from overtaking the copies of a save that has begun."""
        # What is written was copied before: no copy is left to wait for.
        if self._flight is not None and not self._flight.writing.done:
            self._flight.staged.hold_update()

    def save_flags(self) -> tuple[float, float]:
        """Return this rank's report on the save in flight, (done, failed), each 0 or 1. Sum them over the world."""
        flight = self._flight
        if flight is None:
            return 0.0, 0.0
        # To the disk rank 0 alone commits: the others are done at once, and the sum is the world's size with the last.
        if flight.committing:
            return float(flight.commit is None or flight.commit.done), 0.0
        return float(flight.writing.done), float(flight.writing.failed)

    def advance(self, done: float, failed: float) -> Path | None:
        """Advance the save where the sums of all ranks' `signals` say so; return its folder once it is committed.

        Collective over `groups.world` (of small objects, twice per save; most calls do nothing).

        Raises:
            CheckpointError: the save has failed, the same on every rank; nothing half done remains.
        """
        flight = self._flight
        if flight is None:
            return None
        everywhere = done == self.groups.world.size
        if flight.committing:
            return self._conclude(flight) if everywhere else None
        # One rank failed: the others stop between two chunks, so that nobody waits for gigabytes that are of no use.
        if failed:
            flight.writing.cancel()
        if failed or everywhere:
            self._collect(flight)
        return None

    def settle(self) -> Path | None:
        """Wait for the save in flight; return its folder, or None where there is none. Collective over `groups.world`.

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
        """Abandon the save in flight, if it still writes; for a rank that ends in an error. Not collective."""
        # Taken first: a second call, from another path of an error, finds nothing.
        flight, self._flight = self._flight, None
        if flight is not None:
            flight.writing.cancel()
        if flight is not None and flight.commit is not None:
            flight.store.give_up(flight.commit)

    def _collect(self, flight: _Flight) -> None:
        """Hand every rank's report to the store, which starts the commit."""

        def report() -> Written | None:
            try:
                return flight.writing.result()
            except Cancelled:  # another rank has failed, and its error is the one to tell
                return None

        try:
            written = on_all(report, self.groups.world, CheckpointError)
        except PalimpsestError:
            self._flight = None
            # Collective: a rank that raised at once could have its launcher end another before this is done.
            flight.store.clear(flight.save)
            raise
        reports = collectives.gather_objects(written, self.groups.world)
        flight.committing = True
        flight.commit = flight.store.start_commit(flight.save, reports)

    def _conclude(self, flight: _Flight) -> Path:
        self._flight = None
        return flight.store.conclude(flight.save, flight.commit)
