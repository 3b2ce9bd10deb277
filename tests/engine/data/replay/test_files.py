"""Files of a reservoir: what changed is what is written, loading needs no shard, and the compacted bytes are one."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine.data.replay.files import NamedFile, load
from engine.data.replay.files import write as write_file
from engine.data.replay.reservoir import Reservoir, united
from engine.data.shards.tombstones import Tombstones
from engine.errors import CheckpointError
from tests.engine.data.replay.made_up import ROWS, admissions, all_rows, content, name_of, new


def write(folder: Path, reservoir: Reservoir, only_fresh: bool) -> NamedFile | None:
    named = write_file(folder, reservoir, only_fresh)
    reservoir.mark_written()
    return named


def written(folder: Path, reservoir: Reservoir, only_fresh: bool) -> NamedFile:
    named = write(folder, reservoir, only_fresh)
    assert named is not None
    return named


def compacted(folder, reservoir):
    return (folder / written(folder, reservoir, only_fresh=False).name).read_bytes()


@pytest.mark.parametrize("weighted", [False, True])
def test_the_compacted_file_is_equal_byte_for_byte_whatever_came_how(tmp_path, weighted):
    found = set()
    for world, saves in itertools.product((1, 2, 3, 7), (False, True)):
        generator = np.random.default_rng(world)
        ranks, files = [new() for _ in range(world)], []
        whole = new()
        for number, admission in enumerate(admissions(generator, weighted)):
            ranks[number % world].admit(*admission)
            if saves and number % 11 == 0:  # a checkpoint: what the ranks have goes into the whole, then to the disk
                whole.merge(united(ranks))
                ranks = [whole.empty() for _ in range(world)]
                files += [write(tmp_path, whole, only_fresh=bool(files))]
                if number % 22 == 0:  # a crash: it is loaded, and some rows come again
                    whole = load(tmp_path, [file for file in files if file], whole.settings)
                    whole.admit(*admission)
        whole.merge(united(ranks))
        found.add(compacted(tmp_path, whole))
    assert len(found) == 1


def test_a_save_writes_what_has_changed(tmp_path):
    reservoir = new(capacity=4000)
    for number in range(6):
        reservoir.admit("books", name_of(number), all_rows())
    base = written(tmp_path, reservoir, only_fresh=False)
    assert write(tmp_path, reservoir, only_fresh=True) is None
    reservoir.admit("books", name_of(0), all_rows())  # known rows
    reservoir.admit("web", name_of(9), all_rows(10))
    delta = written(tmp_path, reservoir, only_fresh=True)
    assert delta.num_bytes < 18 * 10 + 600 < base.num_bytes / 40
    again = load(tmp_path, [base, delta], reservoir.settings)
    assert content(again) == content(reservoir)
    assert write(tmp_path, again, only_fresh=True) is None
    assert compacted(tmp_path, again) == compacted(tmp_path, reservoir)


def test_a_base_that_is_loaded_gives_the_generation_that_it_was_frozen_as(tmp_path):
    reservoir = new()
    for admission in admissions(np.random.default_rng(0)):
        reservoir.admit(*admission)
    base = written(tmp_path, reservoir, only_fresh=False)
    again = NamedFile.from_json(base.to_json())
    assert load(tmp_path, [again], reservoir.settings).freeze().hash == reservoir.freeze().hash
    small = load(tmp_path, [again], replace(reservoir.settings, capacity=100)).freeze()
    reservoir.shrink(100)
    assert small.hash == reservoir.freeze().hash


def test_a_deleted_row_does_not_come_back_from_an_older_file(tmp_path):
    reservoir = new()
    reservoir.admit("web", name_of(9), all_rows())
    base = written(tmp_path, reservoir, only_fresh=False)
    gone = Tombstones({name_of(9): range(0, ROWS, 2)})
    row_ids = load(tmp_path, [base], reservoir.settings, gone).freeze().domains["web"].row_ids
    assert row_ids.size == ROWS // 2
    assert ((row_ids >> np.uint64(16)) % np.uint64(2) == 1).all()


@pytest.mark.parametrize(
    ("damage", "wrong"),
    [
        (lambda path: path.unlink(), "No such file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes, .* were written"),
        (lambda path: path.write_bytes(b"\xff" * 50), "truncated, or no reservoir"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x80"), "xxh3 differs"),
    ],
)
def test_damage_is_told(tmp_path, damage, wrong):
    reservoir = new()
    reservoir.admit("web", name_of(9), all_rows(10))
    base = written(tmp_path, reservoir, only_fresh=False)
    damage(tmp_path / base.name)
    with pytest.raises(CheckpointError, match=wrong):
        load(tmp_path, [base], reservoir.settings)


@pytest.mark.parametrize("key", ["seed", "span_tokens"])
def test_another_seed_or_span_is_refused(tmp_path, key):
    reservoir = new()
    base = written(tmp_path, reservoir, only_fresh=False)
    with pytest.raises(CheckpointError, match=f"is of a reservoir with {key} = "):
        load(tmp_path, [base], replace(reservoir.settings, **{key: 77}))
