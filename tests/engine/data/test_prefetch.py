"""Reading ahead changes nothing but when: same batches, a state of what was consumed, errors where they belong."""

import threading

import pytest
import torch

from engine.data.loader import Loader
from engine.data.prefetch import Prefetcher
from engine.data.shards.dataset import TokenDataset
from engine.errors import DataError
from tests.engine.data.corpus import made_up_documents, write_shards


def loader(folder, seed=0):
    dataset = write_shards(folder, made_up_documents(60), shard_tokens=200)
    return Loader(dataset, 16, 4, seed, window_shards=3, attention="document")


def same(left, right):
    return all(torch.equal(a.inputs["tokens_BT"], b.inputs["tokens_BT"]) for a, b in zip(left, right, strict=True))


def steps_until_an_error(ahead):
    while True:
        try:
            yield ahead.step()
        except DataError:
            return


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_batches_states_and_hashes_are_those_of_the_loader(tmp_path):
    plain = loader(tmp_path)
    with Prefetcher(plain.clone(), 1, 2, 1, depth=3) as ahead:
        for _ in range(40):
            assert ahead.state() == plain.state()
            assert ahead.sample_hash(9) == plain.sample_hash(9)
            assert ahead.next_sample_ids(3) == plain.next_sample_ids(3)
            assert same(ahead.step(), plain.step(1, 2, 1))


def test_restoring_drops_what_was_read_ahead(tmp_path):
    plain = loader(tmp_path)
    with Prefetcher(plain.clone(), 0, 1, 4) as ahead:
        state = plain.state()
        first = ahead.step()
        ahead.step()
        ahead.restore(state)
        assert same(ahead.step(), first)
        assert len(threads()) == 1


def test_at_most_depth_steps_lie_ready(tmp_path):
    plain = loader(tmp_path)
    count = threading.Semaphore(0)
    real = Loader.step

    class Counting(Loader):
        def clone(self):
            return self

        def step(self, *arguments):
            count.release()
            return real(self, *arguments)

        def skip(self):
            pass

    counting = Counting(plain.parts, 16, 4, 0, 3, "document")
    with Prefetcher(counting, 0, 1, 4, depth=2):
        assert count.acquire(timeout=30)
        assert count.acquire(timeout=30)
        # the thread now waits for room: a third step would have to follow at once
        assert not count.acquire(timeout=0.2)


def test_an_error_is_raised_when_its_batch_is_due_and_again_later(tmp_path):
    plain = loader(tmp_path)
    good = plain.clone().step(0, 1, 4)
    healthy = {source.split(":")[0] for batch in good for source in batch.sources}
    for path in tmp_path.glob("*.tokens"):
        if path.name not in healthy:
            path.unlink()
    fresh = Loader(TokenDataset(tmp_path), 16, 4, 0, 3, "document")
    with Prefetcher(fresh, 0, 1, 4) as ahead:
        taken = list(steps_until_an_error(ahead))
        assert same(taken[0], good)
        with pytest.raises(DataError, match="is missing"):
            ahead.step()
        assert ahead.state()["samples"] == 4 * len(taken)


def test_the_thread_ends_with_close_also_when_nobody_consumes(tmp_path):
    ahead = Prefetcher(loader(tmp_path), 0, 1, 4)
    assert len(threads()) == 1
    ahead.close()
    ahead.close()
    assert not threads()
    with pytest.raises(AssertionError, match="closed"):
        ahead.step()


def test_the_reading_thread_cuts_what_the_rank_needs_and_knows_the_step(tmp_path):
    plain, called = loader(tmp_path), []

    def cut(batch, step):
        called.append((step, threading.current_thread().name))
        return {"tokens_BT": batch.inputs["tokens_BT"][:, :5]}

    plain.skip()
    with Prefetcher(plain.clone(), 0, 1, 2, cut=cut) as ahead:
        for _ in range(3):
            expected = [batch.inputs["tokens_BT"][:, :5] for batch in plain.step(0, 1, 2)]
            for batch, tokens in zip(ahead.step(), expected, strict=True):
                assert set(batch.inputs) == {"tokens_BT"}
                assert batch.inputs["tokens_BT"].equal(tokens)
    assert called[:6] == [(step, "prefetch") for step in (1, 1, 2, 2, 3, 3)]
