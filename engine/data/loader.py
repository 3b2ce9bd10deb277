"""Batches for training, with a state of a few integers.

The j-th sample of a global batch belongs to data rank (j // micro_batch_size) % data_size, in its micro-batch
j // (micro_batch_size * data_size). Invariant: which samples a step trains on depends on (sources and their weights,
objective, seed, sequence length, window_shards, samples before it, samples left out) alone, never on the ranks, the
micro-batch size or restarts; each sample comes exactly once per epoch of its source, but for those that a rollback or
a damaged shard left out. Every rank holds a `Loader`; a rank that needs no tokens calls `skip` where the others call
`step`. Some steps are read together, which costs hardly more than one; nothing but the time of reading depends on it.
Prefetching is in `engine.data.prefetch`, which samples come next in `engine.data.drawing`.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from engine.config.mixture import MOST_SOURCES
from engine.config.ramp import Ramp
from engine.config.schema.objective import ObjectiveConfig
from engine.data.batch import Batch, make_batches, reuse_freed_memory
from engine.data.drawing import Cursor, Drawing, Interval, Samples, merged
from engine.data.objectives.sampling import Attention, PackingName, Sampler, make_sampler
from engine.data.order import stream
from engine.data.order.mixing import Mixing
from engine.data.order.stream import START, SampleId
from engine.data.shards.damage import Damage
from engine.data.shards.dataset import TokenDataset
from engine.data.source import Part, Source
from engine.errors import DataError

State = dict[str, Any]
"""Loader state: JSON of less than 1 KiB, equal on all ranks."""

MOST_LOST = 16
"""Damaged shards that a run does without; more are no accident, and the state is bounded."""

MOST_STEPS = 8
"""Steps that are read together."""
MOST_TOKENS = 1 << 17
"""Tokens of a rank that are made into batches together, and from which on no further step is read with others: enough
that the calls of numpy hardly count, little enough to stay in a cache."""

Ranks = tuple[int, int, int]
"""Data rank, data ranks, and rows of a micro-batch."""


class _Step(NamedTuple):
    """The micro-batches of a step that was read ahead: what they were read for, and where the step ends."""

    drawing: Drawing
    cursor: Cursor
    ranks: Ranks
    batches: list[Batch]
    after: Cursor
    num_samples: int
    passed_over: tuple[int, ...]
    """Samples of lost shards that were drawn and left out in it, by source; empty where no shard is lost."""


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
        sources = tuple(Source(k, part, self._sampler, seed, window_shards) for k, part in enumerate(self.parts))
        for source in sources:
            source.refuse_empty()
        mixing = Mixing([part.weight for part in self.parts], [source.limit() for source in sources])
        self._drawing = Drawing(sources, mixing)
        self._cursor = Cursor(0, (START,) * len(self.parts))
        self._samples = 0
        self._lost: tuple[Damage, ...] = ()
        self._passed_over = (0,) * len(self.parts)
        """By source, samples at positions that are not left out which were not trained on: those of lost shards; less
        those that were trained on before their positions were left out."""
        self._ahead: deque[_Step] = deque()
        self._steps_together = 1
        reuse_freed_memory()

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
        return [int(source.count(np.arange(source.dataset.num_shards)).sum()) for source in self._drawing.sources]

    @property
    def num_samples(self) -> int | None:
        """Length of the whole stream; None without end."""
        return self._drawing.mixing.num_samples

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

    def trained(self) -> dict[str, int]:
        """Samples trained on so far by source: those drawn but for those left out. Empty where there is but one."""
        if len(self.parts) == 1:
            return {}
        counts_K = self._offered(0, self.position) - np.array(self._passed_over)
        return {part.name: count for part, count in zip(self.parts, counts_K.tolist(), strict=True)}

    def _offered(self, first: int, end: int) -> np.ndarray:
        """(K,) samples of each source at the positions [first, end) that are not left out by position."""
        counts = self._drawing.mixing.counts
        counts_K = counts(end) - counts(first)
        for left, right in self.left_out:
            if max(left, first) < min(right, end):
                counts_K = counts_K - counts(min(right, end)) + counts(max(left, first))
        return counts_K

    def _passed(self, before: Cursor, taken: Samples, after: Cursor) -> tuple[int, ...]:
        """Samples of lost shards between two places, by source."""
        if not self._lost or len(self.parts) == 1:
            return ()
        taken_K = np.bincount(taken.sources_N, minlength=len(self.parts))
        return tuple((self._offered(before.position, after.position) - taken_K).tolist())

    def _advance(self, after: Cursor, num_samples: int, passed_over: tuple[int, ...]) -> None:
        self._cursor, self._samples = after, self._samples + num_samples
        if passed_over:
            self._passed_over = tuple(map(sum, zip(self._passed_over, passed_over, strict=True)))

    def mix(self, position: int) -> list[int]:
        """Samples of each source before a position of the stream (at most `num_samples`)."""
        return self._drawing.mixing.counts(position).tolist()

    @property
    def left_out(self) -> tuple[Interval, ...]:
        """The samples that the run leaves out, by position: disjoint, in order."""
        return self._drawing.left_out

    def leave_out(self, first: int, end: int) -> None:
        """Passes over the samples at the positions from `first` to before `end`, as far as they are still to come."""
        before_K = self._offered(0, self.position)
        self._drawing = replace(self._drawing, left_out=merged([*self.left_out, (first, end)]))
        if len(self.parts) > 1:  # what is trained on already stays counted
            passed_over = self._offered(0, self.position) - before_K + np.array(self._passed_over)
            self._passed_over = tuple(passed_over.tolist())

    @property
    def lost(self) -> tuple[Damage, ...]:
        """The shards that the run does without, from the samples on that were next when each was lost."""
        return self._lost

    def lose(self, damage: Damage) -> None:
        """Does without a damaged shard from the next sample on. Every rank that holds this stream calls it alike.

        Raises:
            DataError: more than `MOST_LOST` shards are damaged, none is left, or what is left cannot be counted.
        """
        source = self._drawing.sources[damage.source]
        if len(self._lost) == MOST_LOST:
            raise DataError(
                f"more than {MOST_LOST} shards are damaged, the last in {source.dataset.location}",
                f"{MOST_LOST} at most",
                "look at the disk, and restore the shards from a copy",
            )
        source.refuse_mid_window(damage, self._cursor.places[damage.source])
        lost = tuple(sorted({*self._lost, damage}))
        again = tuple(source.again(lost) for source in self._drawing.sources)
        again[damage.source].refuse_empty()
        self._lost, self._drawing = lost, replace(self._drawing, sources=again)

    def state(self) -> State:
        """Where the next sample is, and what must not have changed when this is restored."""
        return {
            "position": self.position,
            "samples": self._samples,
            "places": [list(place) for place in self._cursor.places],
            "left_out": [list(interval) for interval in self.left_out],
            "lost": [[*damage[:2], int(damage.counted)] for damage in self._lost],
            **({"passed_over": list(self._passed_over)} if any(self._passed_over) else {}),
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
            sources = tuple(source.again(lost) for source in self._drawing.sources)
            places = tuple(SampleId(*map(int, place)) for place in state["places"])
            checked = tuple(source.order.check(place) for source, place in zip(sources, places, strict=True))
            left_out = merged((int(first), int(end)) for first, end in state["left_out"])
            cursor, samples = Cursor(int(state["position"]), checked), int(state["samples"])
            passed_over = tuple(int(count) for count in state.get("passed_over", [0] * len(self.parts)))
            if len(passed_over) != len(self.parts):
                raise ValueError(f"passed_over has {len(passed_over)} numbers for {len(self.parts)} sources")
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"the saved loader state is damaged: {error}", "the state as saved", "resume from another checkpoint"
            ) from error
        self._lost, self._drawing = lost, replace(self._drawing, sources=sources, left_out=left_out)
        self._cursor, self._samples, self._passed_over = cursor, samples, passed_over

    def next_sample_ids(self, count: int) -> list[SampleId]:
        """Addresses of the next `count` samples, each in its source; they stay the next ones."""
        return [SampleId(*row) for row in self._drawing.take(self._cursor, count)[0].addresses_N3.tolist()]

    def next_sources(self, count: int) -> list[int]:
        """Numbers of the sources of the next `count` samples."""
        return self._drawing.take(self._cursor, count)[0].sources_N.tolist()

    def sample_hash(self, count: int) -> str:
        """Short hash of the next `count` samples: their addresses, and the source, shard and row behind each."""
        taken, _ = self._drawing.take(self._cursor, count)
        columns = [taken.addresses_N3, self._drawing.places(taken)]
        if len(self.parts) > 1:
            columns.append(taken.sources_N[:, None])
        content = np.concatenate(columns, axis=1).astype("<i8").tobytes()
        return hashlib.sha256(self.fingerprint.encode() + content).hexdigest()[:16]

    def step(self, data_rank: int, data_size: int, micro_batch_size: int) -> list[Batch]:
        """This data rank's micro-batches of the next global batch; advances by the whole global batch.

        Every rank gets the same number of them, of the same shape; what is missing at the end are rows of weight 0.
        Raises `DataError` where a shard is damaged, and then does not advance.
        """
        ranks = (data_rank, data_size, micro_batch_size)
        if not self._ahead or self._ahead[0][:3] != (self._drawing, self._cursor, ranks):
            self._read_ahead(ranks)
        step = self._ahead.popleft()
        self._advance(step.after, step.num_samples, step.passed_over)
        return step.batches

    def skip(self) -> None:
        """Advances by one global batch and reads no token."""
        taken, after = self._drawing.take(self._cursor, self.batch_size)
        self._advance(after, taken.size, self._passed(self._cursor, taken, after))

    def coming(self) -> list[tuple[TokenDataset, int]]:
        """The remote shards of the windows that the next samples are in, and of those after them, by (data set, shard
        number) in the order of their use."""
        found: list[tuple[TokenDataset, int]] = []
        places = self._cursor.places
        for ahead in (0, 1):
            for source, place in zip(self._drawing.sources, places, strict=True):
                if source.dataset.is_remote:
                    numbers = source.order.shards_ahead(place, ahead).tolist()
                    found += [(source.dataset, number) for number in numbers if number not in source.lost]
        return found

    def clone(self) -> Loader:
        """Another loader at the same place, over the same opened data sets."""
        other = copy.copy(self)
        sources = tuple(source.again(self._lost) for source in self._drawing.sources)
        other._drawing, other._ahead = replace(self._drawing, sources=sources), deque()
        return other

    def _sampler(self, dataset: TokenDataset, seed: int) -> Sampler:
        return make_sampler(dataset, self.sequence_length, seed, self.attention, self.packing, self.objective)

    def _read_ahead(self, ranks: Ranks) -> None:
        """Reads the next step, together with others behind it: twice as many as the last time while all goes well."""
        try:
            self._ahead = self._read(ranks, self._steps_together)
            self._steps_together = min(2 * self._steps_together, MOST_STEPS)
        except DataError:
            if self._steps_together == 1:
                raise
            self._steps_together = 1  # what is wrong with a later step is said when it is due
            self._ahead = self._read(ranks, 1)

    def _read(self, ranks: Ranks, most_steps: int) -> deque[_Step]:
        """Some steps from the next on; no token of a shard but those asked for."""
        _, data_size, micro_batch_size = ranks
        stride, row_tokens = data_size * micro_batch_size, self.sequence_length
        steps = self._next_steps(most_steps, stride, max(1, MOST_TOKENS * data_size // row_tokens))
        samples = Samples.joined([taken for _, taken, _ in steps])
        rows, together = micro_batch_rows(samples.size, *ranks), max(1, MOST_TOKENS // (micro_batch_size * row_tokens))
        batches: list[Batch] = []
        for group in (rows[first : first + together] for first in range(0, len(rows), together)):
            mine = samples.at(np.concatenate(group))
            places_N2 = self._drawing.places(mine)
            batches += make_batches(self._drawing.sources, *mine, places_N2, len(group), micro_batch_size)
        for part in self.parts:
            part.dataset.release()
        left = iter(batches)
        return deque(
            _Step(
                self._drawing,
                cursor,
                ranks,
                list(islice(left, -(-taken.size // stride))),
                after,
                taken.size,
                self._passed(cursor, taken, after),
            )
            for cursor, taken, after in steps
        )

    def _next_steps(self, most_steps: int, stride: int, enough: int) -> list[tuple[Cursor, Samples, Cursor]]:
        """The samples of the next steps with the places before and behind them, until there are `enough`.

        No step follows one that leaves a window, so that no more shards are in use than without reading ahead, nor one
        whose last micro-batch is not full, which is one that `stride` does not divide.
        """
        cursor, count, found = self._cursor, 0, []
        while len(found) < most_steps and count < enough and count % stride == 0:
            taken, after = self._drawing.take(cursor, self.batches.size(self.batches.steps(self._samples + count)))
            found.append((cursor, taken, after))
            if after.windows != self._cursor.windows:
                break
            cursor, count = after, count + taken.size
        return found

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


def micro_batch_rows(num_samples: int, data_rank: int, data_size: int, micro_batch_size: int) -> list[np.ndarray]:
    """Numbers of the samples in each micro-batch of a data rank; the last ones may be short or empty."""
    stride = micro_batch_size * data_size
    firsts = range(data_rank * micro_batch_size, -(-num_samples // stride) * stride, stride)
    return [np.arange(first, max(first, min(first + micro_batch_size, num_samples))) for first in firsts]
