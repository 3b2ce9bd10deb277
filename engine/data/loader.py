"""Batches for training, with a state of a few integers.

The j-th sample of a global batch belongs to data rank (j // micro_batch_size) % data_size, in its micro-batch
j // (micro_batch_size * data_size). Invariant: which samples a step trains on depends on (sources and their weights,
objective, seed, sequence length, window_shards, samples before it, samples left out) alone, never on the ranks, the
micro-batch size or restarts; each sample comes exactly once per epoch of its source, but for those that a rollback or
a damaged shard left out. Every rank holds a `Loader`; a rank that needs no tokens calls `skip` where the others call
`step`. Prefetching is in `engine.data.prefetch`.

N samples, K sources.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from engine.config.mixture import MOST_SOURCES
from engine.config.ramp import Ramp
from engine.config.schema.objective import ObjectiveConfig
from engine.data import stream
from engine.data.batch import Batch, make_batch
from engine.data.damage import Damage
from engine.data.dataset import TokenDataset
from engine.data.mixing import Mixing
from engine.data.sampling import Attention, PackingName, Sampler, make_sampler
from engine.data.source import Part, Source
from engine.data.stream import START, SampleId
from engine.errors import DataError

Interval = tuple[int, int]
"""Positions of samples: the first, and the one after the last."""

State = dict[str, Any]
"""Loader state: JSON of less than 1 KiB, equal on all ranks."""

MOST_LOST = 16
"""Damaged shards that a run does without; more are no accident, and the state is bounded."""


class Cursor(NamedTuple):
    """A place in the stream: samples drawn so far, and the next sample of each source."""

    position: int
    places: tuple[SampleId, ...]


class Samples(NamedTuple):
    """`sources_N` int64 and `addresses_N3` (epoch, window, slot) int64 of samples in their order."""

    sources_N: np.ndarray
    addresses_N3: np.ndarray


class Loader:
    """The stream of global batches over one data set or a mixture of them, epoch after epoch."""

    def __init__(
        self,
        parts: TokenDataset | Sequence[Part],
        sequence_length: int,
        global_batch_size: int | Ramp,
        seed: int,
        window_shards: int,
        attention: Attention,
        packing: PackingName = "concatenate",
        objective: ObjectiveConfig | None = None,
    ) -> None:
        """Raises `DataError` where a data set holds not one sample, or lacks what the objective needs."""
        self.parts = (Part(parts),) if isinstance(parts, TokenDataset) else tuple(parts)
        assert len(self.parts) <= MOST_SOURCES, "resolve() lets no more pass"
        self.sequence_length, self.seed, self.window_shards = sequence_length, seed, window_shards
        self.attention: Attention = attention
        self.packing: PackingName = packing
        self.objective = objective or ObjectiveConfig()
        self.batches = Ramp((global_batch_size,)) if isinstance(global_batch_size, int) else global_batch_size
        self._sources = [Source(k, part, self._sampler, seed, window_shards) for k, part in enumerate(self.parts)]
        for source in self._sources:
            source.refuse_empty()
        self._mixing = Mixing([part.weight for part in self.parts], [source.limit() for source in self._sources])
        self._cursor = Cursor(0, (START,) * len(self.parts))
        self._samples = 0
        self._left_out: tuple[Interval, ...] = ()
        self._lost: tuple[Damage, ...] = ()

    @property
    def fingerprint(self) -> str:
        """Of what the data sets hold, wherever they lie."""
        found = [part.dataset.fingerprint for part in self.parts]
        return found[0] if len(found) == 1 else hashlib.sha256(" ".join(found).encode()).hexdigest()[:32]

    def samples_per_epoch(self) -> int:
        """Samples of each epoch of all sources; where packing knows them only from offsets, reads all of these."""
        return sum(self.samples_by_source())

    def samples_by_source(self) -> list[int]:
        """Samples of each epoch of each source. Reads as `samples_per_epoch`."""
        return [int(source.count(np.arange(source.dataset.num_shards)).sum()) for source in self._sources]

    @property
    def num_samples(self) -> int | None:
        """Length of the whole stream; None without end."""
        return self._mixing.num_samples

    @property
    def samples(self) -> int:
        """Samples trained on so far by the whole run."""
        return self._samples

    @property
    def position(self) -> int:
        """Samples drawn so far: those trained on and those left out."""
        return self._cursor.position

    @property
    def batch_size(self) -> int:
        """Samples of the next step."""
        return self.batches.size(self.batches.steps(self._samples))

    def drawn(self) -> dict[str, int]:
        """Samples drawn so far by source; empty where there is but one."""
        if len(self.parts) == 1:
            return {}
        return {part.name: count for part, count in zip(self.parts, self.mix(self.position), strict=True)}

    def mix(self, position: int) -> list[int]:
        """Samples of each source before a position of the stream (at most `num_samples`)."""
        return self._mixing.counts(position).tolist()

    @property
    def left_out(self) -> tuple[Interval, ...]:
        """The samples that the run leaves out, by position: disjoint, in order."""
        return self._left_out

    def leave_out(self, first: int, end: int) -> None:
        """Passes over the samples at the positions from `first` to before `end`, as far as they are still to come."""
        self._left_out = merged([*self._left_out, (first, end)])

    @property
    def lost(self) -> tuple[Damage, ...]:
        """The shards that the run does without, from the samples on that were next when each was lost."""
        return self._lost

    def lose(self, damage: Damage) -> None:
        """Does without a damaged shard from the next sample on. Every rank that holds this stream calls it alike.

        Raises:
            DataError: more than `MOST_LOST` shards are damaged, none is left, or what is left cannot be counted.
        """
        source = self._sources[damage.source]
        if len(self._lost) == MOST_LOST:
            raise DataError(
                f"more than {MOST_LOST} shards are damaged, the last in {source.dataset.location}",
                f"{MOST_LOST} at most",
                "look at the disk, and restore the shards from a copy",
            )
        source.refuse_mid_window(damage, self._cursor.places[damage.source])
        lost = tuple(sorted({*self._lost, damage}))
        again = [source.again(lost) for source in self._sources]
        again[damage.source].refuse_empty()
        self._lost, self._sources = lost, again

    def state(self) -> State:
        """Where the next sample is, and what must not have changed when this is restored."""
        return {
            "position": self.position,
            "samples": self._samples,
            "places": [list(place) for place in self._cursor.places],
            "left_out": [list(interval) for interval in self._left_out],
            "lost": [[*damage[:2], int(damage.counted)] for damage in self._lost],
        } | self._identity()

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on at a saved state; O(shards) and one window of each source, whatever the position.

        Raises:
            DataError: the state belongs to other data, another order, or is damaged.
        """
        for key, now in self._identity().items():
            if state.get(key) != now:
                raise DataError(
                    f"the saved loader state has {key} = {state.get(key)!r}, this run has {now!r} "
                    f"(data set {self._changed(state)})",
                    f"{key} = {state.get(key)!r}, as when the state was saved",
                    "restore it, or start a new run in another folder",
                )
        try:
            lost = tuple(Damage(int(source), int(shard), bool(counted)) for source, shard, counted in state["lost"])
            sources = [source.again(lost) for source in self._sources]
            places = tuple(SampleId(*map(int, place)) for place in state["places"])
            checked = tuple(source.order.check(place) for source, place in zip(sources, places, strict=True))
            left_out = merged((int(first), int(end)) for first, end in state["left_out"])
            cursor, samples = Cursor(int(state["position"]), checked), int(state["samples"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"the saved loader state is damaged: {error}", "the state as saved", "resume from another checkpoint"
            ) from error
        self._sources, self._lost, self._left_out = sources, lost, left_out
        self._cursor, self._samples = cursor, samples

    def next_sample_ids(self, count: int) -> list[SampleId]:
        """Addresses of the next `count` samples, each in its source; they stay the next ones."""
        return [SampleId(*row) for row in self._take(count)[0].addresses_N3.tolist()]

    def next_sources(self, count: int) -> list[int]:
        """Numbers of the sources of the next `count` samples."""
        return self._take(count)[0].sources_N.tolist()

    def sample_hash(self, count: int) -> str:
        """Short hash of the next `count` samples: their addresses, and the source, shard and row behind each."""
        taken, _ = self._take(count)
        columns = [taken.addresses_N3, self._places(taken)]
        if len(self.parts) > 1:
            columns.append(taken.sources_N[:, None])
        content = np.concatenate(columns, axis=1).astype("<i8").tobytes()
        return hashlib.sha256(self.fingerprint.encode() + content).hexdigest()[:16]

    def step(self, data_rank: int, data_size: int, micro_batch_size: int) -> list[Batch]:
        """This data rank's micro-batches of the next global batch; advances by the whole global batch.

        Every rank gets the same number of them, of the same shape; what is missing at the end are rows of weight 0.
        Raises `DataError` where a shard is damaged, and then does not advance.
        """
        count = self.batch_size
        taken, after = self._take(count)
        rows = micro_batch_rows(count, data_rank, data_size, micro_batch_size)
        mine = Samples(*(column[np.concatenate(rows)] for column in taken))
        places_N2, end, batches = self._places(mine), 0, []
        for size in map(len, rows):
            part, end = slice(end, end + size), end + size
            columns = (mine.sources_N[part], places_N2[part], mine.addresses_N3[part])
            batches.append(make_batch(self._sources, *columns, num_rows=micro_batch_size))
        for part in self.parts:
            part.dataset.release()
        self._cursor, self._samples = after, self._samples + count
        return batches

    def skip(self) -> None:
        """Advances by one global batch and reads no token."""
        count = self.batch_size
        _, self._cursor = self._take(count)
        self._samples += count

    def coming(self) -> list[tuple[TokenDataset, int]]:
        """The remote shards of the windows that the next samples are in, and of those after them, by (data set, shard
        number) in the order of their use."""
        found: list[tuple[TokenDataset, int]] = []
        places = self._cursor.places
        for ahead in (0, 1):
            for source, place in zip(self._sources, places, strict=True):
                if source.dataset.is_remote:
                    numbers = source.order.shards_ahead(place, ahead).tolist()
                    found += [(source.dataset, number) for number in numbers if number not in source.lost]
        return found

    def clone(self) -> Loader:
        """Another loader at the same place, over the same opened data sets."""
        other = copy.copy(self)
        other._sources = [source.again(self._lost) for source in self._sources]
        return other

    def _sampler(self, dataset: TokenDataset, seed: int) -> Sampler:
        return make_sampler(dataset, self.sequence_length, seed, self.attention, self.packing, self.objective)

    def _take(self, count: int) -> tuple[Samples, Cursor]:
        """The next `count` samples that are not left out, and the place behind the last."""
        cursor, kept = self._cursor, []
        while count:
            cursor, reach = self._past_left_out(cursor)
            found, cursor = self._stretch(cursor, min(count, reach or count))
            if self._lost:
                is_kept = self._is_kept(found)
                found = Samples(found.sources_N[is_kept], found.addresses_N3[is_kept])
            kept.append(found)
            count -= found.sources_N.size
        empty = Samples(np.empty(0, np.int64), np.empty((0, 3), np.int64))
        return (kept[0] if len(kept) == 1 else Samples(*map(np.concatenate, zip(empty, *kept, strict=True)))), cursor

    def _past_left_out(self, cursor: Cursor) -> tuple[Cursor, int | None]:
        """The first place from here on that is not left out, and how many are not from there on; None without end."""
        for first, end in self._left_out:
            if cursor.position < first:
                return cursor, first - cursor.position
            if cursor.position < end:
                counts_K = self._mixing.counts(end) - self._mixing.counts(cursor.position)
                cursor = Cursor(end, self._advanced(cursor.places, counts_K.tolist()))
        return cursor, None

    def _stretch(self, cursor: Cursor, count: int) -> tuple[Samples, Cursor]:
        """`count` samples in a row, whatever they are."""
        end = cursor.position + count
        if self.num_samples is not None and end > self.num_samples:
            raise DataError(
                f"the data ends with sample {self.num_samples:,}: each source has come to its epochs or max_tokens",
                "enough samples for the whole stage, and for what it leaves out",
                "raise data.sources.*.epochs or max_tokens, or shorten the stage",
            )
        if len(self._sources) == 1:
            (place,), order = cursor.places, self._sources[0].order
            found = Samples(np.zeros(count, np.int64), order.addresses(place, count))
            return found, Cursor(end, (order.after(place, count),))
        sources_N = self._mixing.of(cursor.position, count)
        addresses_N3, counts = np.empty((count, 3), np.int64), []
        for source, place in zip(self._sources, cursor.places, strict=True):
            mine = np.flatnonzero(sources_N == source.number)
            addresses_N3[mine] = source.order.addresses(place, mine.size)
            counts.append(mine.size)
        return Samples(sources_N, addresses_N3), Cursor(end, self._advanced(cursor.places, counts))

    def _advanced(self, places: tuple[SampleId, ...], counts: list[int]) -> tuple[SampleId, ...]:
        steps = zip(self._sources, places, counts, strict=True)
        return tuple(source.order.after(place, count) if count else place for source, place, count in steps)

    def _places(self, samples: Samples) -> np.ndarray:
        """(N, 2) int64: shard and row of the samples."""
        if len(self._sources) == 1:
            return self._sources[0].order.places_at(samples.addresses_N3)
        places_N2 = np.empty((samples.sources_N.size, 2), np.int64)
        for source in self._sources:
            mine = samples.sources_N == source.number
            places_N2[mine] = source.order.places_at(samples.addresses_N3[mine])
        return places_N2

    def _is_kept(self, samples: Samples) -> np.ndarray:
        """(N,) bool: samples that are in no lost shard."""
        places_N2, kept_N = self._places(samples), np.empty(samples.sources_N.size, bool)
        for source in self._sources:
            mine = samples.sources_N == source.number
            kept_N[mine] = source.refuse_lost(places_N2[mine])
        return kept_N

    def _identity(self) -> State:
        identity = {
            "version": stream.VERSION,
            "fingerprint": self.fingerprint,
            "sequence_length": self.sequence_length,
            "seed": self.seed,
            "window_shards": self.window_shards,
            "attention": self.attention,
            "packing": self.packing,
            "objective": f"{self.objective.name} {_short_hash(self.objective.model_dump())}",
        }
        if len(self.parts) > 1:
            shares = [[part.name, part.weight, part.epochs, part.max_samples] for part in self.parts]
            identity["mixture"] = _short_hash(shares)
            identity["sources"] = " ".join(part.dataset.fingerprint[:6] for part in self.parts)
        return identity

    def _changed(self, state: State) -> str:
        """The folders whose data is not that of a state; all where that cannot be told."""
        before = str(state.get("sources", "")).split()
        pairs = list(zip(self.parts, before, strict=False)) if len(before) == len(self.parts) > 1 else []
        changed = [part for part, fingerprint in pairs if not part.dataset.fingerprint.startswith(fingerprint)]
        return ", ".join(str(part.dataset.location) for part in changed or self.parts)


def _short_hash(tree: Any) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:8]


def merged(intervals: Iterable[Interval]) -> tuple[Interval, ...]:
    """The same positions as disjoint intervals in order, with a gap between any two."""
    found: list[Interval] = []
    for first, end in sorted(intervals):
        if found and first <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        elif first < end:
            found.append((first, end))
    return tuple(found)


def micro_batch_rows(num_samples: int, data_rank: int, data_size: int, micro_batch_size: int) -> list[np.ndarray]:
    """Numbers of the samples in each micro-batch of a data rank; the last ones may be short or empty."""
    stride = micro_batch_size * data_size
    firsts = range(data_rank * micro_batch_size, -(-num_samples // stride) * stride, stride)
    return [np.arange(first, max(first, min(first + micro_batch_size, num_samples))) for first in firsts]
