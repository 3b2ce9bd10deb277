"""Which samples a step holds depends on nothing but the run: not on ranks, micro-batches, restarts or skipping."""

import json
import re
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from engine.config.batch_ramp import Ramp
from engine.config.schema.objective import ObjectiveConfig
from engine.data import loader as loader_module
from engine.data.loader import Loader
from engine.data.order.sample_order import SampleId
from engine.data.shards.damage import Damage
from engine.data.shards.dataset import TokenDataset
from engine.data.stream import Stream
from engine.data.validation import ValidationSamples
from engine.errors import DataError
from tests.engine.data.corpus import EOS, made_up_documents, write_sentences, write_shards

LENGTH = 16


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> TokenDataset:
    return write_shards(tmp_path_factory.mktemp("data"), made_up_documents(90), shard_tokens=300)


def loader(dataset, **changes) -> Loader:
    defaults = {"sequence_length": LENGTH, "global_batch_size": 12, "seed": 3, "window_shards": 4}
    arguments: dict[str, Any] = {**defaults, "attention": "document", **changes}
    return Loader(Stream(dataset, **arguments))


def rows_of(batches):
    """Every row of some batches as comparable values, in order."""
    for batch in batches:
        for b in range(batch.num_rows):
            yield tuple(batch.samples_B3[b].tolist()), batch.sources[b], tuple(batch.inputs["tokens_BT"][b].tolist())


