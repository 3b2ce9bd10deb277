"""Checkpoints in the memory of the nodes: each holds its ranks' files and a copy of those of the node before it.

After Gemini (Wang et al., SOSP 2023), with one copy on the next node of a ring, made of the files that go to the disk,
too. A save here is a generation: every rank writes its file into its node's memory; when all have, each sends it to
its keeper on the next node, in the background, over a group of host memory that nothing else uses. Two ranks pass one
file per generation and one generation is under way, so there is one order of messages without any agreement on it.
When every node has everything, verified by hash, all give the generation its name; then the older one goes.

Invariant: from the first generation on, and whatever node is lost at whatever moment, the files of some whole
generation are on the others. Which one a restart reads is `engine.checkpoint.node_memory.recall`.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from engine.checkpoint import manifest_json
from engine.checkpoint.background import Background
from engine.checkpoint.folder import (
    Owner,
    check_owner,
    committed,
    partial_path,
    publish,
    remove,
    step_of,
    step_path,
    told_by_owner,
)
from engine.checkpoint.manifest import Manifest
from engine.checkpoint.node_memory import hosts, passing
from engine.checkpoint.node_memory.hosts import Held
from engine.checkpoint.node_memory.node_folder import check_room, drop, folder_of, free_bytes, left_behind, take
from engine.checkpoint.staging import Staged
from engine.checkpoint.stores import CheckCancelled, Save, Written, write_staged
from engine.config.rank_environment import RankEnvironment
from engine.errors import CheckpointError, EnvironmentProblem
from engine.logs import logger
from engine.parallel import collectives
from engine.parallel.agreement import on_all, on_first
from engine.parallel.groups import Group, Groups, join_lines
from engine.parallel.nodes import Nodes

log = logger(__name__)
Result = TypeVar("Result")


class NodeStore:
    """The generations of one run, as one rank sees them. Methods are collective over the world unless they say
    otherwise."""

    def __init__(
        self,
        base: Path,
        run: Path,
        groups: Groups,
        environment: RankEnvironment,
        connect: Callable[[list[tuple[int, ...]], int], list[Group | None]] = join_lines,
    ) -> None:
        """Make the store. `base` is a folder in memory, `run` the run folder; `connect` makes the ring's groups."""
        identities = collectives.gather_objects((socket.gethostname(), environment.node_rank), groups.world)
        self.nodes, self.groups = Nodes.of(identities), groups
        self.hosts = tuple(identities[rank][0] for rank in self.nodes.first_ranks)
        self.rank = groups.world.ranks[groups.world.position]
        self.node = self.nodes.node_of(self.rank)
        self.acts_for_node = self.nodes.first_ranks[self.node] == self.rank
        # Groups of their own: the ring's messages must not meet those of the training in one communicator.
        self.lines = connect(self.nodes.lines(), self.rank) if self.nodes.count > 1 else []
        self.owner = Owner(environment.job, environment.attempt)
        self.run, self.folder = run, folder_of(base, run, self.nodes.on_host[self.node])
        self._lock: object = None
        self._dropping: Background[None] | None = None

    def acquire(self) -> None:
        """Acquire every node's folder for this start of the run; log what others have left there.

        Raises:
            EnvironmentProblem: a node has no such memory.
            CheckpointError: a newer attempt of the job owns it (`Superseded`).
        """
        self._lock = self.on_nodes(lambda: take(self.folder, self.run, self.owner), EnvironmentProblem)
        for words in self.on_nodes(lambda: left_behind(self.folder), EnvironmentProblem) or ():
            log.warning("node %d: %s: remove it", self.node, words)
        if self.nodes.count == 1:
            log.info("checkpoints in the memory of one node outlive its processes, not the node")

    def check_room(self, num_bytes: int) -> None:
        """Check the room for two generations, before the first step; `num_bytes` are those that this rank stores.

        Raises:
            EnvironmentProblem: a node's memory does not hold two generations.
        """
        # one per cent for header and manifest, as in `stores.prepare`
        sizes = collectives.gather_objects(num_bytes + num_bytes // 100, self.groups.world)
        held = [sizes[rank] for rank in self._held_here()]
        self.on_nodes(lambda: check_room(self.folder, held), EnvironmentProblem)

    def partial(self, step: int, owner: Owner) -> Path:
        return partial_path(self.folder, step, owner)

    def prepare(self, save: Save) -> None:
        wanted = sum(map(sum, (save.sizes[rank] for rank in self._held_here())))

        def make() -> None:
            # The older generation may still be on its way out; its room is needed now.
            if self._dropping is not None:
                self._dropping.result()
            shutil.rmtree(save.partial, ignore_errors=True)
            if (free := free_bytes(self.folder)) < wanted:
                raise _no_room(self.folder, wanted, free)
            save.partial.mkdir()

        self.on_nodes(make)

    def write(self, save: Save, staged: Staged, holds_shards: bool, check_cancelled: CheckCancelled) -> Written:
        """Write this rank's file, and take the room of the copies that will come. Not collective."""
        with told_by_owner(self.folder, save.owner):
            for rank in self.nodes.kept_by(self.rank):
                if save.data_bytes[rank]:
                    passing.take_room(_arriving(save, rank), sum(save.sizes[rank]))
            return write_staged(staged, save.partial, save.step, holds_shards, check_cancelled)

    def clear(self, save: Save) -> None:
        self.on_nodes(lambda: shutil.rmtree(save.partial, ignore_errors=True))

    def start_commit(self, save: Save, reports: list[Written]) -> Background[Path]:
        manifest = on_first(
            lambda: save.manifest(self.groups.layout, reports), self.groups.world, CheckpointError
        )  # the rest of its values may differ between pipelines: one rank's are everybody's
        return Background(lambda _: self._pass_on(save, manifest, reports), f"generation-{save.step}")

    def conclude(self, save: Save, commit: Background[Path] | None) -> Path:
        assert commit is not None
        try:
            on_all(commit.result, self.groups.world, CheckpointError)
            target = step_path(self.folder, save.step)
            # Only after every rank has everything: until here the generation before is the newest on all nodes.
            self.on_nodes(lambda: self._publish(save.partial, target))
        except CheckpointError:
            self.clear(save)
            raise
        # In the background, and only now: two generations are there for a moment, never none.
        if self.acts_for_node:
            self._dropping = Background(lambda _: self._keep_only(save.step), "drop-generations")
        if self.groups.world.position == 0:
            hosts.note(self.run, Held(save.step, self.owner.job, self.hosts))
            seconds = time.perf_counter() - save.began_seconds
            log.info("step %d is in the memory of %d nodes, %.2f s after it", save.step, self.nodes.count, seconds)
        return target

    def give_up(self, commit: Background[Path]) -> None:
        """Leave the commit to its thread: it may wait for a rank that does not answer any more. Not collective."""

    def keep_only(self, step: int | None) -> None:
        """Drop the generations of all other steps, on all nodes; of every step without one."""
        if step is None and self.groups.world.position == 0:
            hosts.forget(self.run)
        self.on_nodes(lambda: self._keep_only(step))

    def end(self) -> None:
        """Give all memory back."""
        if self.groups.world.position == 0:
            hosts.forget(self.run)
        self.on_nodes(lambda: drop(self.folder))

    def on_nodes(
        self, action: Callable[[], Result], unexpected: type[EnvironmentProblem | CheckpointError] = CheckpointError
    ) -> Result | None:
        """Return the result of `action` on one rank of each node, None on the others; raises on all where one fails."""
        return on_all(lambda: action() if self.acts_for_node else None, self.groups.world, unexpected)

    def _held_here(self) -> list[int]:
        """Return the ranks whose files are on this node."""
        own = self.nodes.ranks[self.node]
        return [*own, *(other for rank in own for other in self.nodes.kept_by(rank))]

    def _pass_on(self, save: Save, manifest: Manifest, reports: list[Written]) -> Path:
        """Send this rank's file to its keeper and receive those that it keeps; return when they are verified."""
        if self.acts_for_node:
            manifest_json.write(manifest, save.partial)
        works, arriving = [], []
        for rank in self.nodes.kept_by(self.rank):
            record = reports[rank].record
            if record is not None:
                path, line = _arriving(save, rank), self._line(rank)
                # Receives are posted before the send: all nodes send and receive at once, and none waits for its turn.
                works += passing.start_receiving(path, record.num_bytes, line, line.ranks.index(rank))
                arriving.append((path, record))
        record, keeper = reports[self.rank].record, self.nodes.keeper_of(self.rank)
        if record is not None and keeper is not None:
            line = self._line(self.rank)
            works += passing.start_sending(save.partial / record.name, line, line.ranks.index(keeper))
        for work in works:
            work.wait()
        for path, record in arriving:
            passing.accept(path, record)
        return save.partial

    def _line(self, sender: int) -> Group:
        """Return the group along which a rank's own file travels."""
        line = self.lines[self.nodes.position(sender)]
        assert line is not None
        return line

    def _publish(self, partial: Path, target: Path) -> None:
        check_owner(self.folder, self.owner)
        publish(partial, target)

    def _keep_only(self, step: int | None) -> None:
        for path in committed(self.folder):
            if step_of(path) != step:
                with contextlib.suppress(CheckpointError):  # the next one that is whole drops it
                    remove(path)


def _arriving(save: Save, rank: int) -> Path:
    """Return the path at which the file of another node's rank is received."""
    return save.partial / f".from-{rank}"


def _no_room(folder: Path, wanted: int, free: int) -> CheckpointError:
    return CheckpointError(
        f"no room in {folder}: a generation takes {wanted:,} bytes on this node, {free:,} are free",
        "room for two generations, beside what else lies in this memory",
        "see what fills it; the generation before is whole",
    )
