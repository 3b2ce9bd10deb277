"""Staging, the first step of a save: live shards are copied into one host buffer that is kept for the next save.

The copies run beside the next forward and backward pass, from a GPU on a stream of their own, from the CPU in the
thread that writes: the next update has to wait for them (`Staged.hold_update`), and so has whoever reads the buffer
(`Staged.wait`). It holds exactly what the file will hold, in the file's order (all weights, then each
moment), so that writing is one pass over one array.
"""

from __future__ import annotations

import threading

import torch

from engine.checkpoint.container import ITEM_BYTES, LONGEST_FRAME, Entry, longest_entry
from engine.checkpoint.manifest import WEIGHT, key_of, moment_state
from engine.checkpoint.writers import Writer, stored_range
from engine.errors import CheckpointError
from engine.parallel.state import ParameterShard, Placement


class Staged:
    """Content of the file of one rank. `data` is flat fp32 and holds the entries in order, once `wait` returns."""

    def __init__(
        self,
        writer: Writer,
        entries: list[Entry],
        moments: tuple[str, ...] | None,
        sources: list[torch.Tensor],
        buffer: HostBuffer,
    ) -> None:
        self.writer, self.entries, self.moments = writer, entries, moments
        self._sources, self._copied = sources, threading.Event()
        self._on_gpu: torch.cuda.Event | None = None
        on_gpu = any(source.is_cuda for source in sources)
        self._target = buffer.reserve(sum(source.numel() for source in sources), pinned=on_gpu)
        self.data = self._target.numpy()
        if on_gpu:
            self._on_gpu = torch.cuda.Event()
            buffer.stream.wait_stream(torch.cuda.current_stream())  # the last update comes first
            with torch.cuda.stream(buffer.stream):
                self._copy()
                self._on_gpu.record()

    @property
    def num_bytes(self) -> int:
        return self.data.size * ITEM_BYTES

    @property
    def most_header_bytes(self) -> int:
        """Upper bound of the header's bytes; the header can be made only when the data are there to be hashed."""
        return sum(longest_entry(entry.key) for entry in self.entries) + LONGEST_FRAME

    def wait(self) -> None:
        """Return when `data` is whole; from the CPU it is this call that copies. Call in one thread."""
        try:
            if self._on_gpu is not None:
                self._on_gpu.synchronize()
            else:
                self._copy()
        finally:
            # also after an error, or the training thread would wait for ever
            self._copied.set()

    def hold_update(self) -> None:
        """Keep weights and moments as they are until they are copied.

        On a GPU, what is launched from now on waits and the host goes on; on the CPU this returns when another thread's
        `wait` has copied.
        """
        if self._on_gpu is not None:
            torch.cuda.current_stream().wait_event(self._on_gpu)
        else:
            self._copied.wait()

    def _copy(self) -> None:
        at = 0
        for source in self._sources:
            self._target[at : at + source.numel()].copy_(source.detach(), non_blocking=source.is_cuda)
            at += source.numel()
        # Views of live shards: kept, they would hold a replaced state in memory.
        self._sources = []


class HostBuffer:
    """Host memory that is taken once and used for every save; page-locked where the shards are on a GPU."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0)
        self._stream: torch.cuda.Stream | None = None

    @property
    def stream(self) -> torch.cuda.Stream:
        """CUDA stream on which copies from this process's GPU run."""
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        return self._stream

    def reserve(self, numel: int, pinned: bool = False) -> torch.Tensor:
        """Return a flat fp32 tensor of `numel` elements; call before the first step: then no save takes new pages."""
        if self._buffer.numel() < numel:
            self._buffer = torch.empty(0)  # give the old one back first
            # zeros and not empty: every page is written to, and so taken, now. Only copies from a GPU to page-locked
            # memory run without holding up the host.
            self._buffer = torch.zeros(numel, dtype=torch.float32, pin_memory=pinned)
        return self._buffer[:numel]


