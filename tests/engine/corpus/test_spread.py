"""Documents are spread over shards by their keys: as well as by a full shuffle, and whatever the parts are."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import engine.corpus.sources.chunks
from engine.corpus.options import PrepareOptions
from engine.corpus.prepare import prepare
from engine.corpus.spread import PURPOSE_SPREAD, spread_keys, stored_order
from engine.data.shards.dataset import TokenDataset
from engine.data.tokenizer.folder import load_tokenizer
from tests.engine.data.corpus import made_up_texts, write_json_lines

MASK = 2**64 - 1


def splitmix64(state: int) -> int:
    """One number of the generator as it is published, in plain integers."""
    z = state & MASK
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def test_keys_are_the_numbers_of_splitmix64():
    seed = int(np.random.SeedSequence((PURPOSE_SPREAD, 2, 7)).generate_state(1, np.uint64)[0])
    expected = [splitmix64(seed + (i + 1) * 0x9E3779B97F4A7C15) for i in range(20)]
    assert spread_keys((2, 7), 20).tolist() == expected
    assert not set(expected) & set(spread_keys((7, 2), 20).tolist())


def test_a_part_stores_each_side_by_rising_key():
    is_validation = np.random.default_rng(0).random(100) < 0.3
    order, keys = stored_order((0, 1), is_validation), spread_keys((0, 1), 100)
    assert sorted(order.tolist()) == list(range(100))
    assert is_validation[order].tolist() == sorted(is_validation.tolist())
    for side in (True, False):
        mine = order[is_validation[order] == side]
        assert keys[mine].tolist() == sorted(keys[mine].tolist())


@pytest.fixture
def sorted_by_source(tokenizer_folder, tmp_path, monkeypatch) -> PrepareOptions:
    """Two sources one behind the other, one document of ten from the first, in parts of some hundred documents."""
    monkeypatch.setattr(engine.corpus.sources.chunks, "_SMALLEST_CHUNK", 10_000)
    first = write_json_lines(tmp_path / "a.jsonl", ["a" * 20] * 400)
    second = write_json_lines(tmp_path / "b.jsonl", ["b" * 20] * 3600)
    return PrepareOptions((str(first), str(second)), tokenizer_folder, tmp_path / "out", 0, shard_bytes=840)


def test_sources_that_lie_one_behind_the_other_mix_as_by_a_full_shuffle(sorted_by_source):
    """Each of 200 shards holds 20 documents; how many are of the first source has the variance of a full shuffle's."""
    prepare(sorted_by_source)
    tokenizer, dataset = load_tokenizer(sorted_by_source.tokenizer), TokenDataset(sorted_by_source.output / "train")
    texts = [tokenizer.model.decode(dataset.shard(n).tokens.tolist()) for n in range(dataset.num_shards)]
    counts = np.array([text.count("a") for text in texts]) / 20
    sizes = np.array([index.num_documents for index in dataset.index.shards])
    assert counts.sum() == 400
    chi_square = float(np.sum((counts - sizes * 0.1) ** 2 / (sizes * 0.1 * 0.9)))
    freedom = dataset.num_shards - 1
    assert dataset.num_shards > 100
    assert abs(chi_square - freedom) < 5 * (2 * freedom) ** 0.5  # five standard deviations


def test_the_order_is_that_of_the_keys_over_all_parts(tokenizer_folder, tmp_path, monkeypatch):
    """Two files of one part each, and what is left out or held out moves nothing."""
    monkeypatch.setattr(engine.corpus.sources.chunks, "_SHELF_BYTES", 1)
    texts = [made_up_texts(60, seed) for seed in (1, 2)]
    names = tuple(str(write_json_lines(tmp_path / f"{n}.jsonl", some)) for n, some in enumerate(texts))
    options = PrepareOptions(names, tokenizer_folder, tmp_path / "out", 0.3, shard_bytes=1000)
    prepare(options)
    keyed = [(int(spread_keys((n, 0), 60)[i]), text) for n, some in enumerate(texts) for i, text in enumerate(some)]
    expected = [text for _, text in sorted(keyed)]
    for side in ("train", "validation"):
        found = texts_in_order(options, side)
        assert found == [text for text in expected if text in set(found)]
    twice = [texts[0], texts[1] + texts[0][:20]]
    for name, some in zip(names, twice, strict=True):
        write_json_lines(Path(name), some)
    prepare(replace(options, deduplicate="exact", output=tmp_path / "once"))
    assert texts_in_order(replace(options, output=tmp_path / "once"), "train") == texts_in_order(options, "train")


def texts_in_order(options: PrepareOptions, side: str) -> list[str]:
    tokenizer, dataset = load_tokenizer(options.tokenizer), TokenDataset(options.output / side)
    found = []
    for number in range(dataset.num_shards):
        ids, (offsets, _) = dataset.shard(number).tokens, dataset.offsets(number)
        found += [tokenizer.model.decode(ids[a : b - 1].tolist()) for a, b in itertools.pairwise(offsets)]
    return found
