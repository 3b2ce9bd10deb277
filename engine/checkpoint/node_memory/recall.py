"""Resuming from the memory of the nodes: the newest whole generation, its files passed to the nodes that read them.

A node that was replaced has nothing, and a run that goes on in another layout reads other files than it wrote. So every
node says what it has, every byte of a candidate is held against its hash where it lies, and what a node's ranks
will read and it lacks comes from one that has it. Then the ordinary `load` reads the node's folder. Where a file is
on no node any more, the words say so, and the next older generation, or the disk, is the next candidate.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.checkpoint import manifest_json
from engine.checkpoint.container import disk_errors, file_digest
from engine.checkpoint.folder import committed, remove, step_of, step_path
from engine.checkpoint.load import files_needed
from engine.checkpoint.manifest import Manifest
from engine.checkpoint.node_memory import passing
from engine.checkpoint.node_memory.generations import Delivery, Generation, deliveries, lost, newest_first
from engine.checkpoint.node_memory.node_folder import free_bytes
from engine.checkpoint.node_memory.node_store import NodeStore
from engine.checkpoint.verify import verify_files
from engine.errors import CheckpointError
from engine.logs import logger
from engine.parallel import collectives
from engine.parallel.agreement import on_all
from engine.parallel.state import ParameterShard

log = logger(__name__)


@dataclass(frozen=True)
class Eligibility:
    """Conditions under which a run may go on from a generation; others are left alone, which is logged."""

    meanings: frozenset[str]
    """Hashes of the configuration's keys of kind meaning, up to each of its run stages."""
    job: str
    """Job that used the run folder last: the state of another job may be of steps that it has since undone."""
    least_step: int
    """Lowest step that is of use: the disk has everything below."""
    least_attempt: int
    """Lowest attempt: an earlier start may have saved steps that a later one has undone."""


