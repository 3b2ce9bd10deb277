"""What a rank is given of the data, on its device: a GPU is played, for which order and threads are the point."""

from pathlib import Path

import pytest
import torch

from engine.config.load import parse_run
from engine.config.resolve import Layout
from engine.data.batch import Batch
from engine.data.loader import MOST_STEPS, Loader
from engine.data.prefetch import DEPTH
from engine.data.shards.dataset import TokenDataset
from engine.data.source import WeightedDataset
from engine.data.stage import stage_stream
from engine.train.build import stage_spec
from engine.train.feed import Feed
from tests.distributed.runs import LENGTH, run_tree
from tests.engine.checkpoint.worlds import fake_groups
from tests.engine.data.corpus import made_up_documents, write_shards
from tests.engine.data.played_gpu import GPU, PlayedGpu

STEPS = 7
TIME = ("tokens_BT", "targets_BT", "weights_BT")


def make_feed(folder: Path, layout: Layout, global_rank: int, device: torch.device) -> tuple[Feed, Loader]:
    """One rank's feed, and a loader of its own for what it has to give."""
    dataset = write_shards(folder / "tokens", made_up_documents(200), shard_tokens=1000)
    parallel = {"micro_batch_size": 2, "sequence": layout.sequence}
    tree = run_tree(folder, folder / "run", model={"num_layers": 4}, parallel=parallel)
    tree["stages"][0]["data"]["attention"] = "document"
    config = parse_run(tree, "test")
    [stage] = config.stages
    groups = fake_groups(layout, global_rank)
    feed = Feed([WeightedDataset(dataset)], None, config, 0, groups, device, stage_spec(config, stage, groups))
    return feed, Loader(stage_stream(stage, [WeightedDataset(dataset)], config.seed))


def stretch(batch: Batch, position: int, size: int) -> dict[str, torch.Tensor]:
    own = slice(position * LENGTH // size, (position + 1) * LENGTH // size)
    return {name: tensor[:, own] if name in TIME else tensor for name, tensor in batch.inputs.items()}


@pytest.mark.parametrize(("sequence", "global_rank"), [(1, 0), (2, 0), (2, 1)])
def test_inputs_come_through_page_locked_memory_and_nobody_reads_or_writes_too_early(
    tmp_path, monkeypatch, sequence, global_rank
):
    """`PlayedGpu` asserts every wait: of the reading thread before it writes a block again, of the computing stream
    before it reads what is copied; and that the memory is not given away while the computing stream needs it."""
    gpu = PlayedGpu(monkeypatch)
    feed, plain = make_feed(tmp_path, Layout(1, 1, sequence, 1), global_rank, GPU)
    feed.start()
    try:
        for _ in range(STEPS):
            inputs, _ = feed.step()
            expected = plain.step(0, 1, 2)
            for given, batch in zip(inputs, expected, strict=True):
                gpu.use(given)
                assert set(given) == feed.inputs & set(batch.inputs)
                own = stretch(batch, global_rank, sequence)
                assert all(tensor.equal(own[name]) for name, tensor in given.items())
    finally:
        feed.close()
    assert gpu.log[0] == ("set_device cuda:3", "prefetch")
    assert {thread for _, thread in gpu.log} == {"prefetch"}, (
        "the thread that trains copies nothing and waits for nothing"
    )
    assert set(gpu.locked_writes) == {torch.Size((2, LENGTH)), torch.Size((2, LENGTH // sequence))}, "rows' parts alone"
    copies = [what for what, _ in gpu.log].count("copy")
    assert STEPS <= copies <= STEPS + DEPTH - 1 + MOST_STEPS, "one of each step, and of those that wait"


def test_a_cpu_is_given_what_was_read(tmp_path):
    feed, plain = make_feed(tmp_path, Layout(1, 1, 2, 1), 1, torch.device("cpu"))
    feed.start()
    [given, *_], weights = feed.step()
    [batch, *rest] = plain.step(0, 1, 2)
    feed.close()
    assert all(given[name].equal(tensor) for name, tensor in stretch(batch, 1, 2).items())
    assert weights == [sum(each.weights["causal"] for each in (batch, *rest))], "of whole rows"


def test_only_ranks_that_need_tokens_read_them_and_the_others_count_steps(tmp_path, monkeypatch):
    layout, read = Layout(4, 1, 1, 1), []
    shard = TokenDataset.shard
    monkeypatch.setattr(TokenDataset, "shard", lambda dataset, number: read.append(number) or shard(dataset, number))
    states, needed = [], []
    for global_rank in range(layout.world_size):
        feed, _ = make_feed(tmp_path, layout, global_rank, torch.device("cpu"))
        read.clear()
        feed.start()
        for _ in range(3):
            inputs, weights = feed.step()
        feed.close()
        needed.append((feed.reads, bool(read), *({*given} for given in inputs[:1]), sum(weights) > 0))
        assert len(inputs) == 4, "micro-batches, with something in them or not"
        states.append(feed.stream.state())
    assert needed == [
        (True, True, {"tokens_BT", "segments_BT"}, True),
        (False, False, set(), False),
        (False, False, set(), False),
        (True, True, {"targets_BT", "weights_BT"}, True),
    ]
    assert all(state == states[0] for state in states)
    assert states[0]["samples"] == 24


def test_what_a_step_waited_for_data_is_known(tmp_path, monkeypatch):
    feed, _ = make_feed(tmp_path, Layout(1, 1, 1, 1), 0, torch.device("cpu"))
    feed.start()
    moments = iter([10.0, 12.5])
    monkeypatch.setattr("engine.train.feed.time.perf_counter", lambda: next(moments))
    feed.step()
    monkeypatch.undo()
    feed.close()
    assert feed.wait_seconds == 2.5
