"""Damage is found whatever it is, and a run that does without a damaged shard is the same run in every layout."""

import itertools
import json
import pickle
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.data.batch import Batch
from engine.data.loader import Loader
from engine.data.shards.damage import Damage, DamagedShard
from engine.data.shards.dataset import TokenDataset
from engine.data.shards.index import Index, read_index
from engine.data.source import WeightedDataset
from engine.data.stream import MOST_LOST, Stream
from engine.errors import DataError
from tests.engine.data.corpus import made_up_documents, write_sentences, write_shards

NUM_DAMAGES = 600


def flip(content: bytes, generator: np.random.Generator) -> bytes:
    place = int(generator.integers(len(content)))
    return content[:place] + bytes([content[place] ^ int(generator.integers(1, 256))]) + content[place + 1 :]


def cut(content: bytes, generator: np.random.Generator) -> bytes:
    return content[: int(generator.integers(len(content)))]


def lengthen(content: bytes, generator: np.random.Generator) -> bytes:
    return content + bytes(generator.integers(0, 256, int(generator.integers(1, 9)), np.uint8))


def blank(content: bytes, generator: np.random.Generator) -> bytes:
    """A hole as file systems leave it."""
    first = int(generator.integers(len(content)))
    return content[:first] + bytes(len(content) - first)


def verified(folder: Path, good: Index) -> str | None:
    """What is said about a folder; None where all that is read from it is as it was."""
    try:
        dataset = TokenDataset(folder)
        dataset.verify()
    except DataError as error:
        return str(error)
    assert dataset.index == good
    return None


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_every_damage_of_a_fuzzed_sample_is_found(tmp_path, compression):
    """Each kind of damage of any file: found when the folder is verified, or nothing that is read has changed."""
    folder = write_sentences(tmp_path / "data", 60, shard_tokens=300, compression=compression).folder
    good, sound = read_index(folder), {path: path.read_bytes() for path in sorted(folder.iterdir())}
    assert len(sound) > 15
    paths, generator, harmless = list(sound), np.random.default_rng(0), 0
    for number in range(NUM_DAMAGES):
        path = paths[number % len(paths)]
        kind = number // len(paths) % 6
        if kind < 4:
            changed = (flip, cut, lengthen, blank)[kind](sound[path], generator)
            if changed == sound[path]:
                continue
            path.write_bytes(changed)
        elif kind == 4:
            path.unlink()
        else:  # a file of the same kind
            others = [other for other in paths if other.suffix == path.suffix and sound[other] != sound[path]]
            path.write_bytes(sound[others[number % len(others)]] if others else b"{}")
        said = verified(folder, good)
        assert said is None or path.stem in said or path.suffix == ".json", said
        assert said is not None or path.suffix == ".json", f"damage {number} of {path.name} is not found"
        harmless += said is None  # white space of the index, or the name of a key that holds nothing
        path.write_bytes(sound[path])
    TokenDataset(folder).verify()
    assert harmless < 5


def test_the_error_says_which_shard_also_to_another_process(tmp_path):
    write_shards(tmp_path, made_up_documents(60), shard_tokens=300)
    (tmp_path / "shard-000002.documents").unlink()
    with pytest.raises(DamagedShard, match=r"shard-000002.documents is missing") as caught:
        TokenDataset(tmp_path).verify()
    assert caught.value.number == 2
    caught.value.damage = Damage(1, 2, True)
    arrived = pickle.loads(pickle.dumps(caught.value))
    assert (arrived.number, arrived.damage, str(arrived)) == (2, Damage(1, 2, True), str(caught.value))


def loader(folder: Path, **changes: Any) -> Loader:
    arguments: dict[str, Any] = {"sequence_length": 16, "global_batch_size": 12, "seed": 3, "window_shards": 4}
    return Loader(Stream(TokenDataset(folder), **{**arguments, "attention": "document", **changes}))