class Recall:
    """The generations that the nodes hold when a run starts; looks at each once. Collective over the world."""

    def __init__(self, store: NodeStore) -> None:
        self._store = store
        self._world = store.groups.world
        mine = self._own() if store.acts_for_node else {}
        told = collectives.gather_objects(mine, self._world)
        self._held: list[dict[Generation, set[str]]] = [told[rank] for rank in store.nodes.first_ranks]
        self._left = newest_first(self._held)

    def newest(
        self, eligible: Eligibility, shards: list[ParameterShard], zero_moments: Collection[str] = ()
    ) -> Path | None:
        """Return the folder of the newest eligible generation, from which each rank can load its shards.

        None means that there is none.
        """
        while self._left and self._left[0].step >= eligible.least_step:
            # popped: the next call, with an older checkpoint of the disk in hand, goes on behind it
            generation = self._left.pop(0)
            try:
                return self._bring(generation, eligible, shards, zero_moments)
            except CheckpointError as problem:
                if self._world.position == 0:
                    log.warning("step %d in the nodes' memory is passed over: %s", generation.step, problem)
        return None

    def _own(self) -> dict[Generation, set[str]]:
        """Return the names of the files of each generation on this node; their bytes are verified later."""
        found = {}
        for path in committed(self._store.folder):
            try:
                manifest = manifest_json.read(path)
                digest = file_digest(path / manifest_json.FILE)
            except (CheckpointError, OSError) as problem:
                log.warning("node %d: step %d in memory is passed over: %s", self._store.node, step_of(path), problem)
                continue
            names = {name for name in manifest.files if (path / name).is_file()}
            found[Generation(manifest.state.step, manifest.attempt, digest)] = names
        return found

    def _bring(
        self,
        generation: Generation,
        eligible: Eligibility,
        shards: list[ParameterShard],
        zero_moments: Collection[str],
    ) -> Path:
        """Verify a generation and pass its files to the nodes that need them.

        Raises:
            CheckpointError: it cannot be used; the same on every rank.
        """
        manifest = self._manifest(generation)
        _check_eligible(manifest, eligible)
        held = self._held_by_node(generation)
        # Twice: the first look costs nothing, and spares reading every byte of a generation that cannot be used.
        self._check_held(manifest, held)
        held = self._verify(manifest, held)
        self._check_held(manifest, held, " and unharmed")
        rank_and_size = (self._store.groups.coordinates.tensor_rank, self._store.groups.layout.tensor)
        mine = on_all(
            lambda: files_needed(manifest, shards, *rank_and_size, zero_moments), self._world, CheckpointError
        )
        by_rank = collectives.gather_objects(mine, self._world)
        # by rank -> by node
        needed = [set().union(*(by_rank[rank] for rank in ranks)) for ranks in self._store.nodes.ranks]
        self._pass(manifest, deliveries(needed, held), generation in self._held[self._store.node])
        return step_path(self._store.folder, generation.step)

    def _manifest(self, generation: Generation) -> Manifest:
        """Return the manifest of a generation on every rank, read by a node that has it."""
        source = next(node for node, own in enumerate(self._held) if generation in own)
        first = self._store.nodes.first_ranks[source]
        path = step_path(self._store.folder, generation.step)
        read = on_all(
            lambda: manifest_json.read(path) if self._store.rank == first else None, self._world, CheckpointError
        )
        return collectives.broadcast_object(read, self._world, first)

    def _held_by_node(self, generation: Generation) -> list[set[str]]:
        return [own.get(generation, set()) for own in self._held]

    def _verify(self, manifest: Manifest, held: list[set[str]]) -> list[set[str]]:
        """Return the names of the whole files on each node, by reading all of them; a node's ranks share the work."""
        store = self._store
        position, ranks = store.nodes.position(store.rank), store.nodes.ranks[store.node]
        # Node with files a to e and 2 ranks: rank 0 reads a, c, e and rank 1 reads b, d.
        names = sorted(held[store.node])[position :: len(ranks)]
        found = verify_files(step_path(store.folder, manifest.state.step), manifest, names)
        for damage in found:
            log.warning("node %d: step %d in memory, %s", store.node, manifest.state.step, damage)
        damaged = collectives.gather_objects({damage.file for damage in found}, self._world)
        return [
            own - set().union(*(damaged[rank] for rank in ranks))
            for own, ranks in zip(held, store.nodes.ranks, strict=True)
        ]

    def _check_held(self, manifest: Manifest, held: list[set[str]], how: str = "") -> None:
        gone = lost(manifest.files, held)
        if gone:
            raise CheckpointError(
                f"{len(gone)} of its {len(manifest.files)} files are on no node{how}: {gone[0]}"
                f"{', ...' if len(gone) > 1 else ''}",
                "each file on the node that wrote it or on the next one",
                "nothing, where two nodes side by side were lost: the run goes on from an older step",
            )

    def _pass(self, manifest: Manifest, plan: list[Delivery], is_here: bool) -> None:
        """Bring the files of `plan` to their nodes; `is_here`: this node has something of the generation already."""
        store, path = self._store, step_path(self._store.folder, manifest.state.step)
        arriving = [manifest.files[one.file] for one in plan if one.target == store.node]
        wanted = sum(record.num_bytes for record in arriving)

        def make() -> None:
            if wanted > free_bytes(store.folder):
                raise CheckpointError(f"no room in {store.folder} for {wanted:,} bytes that other nodes have")
            if not is_here:
                remove(path)  # another attempt's of this step, or damaged
                with disk_errors(path):
                    path.mkdir()
                manifest_json.write(manifest, path)
            for record in arriving:
                passing.take_room(path / f".{record.name}", record.num_bytes)

        store.on_nodes(make)
        on_all(lambda: self._exchange(manifest, plan, path), self._world, CheckpointError)

    def _exchange(self, manifest: Manifest, plan: list[Delivery], path: Path) -> None:
        """Pass the files of the plan, in the same order on every rank; the lines of the ring share the work."""
        nodes, rank = self._store.nodes, self._store.rank
        lines = nodes.lines()
        # A short line has a rank twice; the first ones, as many as the smallest node has ranks, share no rank.
        used = min(map(len, nodes.ranks))
        problems: list[CheckpointError] = []  # told at the end: others wait for what this rank has yet to send
        for number, delivery in enumerate(plan):
            # round robin over the lines, so that all ranks of a node send and receive
            line, group = lines[number % used], self._store.lines[number % used]
            record = manifest.files[delivery.file]
            source, target = line[delivery.source], line[delivery.target]
            works: list[Any] = []
            if group is not None and rank == source:
                works = passing.start_sending(path / record.name, group, group.ranks.index(target))
            elif group is not None and rank == target:
                place = path / f".{record.name}"
                works = passing.start_receiving(place, record.num_bytes, group, group.ranks.index(source))
            for work in works:
                work.wait()
            if rank == target:
                try:
                    passing.accept(path / f".{record.name}", record)
                except CheckpointError as problem:
                    problems.append(problem)
        if problems:
            raise problems[0]


def _check_eligible(manifest: Manifest, eligible: Eligibility) -> None:
    """Raise `CheckpointError` for a generation of another run, or of a start that the run has left behind."""
    if manifest.state.config_hash not in eligible.meanings or manifest.job != eligible.job:
        meanings = ", ".join(sorted(eligible.meanings))
        raise CheckpointError(
            f"it is of job {manifest.job!r} and configuration {manifest.state.config_hash}",
            f"job {eligible.job!r}, which used the run folder last, and configuration {meanings}",
        )
    if manifest.attempt < eligible.least_attempt:
        raise CheckpointError(
            f"it is of attempt {manifest.attempt}, and attempt {eligible.least_attempt} has saved to the disk since",
            f"attempt {eligible.least_attempt} or later",
        )
