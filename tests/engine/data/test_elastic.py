"""The samples of a run are those of one uninterrupted process, whatever world goes on after each kill.

Worlds of 8, 6, 1 and 4 data ranks take turns; each reads ahead and is killed there, and the next begins in fresh
objects from the last state as JSON. In the third world samples are left out, as after a rollback; batches grow on the
way. Every case goes through two epochs and more.
"""

import json
from collections import Counter
from typing import Any

import pytest

from engine.config.batch_ramp import Ramp
from engine.config.schema.objective import ObjectiveConfig
from engine.data.loader import Loader
from engine.data.order.sample_order import SampleOrder
from engine.data.shards.dataset import TokenDataset
from engine.data.source import WeightedDataset
from engine.data.stream import Stream
from engine.errors import DataError
from tests.engine.data.corpus import write_sentences
from tests.engine.data.rank import Ranks

WORLDS = ((8, 3), (6, 2), (1, 24), (4, 1))
"""(data ranks, micro-batch size), in turn."""
RAMP = Ramp((24, 48), (0, 4))
HOLE = (310, 355)
CASES = {
    "causal": ({"name": "causal"}, "concatenate"),
    "causal, best fit": ({"name": "causal"}, "best_fit"),
    "fill in the middle": ({"name": "fill_in_the_middle"}, "concatenate"),
    "fill in the middle, best fit": ({"name": "fill_in_the_middle"}, "best_fit"),
    "masked words": ({"name": "masked", "mask_unit": "word"}, "concatenate"),
    "masked, best fit": ({"name": "masked"}, "best_fit"),
    "next sentence": ({"name": "masked", "pairs": "next_sentence"}, "concatenate"),
    "sentence order": ({"name": "masked", "pairs": "sentence_order"}, "concatenate"),
    "span corruption": ({"name": "span_corruption"}, "concatenate"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("elastic")
    for number, count in enumerate((60, 20, 35)):
        write_sentences(folder / str(number), count, seed=number, shard_tokens=300)
    return folder


def fresh(folders, case: str, mixed: bool) -> Loader:
    """A loader as a new process makes it."""
    objective, packing = CASES[case]
    sets = [TokenDataset(folders / str(number)) for number in range(3)]
    parts = [WeightedDataset(item, name, weight) for item, name, weight in zip(sets, "abc", (3, 1, 2), strict=True)]
    how: dict[str, Any] = {"packing": packing, "objective": ObjectiveConfig.model_validate(objective)}
    return Loader(Stream(parts if mixed else sets[0], 32, RAMP, 1, 3, "document", **how))


def rows_of(ranks: list[Loader], micro_batch_size: int) -> Counter[tuple[Any, ...]]:
    """A step of all ranks: source and address of each sample, and all inputs of its row."""
    rows: Counter[tuple[Any, ...]] = Counter()
    for data_rank, rank in enumerate(ranks):
        for batch in rank.step(data_rank, len(ranks), micro_batch_size):
            for b in range(batch.num_rows):
                content = b"".join(batch.inputs[name][b].numpy().tobytes() for name in sorted(batch.inputs))
                address = tuple(batch.samples_B3[b].tolist())
                rows[int(batch.domains_B[b]), address, batch.sources[b], content] += 1
    return rows


@pytest.mark.parametrize(
    ("case", "mixed"), [*((case, False) for case in CASES), ("causal", True), ("masked, best fit", True)]
)
def test_worlds_of_8_6_1_and_4_consume_what_one_process_does(folders, case, mixed):
    alone = fresh(folders, case, mixed)
    epoch = alone.stream.samples_per_epoch()
    state = json.loads(json.dumps(alone.stream.state()))
    seen: list[tuple[Any, ...]] = []
    num_steps, turn = 0, 0
    while alone.stream.position < 2 * epoch + 60:
        data_size, micro_batch_size = WORLDS[turn % 4]
        ranks = [fresh(folders, case, mixed) for _ in range(data_size)]
        for rank in ranks:
            rank.stream.restore(state)
        if turn == 2:
            for reader in (alone, *ranks):
                reader.stream.leave_out(*HOLE)
        for _ in range(1 + turn % 2):
            expected = rows_of([alone], 24)
            assert rows_of(ranks, micro_batch_size) == expected, (num_steps, data_size)
            seen += [row[:2] for row in expected]
            num_steps += 1
        states = [json.dumps(rank.stream.state()) for rank in ranks]
        assert set(states) == {json.dumps(alone.stream.state())}
        assert len(states[0]) < 1024
        state = json.loads(states[0])
        rows_of(ranks, micro_batch_size)  # read ahead, and lost with the kill
        turn += 1
    assert set(Counter(seen).values()) == {1}
    if not mixed:
        order = fresh(folders, case, mixed).stream.next_sample_ids(2 * epoch)
        first = {address for _, address in seen if address[0] == 0}
        left_out = set(order[slice(*HOLE)])
        assert first == {tuple(sample) for sample in order[:epoch]} - {tuple(sample) for sample in left_out}


def test_processes_of_8_6_1_and_4_ranks_that_are_killed_consume_what_one_does(folders):
    """Each world is a process, killed in the middle of a step; the next one knows what the last whole step said."""
    how: dict[str, Any] = {"sequence_length": 32, "global_batch_size": 24, "seed": 1, "window_shards": 3}
    how["attention"] = "document"
    alone = Loader(Stream(TokenDataset(folders / "0"), **how))
    epoch, state, seen = alone.stream.samples_per_epoch(), None, Counter()
    for world_size in (8, 6, 1, 4):
        ranks = Ranks(str(folders / "0"), list(range(world_size)), world_size, state, **how)
        for _ in range(-(-epoch // (4 * 24))):
            ranks.go()
            told = ranks.told()
            [expected] = alone.step(0, 1, 24)
            assert sorted(told["samples"]) == sorted(map(tuple, expected.samples_B3.tolist()))
            state = told["state"]
            assert state == alone.stream.state()
            seen.update(told["samples"])
        ranks.go()
        ranks.kill()
    assert set(seen.values()) == {1}
    assert sum(address[0] == 0 for address in seen) == epoch, "each exactly once"


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_resuming_costs_the_same_at_any_step(folders, packing, monkeypatch):
    """Work is counted: shards whose rows are looked up, windows laid out, shards opened, samples permuted."""
    work: Counter[str] = Counter()

    def counted(owner, name):
        real = getattr(owner, name)

        def call(self, *arguments):
            work[name] += 1
            return real(self, *arguments)

        monkeypatch.setattr(owner, name, call)

    for owner, name in ((SampleOrder, "_window"), (SampleOrder, "_epoch"), (TokenDataset, "shard")):
        counted(owner, name)

    def resume(state) -> Counter[str]:
        reader = Loader(Stream(TokenDataset(folders / "0"), 32, 24, 1, 3, "document", packing))
        reader.stream.restore(state)
        work.clear()
        reader.stream.restore(state)
        reader.stream.sample_hash(24)
        return Counter(work)

    near = Loader(Stream(TokenDataset(folders / "0"), 32, 24, 1, 3, "document", packing))
    near.stream.skip()
    state = near.stream.state()
    far = state | {
        "position": 10**12,
        "samples": 10**12,
        "addresses": [[10**10, *near.stream.next_sample_ids(1)[0][1:]]],
    }
    costs = [resume(state), resume(far)]
    assert costs[0]["shard"] == costs[1]["shard"] == 0
    assert max(costs[0].values()) < 12
    # windows differ in size from epoch to epoch, so one more may be begun; nothing grows with the position
    assert all(costs[1][name] <= costs[0][name] + 4 for name in costs[0])


def test_a_mixture_whose_data_has_changed_is_refused_and_the_folder_is_named(folders, tmp_path):
    sets = [TokenDataset(folders / "0"), TokenDataset(folders / "1")]
    parts = [WeightedDataset(item, name) for item, name in zip(sets, "ab", strict=True)]
    state = Stream(parts, 32, 24, 1, 3, "document").state()
    other = write_sentences(tmp_path, 21, seed=1)
    changed = Loader(Stream([parts[0], WeightedDataset(other, "b")], 32, 24, 1, 3, "document"))
    with pytest.raises(DataError, match="fingerprint") as caught:
        changed.stream.restore(state)
    assert f"(data set {tmp_path})" in str(caught.value)
    longer = Loader(Stream([parts[0], WeightedDataset(sets[1], "b", epochs=2)], 32, 24, 1, 3, "document"))
    with pytest.raises(DataError, match="mixture = "):
        longer.stream.restore(state)


def test_the_largest_state_is_less_than_a_kibibyte(folders):
    dataset = TokenDataset(folders / "0")
    parts = [WeightedDataset(dataset, f"source {number}", number + 1) for number in range(16)]
    reader = Loader(Stream(parts, 32, 4096, 2**63, 128, "document", "best_fit", ObjectiveConfig(name="masked")))
    state = reader.stream.state() | {"position": 10**11, "samples": 10**11, "addresses": [[9, 10**3, 10**6]] * 16}
    state |= {"left_out": [[10**10, 10**10]] * 8, "lost": [[15, 10**4, 1]] * 8}
    assert len(json.dumps(state, separators=(",", ":"))) < 1024
