"""A source may have another order than `SampleOrder`: everything that a stream does asks the `Order` protocol alone."""

import itertools
import json
from collections.abc import Callable

import numpy as np
import pytest

from engine.data.loader import Loader
from engine.data.order.sample_order import CountRows, Order, SampleId
from engine.data.prefetch import Prefetcher
from engine.data.shards.damage import Damage
from engine.data.shards.dataset import TokenDataset
from engine.data.source import WeightedDataset
from engine.data.stream import Stream
from tests.engine.data.corpus import made_up_documents, write_shards

LENGTH, BATCH = 16, 6


class LastFirst(Order):
    """The rows of the last shard, then those of the one before; a window is a shard, and its last row is slot 0."""

    def __init__(self, num_shards: int, count_rows: CountRows) -> None:
        self.rows = count_rows(np.arange(num_shards)[::-1])  # by window
        self.firsts = np.cumsum(self.rows) - self.rows

    def after(self, sample: SampleId, count: int) -> SampleId:
        at = sample.epoch * self.rows.sum() + self.firsts[sample.window] + sample.slot + count
        epoch, at = divmod(int(at), int(self.rows.sum()))
        window = int(np.searchsorted(self.firsts, at, side="right")) - 1
        return SampleId(epoch, window, at - int(self.firsts[window]))

    def left(self, sample: SampleId) -> int:
        return int(self.rows[sample.window]) - sample.slot

    def check(self, sample: SampleId) -> SampleId:
        if not (0 <= sample.window < self.rows.size and 0 <= sample.slot < self.rows[sample.window]):
            raise ValueError(f"{sample}")
        return sample

    def addresses(self, sample: SampleId, count: int) -> np.ndarray:
        return np.array([self.after(sample, number) for number in range(count)], np.int64).reshape(-1, 3)

    def shard_rows_at(self, addresses: np.ndarray) -> np.ndarray:
        windows, slots = addresses[:, 1], addresses[:, 2]
        return np.stack([self.rows.size - 1 - windows, self.rows[windows] - 1 - slots], axis=1)

    def shards(self, epoch: int, window: int) -> np.ndarray:
        return np.array([self.rows.size - 1 - window])

    def shards_ahead(self, sample: SampleId, windows: int) -> np.ndarray:
        return self.shards(0, (sample.window + windows) % self.rows.size)


class OtherStream(Stream):
    """Reads every source but "b" in the toy's order."""

    def _make_order(self, part: WeightedDataset, seed: int) -> Callable[[CountRows], Order]:
        if part.name == "b":
            return super()._make_order(part, seed)
        return lambda count_rows: LastFirst(part.dataset.num_shards, count_rows)


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> list[TokenDataset]:
    folder = tmp_path_factory.mktemp("orders")
    return [
        write_shards(folder / str(number), made_up_documents(40, seed=number), shard_tokens=200) for number in range(2)
    ]


def opened(sets: list[TokenDataset], kind: type[Stream] = OtherStream) -> Stream:
    parts = [WeightedDataset(dataset, name, weight) for dataset, name, weight in zip(sets, "ab", (2, 1), strict=False)]
    return kind(parts if len(parts) > 1 else sets[0], LENGTH, BATCH, 3, 2, "document")


def rows_of(stream: Stream, steps: int) -> list[tuple[int, str]]:
    loader = Loader(stream)
    batches = [batch for _ in range(steps) for batch in loader.step(0, 1, BATCH)]
    return [item for batch in batches for item in zip(batch.domains_B.tolist(), batch.sources, strict=True)]


def names_last_first(dataset: TokenDataset, without: int = -1) -> list[str]:
    """Shard and row of an epoch's samples, counted from the tokens of the shards: a row for every `LENGTH` targets."""
    names = []
    for number in reversed(range(dataset.num_shards)):
        tokens = dataset.index.shards[number].tokens
        rows = -(-(tokens.length - 1) // LENGTH)
        names += [f"{tokens.name}:{row}" for row in reversed(range(rows))] if number != without else []
    return names


def test_a_stream_takes_samples_in_the_order_that_a_source_is_given(sets):
    stream = opened(sets[:1])
    expected = itertools.cycle(names_last_first(sets[0]))
    epoch = stream.samples_per_epoch()
    assert [name for _, name in rows_of(stream, epoch // 2)] == [next(expected) for _ in range(epoch // 2 * BATCH)]


def test_resume_reading_ahead_rollback_and_lost_shards_keep_that_order(sets):
    stream = opened(sets[:1])
    names = names_last_first(sets[0])
    rows_of(stream, 2)
    resumed = opened(sets[:1])
    resumed.restore(json.loads(json.dumps(stream.state())))
    resumed.leave_out(2 * BATCH, 2 * BATCH + 4)
    with Prefetcher(resumed, 0, 1, BATCH) as ahead:
        found = [name for _ in range(3) for batch in ahead.step() for name in batch.sources]
    assert found == names[2 * BATCH + 4 :][: 3 * BATCH]
    lost = 0
    resumed.lose(Damage(0, lost, counted=True))
    begun = 5 * BATCH + 4
    kept = set(names_last_first(sets[0], without=lost))
    expected = [name for name in names[begun:] + names if name in kept]
    steps = len(names) // BATCH
    assert [name for _, name in rows_of(resumed, steps)] == expected[: steps * BATCH]


def test_in_a_mixture_one_source_has_another_order_and_the_other_keeps_its_own(sets):
    mixed, plain = rows_of(opened(sets), 30), rows_of(opened(sets, Stream), 30)
    assert [source for source, _ in mixed] == [source for source, _ in plain]
    assert [name for source, name in mixed if source == 1] == [name for source, name in plain if source == 1]
    expected = itertools.cycle(names_last_first(sets[0]))
    assert all(name == next(expected) for source, name in mixed if source == 0)