@pytest.mark.parametrize(("data_size", "micro_batch_size"), [(1, 1), (1, 4), (2, 1), (2, 3), (3, 2), (4, 3), (12, 1)])
def test_a_step_holds_the_same_samples_in_every_layout(dataset, data_size, micro_batch_size):
    alone = loader(dataset)
    ranks = [loader(dataset) for _ in range(data_size)]
    for _ in range(5):
        whole = list(rows_of(alone.step(0, 1, 12)))
        parts = [rank.step(data_rank, data_size, micro_batch_size) for data_rank, rank in enumerate(ranks)]
        assert {len(part) for part in parts} == {12 // (data_size * micro_batch_size)}
        # micro-batch after micro-batch, rank after rank, is the order of the global batch
        merged = [row for micro in zip(*parts, strict=True) for batch in micro for row in rows_of([batch])]
        assert merged == whole
    assert all(rank.stream.state() == alone.stream.state() for rank in ranks)


def test_each_sample_comes_once_per_epoch_and_epochs_follow_one_another(dataset):
    reader = loader(dataset, global_batch_size=7)
    epoch = reader.stream.samples_per_epoch()
    seen = [source for _ in range(3 * epoch // 7 + 1) for batch in reader.step(0, 1, 7) for source in batch.sources]
    assert set(Counter(seen[:epoch]).values()) == {1}
    assert sorted(seen[:epoch]) == sorted(seen[epoch : 2 * epoch])
    assert seen[:epoch] != seen[epoch : 2 * epoch]


def test_a_row_is_what_the_shard_says(dataset):
    [batch] = loader(dataset).step(0, 1, 12)
    for b, source in enumerate(batch.sources):
        name, row = source.split(":")
        tokens = np.fromfile(dataset.folder / name, "<u2").astype(np.int64)  # by hand, without our reader
        stretch = tokens[int(row) * LENGTH : int(row) * LENGTH + LENGTH + 1]
        inputs = stretch.size - 1
        assert batch.inputs["tokens_BT"][b, :inputs].tolist() == stretch[:-1].tolist()
        assert batch.inputs["targets_BT"][b, :inputs].tolist() == stretch[1:].tolist()
        assert batch.inputs["weights_BT"][b, :inputs].tolist() == (stretch[:-1] != EOS).astype(float).tolist()
        assert not batch.inputs["weights_BT"][b, inputs:].any()
        assert int(batch.document_lengths[b].sum()) == LENGTH
    assert batch.weights == {"causal": batch.inputs["weights_BT"].sum()}


def test_types_and_shapes_of_a_batch(dataset):
    [batch] = loader(dataset).step(0, 1, 12)
    assert batch.inputs["segments_BT"] is not None
    types = [
        (batch.inputs["tokens_BT"], (12, LENGTH), torch.int64),
        (batch.inputs["targets_BT"], (12, LENGTH), torch.int64),
        (batch.inputs["weights_BT"], (12, LENGTH), torch.float32),
        (batch.inputs["segments_BT"], (12, LENGTH), torch.int32),
        (batch.samples_B3, (12, 3), torch.int64),
        (batch.row_weights_B, (12,), torch.float32),
        (batch.domains_B, (12,), torch.int32),
    ]
    assert all((tuple(tensor.shape), tensor.dtype) == (shape, dtype) for tensor, shape, dtype in types)
    assert "segments_BT" not in loader(dataset, attention="row").step(0, 1, 12)[0].inputs


@pytest.mark.parametrize("steps", [0, 1, 9, 40])
def test_a_restored_loader_goes_on_where_the_other_was(dataset, steps):
    first = loader(dataset)
    for _ in range(steps):
        first.stream.skip()
    state = json.loads(json.dumps(first.stream.state()))
    assert len(json.dumps(state)) < 1024
    second = loader(dataset)
    second.stream.restore(state)
    assert second.stream.samples == 12 * steps
    assert second.stream.next_sample_ids(30) == first.stream.next_sample_ids(30)
    assert second.stream.sample_hash(100) == first.stream.sample_hash(100)
    for _ in range(3):
        assert list(rows_of(second.step(0, 1, 12))) == list(rows_of(first.step(0, 1, 12)))


def test_skipping_equals_stepping_and_looking_ahead_changes_nothing(dataset):
    stepping, skipping = loader(dataset), loader(dataset)
    ahead = stepping.stream.next_sample_ids(24)
    proof = stepping.stream.sample_hash(24)
    taken = []
    for _ in range(2):
        taken += [sample for sample, _, _ in rows_of(stepping.step(0, 1, 12))]
        skipping.stream.skip()
    assert taken == ahead
    assert stepping.stream.state() == skipping.stream.state()
    assert stepping.stream.sample_hash(24) != proof


def test_the_hash_of_the_next_samples_follows_the_order_not_the_addresses_alone(dataset):
    one, other = loader(dataset), loader(dataset, seed=4)
    # of the first shard window only sizes differ between seeds; the first address is (0, 0, 0) for both
    assert one.stream.next_sample_ids(1) == other.stream.next_sample_ids(1)
    assert one.stream.sample_hash(1) != other.stream.sample_hash(1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_length": 8}, "sequence_length = 16, this run has 8"),
        ({"seed": 4}, "seed = 3, this run has 4"),
        ({"window_shards": 5}, "window_shards = 4, this run has 5"),
        ({"attention": "row"}, "attention = 'document', this run has 'row'"),
        ({"packing": "best_fit"}, "packing = 'concatenate', this run has 'best_fit'"),
    ],
)
def test_a_state_of_another_order_is_refused_and_both_are_named(dataset, changes, message):
    with pytest.raises(DataError, match=message) as caught:
        loader(dataset, **changes).stream.restore(loader(dataset).stream.state())
    assert "to do: restore it, or start a new run" in str(caught.value)


def test_a_state_of_other_data_is_refused_and_both_are_named(dataset, tmp_path):
    other = write_shards(tmp_path, made_up_documents(91), shard_tokens=300)
    both = f"fingerprint = '{dataset.fingerprint}', this run has '{other.fingerprint}'"
    with pytest.raises(DataError, match=re.escape(both)):
        loader(other).stream.restore(loader(dataset).stream.state())


@pytest.mark.parametrize(
    "damage",
    [
        {"addresses": [[0, 0, 10**9]]},
        {"addresses": [[0, "x", 0]]},
        {"addresses": [[None, 0, 0]]},
        {"addresses": [[0, 0, 0]] * 2},
        {"addresses": [[0, 0]]},
        {"lost": [[0, 1]]},
        {"samples": None},
        {"position": None},
    ],
)
def test_a_damaged_state_is_refused_and_changes_nothing(dataset, damage):
    reader = loader(dataset)
    reader.stream.skip()
    before = reader.stream.state()
    with pytest.raises(DataError, match="the saved loader state is damaged"):
        reader.stream.restore(loader(dataset).stream.state() | damage)
    assert reader.stream.state() == before


def test_a_ramp_moves_no_sample(dataset):
    """Steps of 3, 3, 6, 6, ... and steps of 12 read the same stream; restored inside the ramp it goes on the same."""
    ramp = Ramp((3, 6), (0, 2))
    ramped, plain = loader(dataset, global_batch_size=ramp), loader(dataset)
    sizes, taken = [], []
    for _ in range(7):
        again = loader(dataset, global_batch_size=ramp)
        again.stream.restore(json.loads(json.dumps(ramped.stream.state())))
        rows = list(rows_of(ramped.step(0, 1, 3)))
        assert list(rows_of(again.step(0, 1, 3))) == rows
        sizes.append(len(rows))
        taken += rows
    assert sizes == [3, 3, 6, 6, 6, 6, 6]
    assert taken == [row for _ in range(3) for row in rows_of(plain.step(0, 1, 12))]


def test_samples_left_out_are_passed_over_and_nothing_else_moves(dataset):
    """Intervals against a plain list: inside a step, over several steps, behind, adjoining, over the epoch's end."""
    plain = loader(dataset, global_batch_size=1)
    epoch = plain.stream.samples_per_epoch()
    order = plain.stream.next_sample_ids(2 * epoch)
    holes = [(2, 5), (14, 40), (40, 41), (70, 71), (epoch - 3, epoch + 4)]
    reader = loader(dataset)
    reader.step(0, 1, 12)
    for hole in reversed(holes):
        reader.stream.leave_out(*hole)
    assert reader.stream.left_out == ((2, 5), (14, 41), *holes[3:])
    left = [sample for n, sample in enumerate(order) if n >= 12 and not any(a <= n < b for a, b in holes)]
    assert reader.stream.next_sample_ids(60) == left[:60]
    taken, skipping = [], reader.stream.clone()
    for _ in range(epoch // 12):
        restored = loader(dataset)
        restored.stream.restore(json.loads(json.dumps(reader.stream.state())))
        assert restored.stream.sample_hash(50) == reader.stream.sample_hash(50)
        taken += [SampleId(*sample) for sample, _, _ in rows_of(reader.step(0, 1, 12))]
        skipping.skip()
        assert reader.stream.state() == skipping.state()
    assert taken == left[: len(taken)]
    assert reader.stream.samples == 12 + len(taken)
    assert order[reader.stream.position] == left[len(taken)]
    assert len(json.dumps(reader.stream.state())) < 1024


def change(reader: Loader, step: int) -> None:
    """Something that a run may do between two of its steps."""
    state = reader.stream.state()
    if step % 5 == 2:
        reader.stream.leave_out(reader.stream.position + 7, reader.stream.position + 9)
    elif step % 5 == 3:
        reader.stream.skip()
    elif step % 5 == 4:
        reader.step(0, 1, 12)
        reader.stream.restore(state)
    elif step == 11:
        reader.stream.lose(Damage(0, 1, counted=True))


@pytest.mark.parametrize("most_tokens", [1, 5 * LENGTH, 1 << 17])
@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_steps_read_together_are_those_read_alone(tmp_path, monkeypatch, most_tokens, objective):
    """Against a loader that has read nothing before: through ramps, ranks, skips and whatever else a run does."""
    monkeypatch.setattr(loader_module, "MOST_TOKENS", most_tokens)
    data = write_sentences(tmp_path, 70, shard_tokens=300)
    shape = {"global_batch_size": Ramp((4, 12, 6), (0, 5, 30)), "objective": ObjectiveConfig(name=objective)}
    reader = loader(data, **shape)
    for step in range(40):
        change(reader, step)
        fresh = loader(data, **shape)
        fresh.stream.restore(json.loads(json.dumps(reader.stream.state())))
        ranks = (0, 1, 12) if step < 15 else (step // 25, 2, 2)
        for mine, alone in zip(reader.step(*ranks), fresh.step(*ranks), strict=True):
            assert mine.weights == alone.weights
            assert mine.sources == alone.sources
            for name in ("samples_B3", "row_weights_B", "domains_B", "documents"):
                assert getattr(mine, name).equal(getattr(alone, name))
            assert mine.inputs.keys() == alone.inputs.keys()
            assert all(mine.inputs[name].equal(alone.inputs[name]) for name in mine.inputs)
        assert reader.stream.state() == fresh.stream.state()


def test_damage_is_met_at_the_step_that_needs_the_shard(tmp_path):
    """Steps before it may have been read together with it."""
    data = write_shards(tmp_path, made_up_documents(90), shard_tokens=300)
    whole = loader(data, window_shards=1)
    used = [{source.split(":")[0] for source in whole.step(0, 1, 12)[0].sources} for _ in range(12)]
    first, name = [(step, *new) for step in range(4, 12) if (new := used[step] - set.union(*used[:step]))][-1]
    path = tmp_path / name
    path.write_bytes(bytes(path.stat().st_size))
    reader = loader(TokenDataset(tmp_path), window_shards=1)
    for _ in range(first):
        reader.step(0, 1, 12)
    for _ in range(2):
        before = reader.stream.state()
        with pytest.raises(DataError, match=f"{path.name} is damaged"):
            reader.step(0, 1, 12)
        assert reader.stream.state() == before


def test_a_step_that_fails_does_not_advance(tmp_path):
    data = write_shards(tmp_path, made_up_documents(30), shard_tokens=300)
    for path in tmp_path.glob("*.tokens"):
        path.write_bytes(b"\xff" * path.stat().st_size)
    reader = loader(data)
    before = reader.stream.state()
    with pytest.raises(DataError, match="is damaged"):
        reader.step(0, 1, 12)
    assert reader.stream.state() == before


def test_an_empty_data_set_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no sample"):
        loader(write_shards(tmp_path, []))


@pytest.mark.parametrize(("data_size", "micro_batch_size"), [(1, 1), (1, 5), (2, 4), (3, 2), (7, 3)])
@pytest.mark.parametrize("max_samples", [None, 1, 11, 10**6])
def test_evaluation_sees_each_sample_once_with_the_same_weight_in_every_layout(
    dataset, data_size, micro_batch_size, max_samples
):
    held_out = ValidationSamples(dataset, LENGTH, "document", max_samples)

    def batches(rank, size, micro):
        return list(held_out.batches(rank, size, micro))

    whole = [row for row in rows_of(batches(0, 1, 1)) if row[1]]
    parts = [batches(rank, data_size, micro_batch_size) for rank in range(data_size)]
    assert {len(part) for part in parts} == {held_out.num_batches(data_size, micro_batch_size)}
    assert {batch.num_rows for part in parts for batch in part} == {micro_batch_size}
    merged = [row for micro in zip(*parts, strict=True) for batch in micro for row in rows_of([batch])]
    assert [row for row in merged if row[1]] == whole
    total = sum(batch.weights["causal"] for part in parts for batch in part)
    assert total == sum(batch.weights["causal"] for batch in batches(0, 1, 1))


def test_a_missing_sample_is_a_row_of_weight_0(dataset):
    last = list(ValidationSamples(dataset, LENGTH, "document", max_samples=9).batches(1, 2, 4))[-1]
    assert last.samples_B3.unique().tolist() == [-1]
    assert last.row_weights_B.tolist() == [0, 0, 0, 0]
    assert not last.inputs["weights_BT"].any()
    assert last.sources == ("",) * 4
    assert (last.inputs["tokens_BT"] == EOS).all()
