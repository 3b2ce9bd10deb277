"""Reading ahead changes nothing but when: same batches, a state of what was consumed, errors where they belong."""

import threading

import pytest
import torch

from engine.data.loader import Loader, StepReader
from engine.data.mixed_order import MixedOrder
from engine.data.prefetch import Prefetcher
from engine.data.shards.dataset import TokenDataset
from engine.data.stream import Stream
from engine.errors import DataError
from tests.engine.data.corpus import made_up_documents, write_shards


def open_stream(folder, seed=0):
    dataset = write_shards(folder, made_up_documents(60), shard_tokens=200)
    return Stream(dataset, 16, 4, seed, window_shards=3, attention="document")


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
    plain = open_stream(tmp_path)
    loader, consumed = Loader(plain), plain.clone()
    with Prefetcher(consumed, 1, 2, 1, depth=3) as ahead:
        for _ in range(40):
            assert consumed.state() == plain.state()
            assert consumed.sample_hash(9) == plain.sample_hash(9)
            assert consumed.next_sample_ids(3) == plain.next_sample_ids(3)
            assert same(ahead.step(), loader.step(1, 2, 1))


def test_the_order_of_a_step_is_computed_once(tmp_path, monkeypatch):
    """By the reading thread; the consumer is told how far each step leads."""
    threads_of_takes, take = [], MixedOrder.take

    def taking(order, cursor, count):
        threads_of_takes.append(threading.current_thread().name)
        return take(order, cursor, count)

    monkeypatch.setattr(MixedOrder, "take", taking)
    with Prefetcher(open_stream(tmp_path), 0, 1, 4) as ahead:
        for _ in range(20):
            ahead.step()
    assert set(threads_of_takes) == {"prefetch"}


def test_restoring_drops_what_was_read_ahead(tmp_path):
    stream = open_stream(tmp_path)
    with Prefetcher(stream, 0, 1, 4) as ahead:
        state = stream.state()
        first = ahead.step()
        ahead.step()
        ahead.restore(state)
        assert same(ahead.step(), first)
        assert len(threads()) == 1


@pytest.mark.parametrize("depth", [1, 4])
def test_no_more_is_read_while_depth_steps_wait(tmp_path, monkeypatch, depth):
    """Steps that were read together wait in the one queue: there is no other."""
    sizes, told = [], threading.Condition()
    real = StepReader.read

    def counting(*arguments):
        steps = real(*arguments)
        with told:
            sizes.append(len(steps))
            told.notify_all()
        return steps

    monkeypatch.setattr(StepReader, "read", counting)
    with Prefetcher(open_stream(tmp_path), 0, 1, 4, depth=depth) as ahead:
        for taken in range(12):
            with told:
                assert told.wait_for(lambda: sum(sizes) - taken >= depth, 30)  # noqa: B023
                # one more would have to follow at once
                assert not told.wait_for(lambda: sum(sizes[:-1]) - taken >= depth, 0.05)  # noqa: B023
            ahead.step()


def test_an_error_is_raised_when_its_batch_is_due_and_again_later(tmp_path):
    good = Loader(open_stream(tmp_path)).step(0, 1, 4)
    healthy = {source.split(":")[0] for batch in good for source in batch.sources}
    for path in tmp_path.glob("*.tokens"):
        if path.name not in healthy:
            path.unlink()
    fresh = Stream(TokenDataset(tmp_path), 16, 4, 0, 3, "document")
    with Prefetcher(fresh, 0, 1, 4) as ahead:
        taken = list(steps_until_an_error(ahead))
        assert same(taken[0], good)
        with pytest.raises(DataError, match="is missing"):
            ahead.step()
        assert fresh.samples == 4 * len(taken)


def test_the_thread_ends_with_close_also_when_nobody_consumes(tmp_path):
    ahead = Prefetcher(open_stream(tmp_path), 0, 1, 4)
    assert len(threads()) == 1
    ahead.close()
    ahead.close()
    assert not threads()
    with pytest.raises(AssertionError, match="closed"):
        ahead.step()


def test_the_reading_thread_cuts_what_the_rank_needs_and_knows_the_step(tmp_path):
    plain, called = open_stream(tmp_path), []

    def cut(batch, step):
        called.append((step, threading.current_thread().name))
        return {"tokens_BT": batch.inputs["tokens_BT"][:, :5]}

    plain.skip()
    loader = Loader(plain)
    with Prefetcher(plain.clone(), 0, 1, 2, cut=cut) as ahead:
        for _ in range(3):
            expected = [batch.inputs["tokens_BT"][:, :5] for batch in loader.step(0, 1, 2)]
            for batch, tokens in zip(ahead.step(), expected, strict=True):
                assert set(batch.inputs) == {"tokens_BT"}
                assert batch.inputs["tokens_BT"].equal(tokens)
    assert called[:6] == [(step, "prefetch") for step in (1, 1, 2, 2, 3, 3)]