def stored_shards(
    shards: list[ParameterShard], placements: list[Placement], writer: Writer, tensor_size: int
) -> list[tuple[ParameterShard, int]]:
    """Return (shard, number of its real elements) of each shard that this rank stores, in order of name.

    Raises:
        CheckpointError: a shard that the placements ask of this rank is absent or is another range.
    """
    live = {shard.spec.name: shard for shard in shards}
    # A shard that no placement names would be in no file, and nobody would miss it before a load.
    strange = live.keys() - {placement.spec.name for placement in placements}
    if strange:
        raise CheckpointError(f"shards without a placement: {sorted(strange)[:5]}")
    stored = []
    for placement in sorted(placements, key=lambda placement: placement.spec.name):
        start, length = stored_range(placement, writer, tensor_size)
        if length == 0:
            continue
        shard = live.get(placement.spec.name)
        if shard is None or shard.start != start or shard.length < length:
            held = f"[{shard.start}, {shard.start + shard.length})" if shard else "nothing"
            raise CheckpointError(
                f"{placement.spec.name}: {writer} should hold [{start}, {start + length}) and holds {held}",
                remedy="report this: the engine's shards and placements disagree",
            )
        stored.append((shard, length))
    return stored


def reserve_for(
    shards: list[ParameterShard],
    placements: list[Placement],
    writer: Writer,
    tensor_size: int,
    buffer: HostBuffer,
) -> int:
    """Take the memory that `stage_shards` will need, and touch it; return its bytes."""
    stored = stored_shards(shards, placements, writer, tensor_size)
    numel = sum(length * (1 + len(shard.moments)) for shard, length in stored)
    buffer.reserve(numel, pinned=any(shard.weight.is_cuda for shard, _ in stored))
    return numel * ITEM_BYTES


def stage_shards(
    shards: list[ParameterShard],
    placements: list[Placement],
    writer: Writer,
    tensor_size: int,
    buffer: HostBuffer,
) -> Staged:
    """Find what this rank stores and begin to copy it into the buffer; see `Staged` for when the copies are done.

    Raises:
        CheckpointError: as `stored_shards`, and where shards carry other moments than their placements say (all of
            them may carry none), or are not flat fp32.
    """
    stored = stored_shards(shards, placements, writer, tensor_size)
    moments = _moments(shards, placements)
    entries, sources = [], []
    # All weights, then each moment: a load of weights alone reads one run of bytes.
    for moment in (None, *(moments or ())):
        state = WEIGHT if moment is None else moment_state(moment)
        rank_and_size = (writer.tensor_rank, tensor_size)
        for shard, length in stored:
            if moment is not None and moment not in shard.moments:
                continue
            values = shard.weight if moment is None else shard.moments[moment]
            _check_flat(values, shard, state)
            # A parameter that is whole on every tensor rank is stored as part 0 of 1, under whatever tensor size.
            place = rank_and_size if shard.spec.sharding.dim is not None else (0, 1)
            entries.append(Entry(key_of(state, shard.spec.name), shard.start, length, *place))
            sources.append(values[:length])
    return Staged(writer, entries, moments, sources, buffer)


def _moments(shards: list[ParameterShard], placements: list[Placement]) -> tuple[str, ...] | None:
    """Return all moments that some shard carries, in order of name; None where no placement asks for any."""
    if not any(shard.moments for shard in shards):
        return () if any(placement.moments for placement in placements) else None
    expected = {placement.spec.name: set(placement.moments) for placement in placements}
    for shard in shards:
        if shard.moments.keys() != expected[shard.spec.name]:
            raise CheckpointError(
                f"{shard.spec.name} carries the moments {sorted(shard.moments)}, "
                f"its placement says {sorted(expected[shard.spec.name])}"
            )
    return tuple(sorted({moment for shard in shards for moment in shard.moments}))


def _check_flat(values: torch.Tensor, shard: ParameterShard, state: str) -> None:
    # a frozen weight may be in the working dtype, which the copy widens
    frozen = state == WEIGHT and not shard.moments
    wide = values.dtype == torch.float32 or (frozen and values.dtype == torch.bfloat16)
    flat = values.dim() == 1 and values.is_contiguous() and wide
    if not flat or values.numel() != shard.length:
        raise CheckpointError(
            f"{key_of(state, shard.spec.name)}: a shard of shape {tuple(values.shape)}, {values.dtype}",
            f"a flat contiguous float32 view of {shard.length} elements",
        )
