"""Batches for training and evaluation, with a state of a few integers.

The j-th sample of a global batch belongs to data rank (j // micro_batch_size) % data_size, in its micro-batch
j // (micro_batch_size * data_size). Invariant: which samples a step trains on depends on (data set, objective, seed,
sequence length, window_shards, samples before it, samples left out) alone, never on the ranks, the micro-batch size or
restarts; each sample comes exactly once per epoch, but for those that a rollback left out. Every rank holds a
`Loader`; a rank that needs no tokens calls `skip` where the others call `step`. Prefetching is in
`engine.data.prefetch`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from engine.config.ramp import Ramp
from engine.config.schema import ObjectiveConfig
from engine.data import stream
from engine.data.batch import Batch, make_batch
from engine.data.dataset import TokenDataset
from engine.data.sampling import Attention, PackingName, Sampler, make_sampler
from engine.data.stream import START, SampleId, SampleOrder
from engine.errors import DataError

Interval = tuple[int, int]
"""Positions of samples: the first, and the one after the last."""

State = dict[str, Any]
"""Loader state: JSON of well under 1 KiB, equal on all ranks."""


class Loader:
    """The endless stream of global batches over one data set, epoch after epoch."""

    def __init__(
        self,
        dataset: TokenDataset,
        sequence_length: int,
        global_batch_size: int | Ramp,
        seed: int,
        window_shards: int,
        attention: Attention,
        packing: PackingName = "concatenate",
        objective: ObjectiveConfig | None = None,
    ) -> None:
        """Raises `DataError` where the data set holds not one sample, or lacks what the objective needs."""
        self._sampler = make_sampler(dataset, sequence_length, seed, attention, packing, objective)
        self.dataset, self.sequence_length = dataset, sequence_length
        self.attention: Attention = attention
        self.packing: PackingName = packing
        self.objective = objective or ObjectiveConfig()
        self.batches = Ramp((global_batch_size,)) if isinstance(global_batch_size, int) else global_batch_size
        self.seed, self.window_shards = seed, window_shards
        self._order = SampleOrder(dataset.num_shards, self._sampler.count, seed, window_shards)
        refuse_empty(dataset, self._sampler)
        self._sample = self._order.after(START, 0)
        self._position = 0
        self._samples = 0
        self._left_out: tuple[Interval, ...] = ()

    def samples_per_epoch(self) -> int:
        """Samples of each epoch; where packing knows them only from the documents' offsets, reads all of these."""
        return int(self._sampler.count(np.arange(self.dataset.num_shards)).sum())

    @property
    def samples(self) -> int:
        """Samples trained on so far by the whole run."""
        return self._samples

    @property
    def position(self) -> int:
        """Samples drawn so far: those trained on and those left out."""
        return self._position

    @property
    def batch_size(self) -> int:
        """Samples of the next step."""
        return self.batches.size(self.batches.steps(self._samples))

    @property
    def left_out(self) -> tuple[Interval, ...]:
        """The samples that the run leaves out, by position: disjoint, in order."""
        return self._left_out

    def leave_out(self, first: int, end: int) -> None:
        """Passes over the samples at the positions from `first` to before `end`, as far as they are still to come."""
        self._left_out = merged([*self._left_out, (first, end)])

    def state(self) -> State:
        """Where the next sample is, and what must not have changed when this is restored."""
        place = {**self._sample._asdict(), "position": self._position, "samples": self._samples}
        return place | {"left_out": [list(interval) for interval in self._left_out]} | self._identity()

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on at a saved state; O(shards) and one window, whatever the position.

        Raises:
            DataError: the state belongs to other data, another order, or is damaged.
        """
        for key, now in self._identity().items():
            if state.get(key) != now:
                raise DataError(
                    f"the saved loader state has {key} = {state.get(key)!r}, this run has {now!r} "
                    f"(data set {self.dataset.folder})",
                    f"{key} = {state.get(key)!r}, as when the state was saved",
                    "restore it, or start a new run in another folder",
                )
        try:
            sample = SampleId(int(state["epoch"]), int(state["window"]), int(state["slot"]))
            left_out = merged((int(first), int(end)) for first, end in state["left_out"])
            position, samples = int(state["position"]), int(state["samples"])
            self._sample, self._position, self._samples = self._order.check(sample), position, samples
            self._left_out = left_out
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"the saved loader state is damaged: {error}", "the state as saved", "resume from another checkpoint"
            ) from error

    def next_sample_ids(self, count: int) -> list[SampleId]:
        """Addresses of the next `count` samples, which stay the next ones."""
        return [SampleId(*row) for row in self._next(self._order.addresses, count).tolist()]

    def sample_hash(self, count: int) -> str:
        """Short hash of the next `count` samples: their addresses, and the shard and row behind each."""
        addresses = self._next(self._order.addresses, count)
        places = self._next(self._order.places, count)
        content = np.concatenate([addresses, places], axis=1).astype("<i8").tobytes()
        return hashlib.sha256(self.dataset.fingerprint.encode() + content).hexdigest()[:16]

    def step(self, data_rank: int, data_size: int, micro_batch_size: int) -> list[Batch]:
        """This data rank's micro-batches of the next global batch; advances by the whole global batch.

        Every rank gets the same number of them, of the same shape; what is missing at the end are rows of weight 0.
        Raises `DataError` where a shard is damaged, and then does not advance.
        """
        count = self.batch_size
        mine = micro_batch_rows(count, data_rank, data_size, micro_batch_size)
        places = self._next(self._order.places, count)
        addresses = self._next(self._order.addresses, count)
        batches = [self._batch(places[rows], addresses[rows], micro_batch_size) for rows in mine]
        self.skip()
        return batches

    def skip(self) -> None:
        """Advances by one global batch and reads nothing."""
        count = self.batch_size
        *_, (position, taken) = self._stretches(count)
        self._sample = self._order.after(self._sample, position + taken - self._position)
        self._position = position + taken
        self._samples += count

    def clone(self) -> Loader:
        """Another loader at the same place, over the same opened data set."""
        shape = (self.dataset, self.sequence_length, self.batches, self.seed, self.window_shards, self.attention)
        other = Loader(*shape, self.packing, self.objective)
        other._sample = self._sample
        other._position, other._samples, other._left_out = self._position, self._samples, self._left_out
        return other

    def _next(self, of: Callable[[SampleId, int], np.ndarray], count: int) -> np.ndarray:
        """`of(first sample, count)` of the next `count` samples, over all their stretches."""
        after, here = self._order.after, self._position
        return np.concatenate(
            [of(after(self._sample, position - here), taken) for position, taken in self._stretches(count)]
        )

    def _stretches(self, count: int) -> Iterator[tuple[int, int]]:
        """(position, count) of each run of the next `count` samples between those that are left out; one or more."""
        position = self._position
        for first, end in self._left_out:
            if end <= position:
                continue
            taken = min(max(first - position, 0), count)
            if taken:
                yield position, taken
                count -= taken
                if not count:
                    return
            position = end
        yield position, count

    def _batch(self, places: np.ndarray, addresses: np.ndarray, micro_batch_size: int) -> Batch:
        return make_batch(self.dataset, self._sampler, places, addresses, micro_batch_size)

    def _identity(self) -> State:
        objective = json.dumps(self.objective.model_dump(), sort_keys=True)
        return {
            "version": stream.VERSION,
            "fingerprint": self.dataset.fingerprint,
            "sequence_length": self.sequence_length,
            "seed": self.seed,
            "window_shards": self.window_shards,
            "attention": self.attention,
            "packing": self.packing,
            "objective": f"{self.objective.name} {hashlib.sha256(objective.encode()).hexdigest()[:8]}",
        }


def merged(intervals: Iterable[Interval]) -> tuple[Interval, ...]:
    """The same positions as disjoint intervals in order, with a gap between any two."""
    found: list[Interval] = []
    for first, end in sorted(intervals):
        if found and first <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        elif first < end:
            found.append((first, end))
    return tuple(found)


EVALUATION_SEED = 0
"""Held-out samples are masked the same in every run, whatever its seed, so that their losses compare."""


class HeldOut:
    """Held-out samples in file order, each once over all ranks; the address of a sample is (0, shard, row)."""

    def __init__(
        self,
        dataset: TokenDataset,
        sequence_length: int,
        attention: Attention,
        max_samples: int | None = None,
        packing: PackingName = "concatenate",
        objective: ObjectiveConfig | None = None,
    ) -> None:
        """`max_samples` takes the first so many. Raises `DataError` where the data set holds not one sample, or lacks
        what the objective needs."""
        self._dataset = dataset
        self._sampler = make_sampler(dataset, sequence_length, EVALUATION_SEED, attention, packing, objective)
        self._ends = np.cumsum(self._sampler.count(np.arange(dataset.num_shards)))
        refuse_empty(dataset, self._sampler)
        self.num_samples = min(int(self._ends[-1]), max_samples or int(self._ends[-1]))

    def batches(self, data_rank: int, data_size: int, micro_batch_size: int) -> Iterator[Batch]:
        """This data rank's micro-batches. Every rank gets the same number of them, of the same shape; what is missing
        at the end are rows of weight 0. Raises `DataError` where a shard is damaged."""
        for rows in micro_batch_rows(self.num_samples, data_rank, data_size, micro_batch_size):
            shards = np.searchsorted(self._ends, rows, side="right")
            places = np.stack([shards, rows - np.where(shards > 0, self._ends[shards - 1], 0)], axis=1)
            addresses = np.concatenate([np.zeros((len(rows), 1), np.int64), places], axis=1)
            yield make_batch(self._dataset, self._sampler, places, addresses, micro_batch_size)

    def num_batches(self, data_size: int, micro_batch_size: int) -> int:
        """Micro-batches that each data rank gets."""
        return -(-self.num_samples // (micro_batch_size * data_size))


def refuse_empty(dataset: TokenDataset, sampler: Sampler) -> None:
    """Raises `DataError` where no shard has a sample; looks no further than the first that has one."""
    if not any(int(sampler.count(np.array([number]))[0]) for number in range(dataset.num_shards)):
        raise DataError(
            f"the data set {dataset.folder} holds no sample: {dataset.index.num_documents} documents, "
            f"{dataset.index.num_tokens} tokens",
            "at least one document",
            "prepare more text (or a larger --validation-fraction, where this is the held-out part)",
        )


def micro_batch_rows(num_samples: int, data_rank: int, data_size: int, micro_batch_size: int) -> list[np.ndarray]:
    """Numbers of the samples in each micro-batch of a data rank; the last ones may be short or empty."""
    stride = micro_batch_size * data_size
    firsts = range(data_rank * micro_batch_size, -(-num_samples // stride) * stride, stride)
    return [np.arange(first, max(first, min(first + micro_batch_size, num_samples))) for first in firsts]
