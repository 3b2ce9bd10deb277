"""Sets of forgotten documents: equality, hash, membership, and their file under several writers."""

import errno
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from engine.data.shards import tombstones
from engine.data.shards.tombstones import FILE, NO_TOMBSTONES, Tombstones, add_tombstones, read_tombstones
from engine.errors import DataError


def test_hash_is_that_of_the_set_and_not_of_how_it_was_made() -> None:
    one = Tombstones({"b": [5, 1, 5], "a": [2], "empty": []})
    other = Tombstones({"a": [2]}) | Tombstones({"b": [1]}) | Tombstones({"b": [5, 1]})
    assert one == other
    assert one.hash == other.hash
    assert len(one) == 3
    assert one.shards == ("a", "b")
    # the set decides: each of these differs in one document, or in its shard
    others = [Tombstones({"a": [2], "b": [1]}), Tombstones({"a": [1], "b": [2, 5]}), Tombstones({"a": [1, 2, 5]})]
    assert len({one.hash, *(found.hash for found in others)}) == 4
    assert NO_TOMBSTONES.hash == ""
    assert Tombstones({"a": []}) == NO_TOMBSTONES


def test_sets_join_and_subtract() -> None:
    one, other = Tombstones({"a": [1, 2], "b": [3]}), Tombstones({"a": [2, 9], "c": [0]})
    assert one - other == Tombstones({"a": [1], "b": [3]})
    assert (one | other).of("a").tolist() == [1, 2, 9]
    assert (one | other).only(["c", "d"]) == Tombstones({"c": [0]})


def test_membership_agrees_with_a_set_of_pairs() -> None:
    random = np.random.default_rng(0)
    shards = ["s0", "s1", "s2", "s3"]
    pairs = {(shards[shard], document) for shard, document in zip(random.integers(3, size=60), range(60), strict=True)}
    forgotten = Tombstones({name: [document for shard, document in pairs if shard == name] for name in shards})
    numbers_N, documents_N = random.integers(4, size=500), random.integers(70, size=500)
    expected = [(shards[n], d) in pairs for n, d in zip(numbers_N.tolist(), documents_N.tolist(), strict=True)]
    assert forgotten.contains(shards, numbers_N, documents_N).tolist() == expected
    assert 0 < sum(expected) < 500
    assert not NO_TOMBSTONES.contains(shards, numbers_N, documents_N).any()


def test_file_grows_by_what_is_new(tmp_path: Path) -> None:
    assert read_tombstones(tmp_path) == NO_TOMBSTONES
    assert add_tombstones(tmp_path, Tombstones({"a": [3, 1]})) == 2
    before = (tmp_path / FILE).read_bytes()
    assert add_tombstones(tmp_path, Tombstones({"a": [1]})) == 0
    assert (tmp_path / FILE).read_bytes() == before
    assert add_tombstones(tmp_path, Tombstones({"a": [1, 7]})) == 1
    assert (tmp_path / FILE).read_bytes().startswith(before)
    lines = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    assert lines == [{"shard": "a", "document": number} for number in (1, 3, 7)]


def test_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    sets = [Tombstones({"a": range(10 * number, 10 * number + 12), f"b{number}": [0]}) for number in range(12)]
    with ThreadPoolExecutor(6) as pool:
        new = list(pool.map(lambda found: add_tombstones(tmp_path, found), sets))
    assert read_tombstones(tmp_path) == Tombstones({"a": range(122), **{f"b{number}": [0] for number in range(12)}})
    assert sum(new) == 122 + 12  # each document was new to one writer


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"shard": "a"}', '{"shard": 1, "document": 2}', '{"shard": "a", "document": -1}', "3", ""]
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / FILE).write_text(f'{{"shard": "a", "document": 1}}\n{line}\n')
    with pytest.raises(DataError, match=rf"{FILE}:2 names no document"):
        read_tombstones(tmp_path)


def test_a_folder_that_cannot_be_written_says_what_else_serves(tmp_path: Path, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(tombstones, "write_atomically", refuse)
    with pytest.raises(DataError, match=r"(?s)Read-only file system.*--run"):
        add_tombstones(tmp_path, Tombstones({"a": [1]}))
    with pytest.raises(DataError, match="No such file or directory"):
        add_tombstones(tmp_path / "nowhere", Tombstones({"a": [1]}))