def read(reader: Loader, data_rank: int, data_size: int, micro_batch_size: int) -> list[tuple[str, bytes]]:
    batches = reader.step(data_rank, data_size, micro_batch_size)
    return [
        (source, batch.inputs["tokens_BT"][b].numpy().tobytes())
        for batch in batches
        for b, source in enumerate(batch.sources)
    ]


def step_of_all(ranks: list[Loader], micro_batch_size: int) -> Counter[tuple[str, bytes]]:
    """A step of a world of loaders as the trainer takes it: the first damage is everyone's, and all try again."""
    while True:
        before = ranks[0].stream.state()
        rows: Counter[tuple[str, bytes]] = Counter()
        damages = []
        for data_rank, rank in enumerate(ranks):
            try:
                rows.update(read(rank, data_rank, len(ranks), micro_batch_size))
            except DamagedShard as error:
                damages.append(pickle.loads(pickle.dumps(error)).damage)
        if not damages:
            return rows
        for rank in ranks:
            rank.stream.restore(before)
            rank.stream.lose(damages[0])


def step_without_damage(reader: Loader, other: Stream) -> list[Batch]:
    """A step, for which both streams do without what turns out to be damaged."""
    for _ in range(3):
        try:
            return reader.step(0, 1, 12)
        except DamagedShard as error:
            found = error.damage
        if found is not None:
            reader.stream.lose(found)
            other.lose(found)
    raise AssertionError("a shard that is lost was read again")


def damaged(tmp_path: Path, suffixes: list[str]) -> Path:
    """Shards of which two have lost a file each."""
    whole = write_shards(tmp_path / "whole", made_up_documents(90), shard_tokens=300)
    folder = tmp_path / "damaged"
    shutil.copytree(whole.folder, folder)
    for number, suffix in zip((1, 6), itertools.cycle(suffixes), strict=False):
        path = folder / f"shard-{number:06d}.{suffix}"
        path.write_bytes(b"\xff" * path.stat().st_size)
    return folder


def test_samples_trained_on_are_counted_by_source_whatever_is_left_out_or_lost(tmp_path):
    other = write_shards(tmp_path / "other", made_up_documents(60, seed=1), shard_tokens=300)
    parts = [WeightedDataset(TokenDataset(damaged(tmp_path, ["tokens"])), "a", 2), WeightedDataset(other, "b", 1)]
    reader, counted = Loader(Stream(parts, 16, 12, 3, 4, "document")), np.zeros(2, np.int64)
    stream = reader.stream
    assert stream.trained() == {"a": 0, "b": 0}
    skipping = stream.clone()
    for step in range(40):
        if step == 3:
            for each in (stream, skipping):
                each.leave_out(30, 31)  # trained on before
                each.leave_out(60, 95)
        batches = step_without_damage(reader, skipping)
        skipping.skip()
        for batch in batches:
            counted += np.bincount(batch.domains_B[batch.samples_B3[:, 0] >= 0], minlength=2)
        assert list(stream.trained().values()) == counted.tolist() == list(skipping.trained().values())
        restored = Stream(parts, 16, 12, 3, 4, "document")
        restored.restore(json.loads(json.dumps(stream.state())))
        assert restored.trained() == stream.trained()
        assert stream.state() == skipping.state()
    assert len(stream.lost) == 2
    assert sum(stream.trained().values()) == stream.samples


@pytest.mark.parametrize(
    ("packing", "suffixes"),
    [("concatenate", ["tokens", "documents"]), ("best_fit", ["documents", "tokens"])],
)
def test_without_damaged_shards_steps_are_the_same_in_every_layout_and_over_restarts(tmp_path, packing, suffixes):
    folder = damaged(tmp_path, suffixes)
    alone, steps, states = [loader(folder, packing=packing)], [], []
    num_steps = 3 * loader(tmp_path / "whole", packing=packing).stream.samples_per_epoch() // 24  # an epoch and a half
    for _ in range(num_steps):
        states.append(json.loads(json.dumps(alone[0].stream.state())))
        steps.append(step_of_all(alone, 12))
    assert {damage.shard for damage in alone[0].stream.lost} == {1, 6}
    assert max(len(json.dumps(state)) for state in states) < 1024
    seen = {source for step in steps for source, _ in step}
    assert not [source for source in seen if source.startswith(("shard-000001", "shard-000006"))]
    for data_size, micro_batch_size, start in ((3, 2, 0), (2, 3, num_steps // 2)):
        ranks = [loader(folder, packing=packing) for _ in range(data_size)]
        for rank in ranks:
            rank.stream.restore(states[start])
        for number in range(start, num_steps):
            assert ranks[0].stream.state() == states[number]
            assert step_of_all(ranks, micro_batch_size) == steps[number], number


def test_what_is_left_comes_once_per_epoch_in_the_order_of_the_whole(tmp_path):
    folder = damaged(tmp_path, ["tokens"])
    whole, ranks = loader(tmp_path / "whole"), [loader(folder)]
    num_steps = whole.stream.samples_per_epoch() // 12 - 2
    order = [source for _ in range(2 * num_steps) for source, _ in read(whole, 0, 1, 12)]
    taken = [source for _ in range(num_steps) for source, _ in step_of_all(ranks, 12).elements()]
    expected = [source for source in order if not source.startswith(("shard-000001", "shard-000006"))]
    # a shard is lost at the first step that wants it, so the order of the rest is that of the whole
    assert Counter(taken) == Counter(expected[: len(taken)])


def test_a_window_that_has_begun_cannot_lose_the_count_of_its_rows(tmp_path):
    whole = write_shards(tmp_path, made_up_documents(90), shard_tokens=300)
    reader = loader(tmp_path, packing="best_fit")
    reader.step(0, 1, 12)
    shard = int(reader.stream.order.sources[0].order.shards(0, 0)[0])
    path = tmp_path / f"shard-{shard:06d}.documents"
    path.unlink()
    with pytest.raises(DataError, match="samples of its window are trained on already"):
        reader.stream.lose(Damage(0, shard, counted=False))
    first = reader.stream.order.sources[0].order.shards(0, 0)
    later = [number for number in range(whole.num_shards) if number not in first]
    reader.stream.lose(Damage(0, later[0], counted=False))
    assert reader.stream.lost == (Damage(0, later[0], False),)


def test_damage_has_an_end(tmp_path):
    write_shards(tmp_path, made_up_documents(300), shard_tokens=150)
    reader = loader(tmp_path)
    for shard in range(MOST_LOST):
        reader.stream.lose(Damage(0, shard, True))
    with pytest.raises(DataError, match=f"more than {MOST_LOST} shards are damaged"):
        reader.stream.lose(Damage(0, MOST_LOST, True))
    write_shards(tmp_path / "few", made_up_documents(12), shard_tokens=300)
    few = loader(tmp_path / "few")
    assert few.stream.parts[0].dataset.num_shards == 2
    few.stream.lose(Damage(0, 0, True))
    with pytest.raises(DataError, match=r"holds no sample: .* 2 damaged shards"):
        few.stream.lose(Damage(0, 1, True))


def test_a_mixture_loses_a_shard_of_one_source_alone(tmp_path):
    for name in ("a", "b"):
        write_shards(tmp_path / name, made_up_documents(40), shard_tokens=300)
    parts = [WeightedDataset(TokenDataset(tmp_path / name), name, 1) for name in ("a", "b")]
    reader = Loader(Stream(parts, 16, 12, 3, 4, "document"))
    (tmp_path / "b" / "shard-000001.tokens").unlink()
    ranks = [reader]
    for _ in range(12):
        rows = step_of_all(ranks, 12)
    assert reader.stream.lost == (Damage(1, 1, True),)
    assert rows
