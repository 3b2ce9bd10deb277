"""Retention: what stays, and that the newest verified one stays whoever removes or saves at the same time."""

import itertools
import random
import threading
from pathlib import Path

import pytest

from engine.checkpoint.folder import Owner, committed, partial_path, publish, step_of, step_path
from engine.checkpoint.retention import Retention, newest_whole, prune, victims
from tests.engine.checkpoint.worlds import World, layout_of, random_state, small_model, some_state

FOLDER = Path("checkpoints")


def steps_left(steps, retention, verified):
    paths = [step_path(FOLDER, step) for step in sorted(steps, reverse=True)]
    gone = victims(paths, retention, step_path(FOLDER, verified) if verified is not None else None)
    assert gone == sorted(gone, key=step_of), "oldest first"
    return sorted(set(steps) - set(map(step_of, gone)))


@pytest.mark.parametrize(
    ("retention", "verified", "left"),
    [
        (Retention(2), 60, [50, 60]),
        (Retention(1, keep_every=30), 60, [30, 60]),
        (Retention(1, keep_best=2, metric={10: 3.0, 20: 1.0, 30: 2.0, 40: 1.5}), 60, [20, 40, 60]),
        (Retention(1, keep_best=9, metric={10: 3.0}), 60, [10, 60]),
        (Retention(2, keep_every=20, keep_best=1, metric={10: 0.5, 20: 0.6}), 60, [10, 20, 40, 50, 60]),
        (Retention(1, borders=frozenset({20, 60, 90})), 60, [20, 60]),
        (Retention(1), 40, [40, 50, 60]),  # 50 and 60 are damaged, and the user's to look at
        (Retention(1), 10, [10, 20, 30, 40, 50, 60]),
        (Retention(1), None, [10, 20, 30, 40, 50, 60]),
    ],
)
def test_what_stays(retention, verified, left):
    assert steps_left([10, 20, 30, 40, 50, 60], retention, verified) == left


def test_the_newest_verified_stays_under_every_rule():
    steps = [1, 2, 3, 4, 5]
    for last, every, best in itertools.product((1, 2, 9), (None, 2, 7), (0, 1, 3)):
        for verified in steps:
            assert verified in steps_left(steps, Retention(last, every, best, {1: 0.0, 4: 1.0}), verified)


@pytest.fixture
def checkpoints(tmp_path):
    world = World(layout_of(1, 2, 1), 3, small_model())
    for step in range(1, 9):
        world.fill(random_state(world.specs, step))
        world.save(tmp_path, some_state(step))
    return world


def harm(path):
    file = next(path.glob("*.safetensors"))
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)


def test_the_newest_whole_one_is_found_by_reading(tmp_path, checkpoints):
    for step in (8, 7):
        harm(step_path(tmp_path, step))
    assert newest_whole(committed(tmp_path)) == step_path(tmp_path, 6)
    assert prune(tmp_path, Retention(1), step_path(tmp_path, 6)) == [step_path(tmp_path, step) for step in range(1, 6)]
    assert [step_of(path) for path in committed(tmp_path)] == [8, 7, 6]


@pytest.mark.parametrize("seed", range(4))
def test_prunes_that_race_with_each_other_and_with_saves_leave_the_newest_verified(tmp_path, checkpoints, seed):
    """Two prune by different rules while a run saves, also over a step that is there already; some of what it saves is
    damaged when it is committed. Whatever the order, the newest whole one is there at the end."""
    world, done, errors = checkpoints, threading.Event(), []
    whole = {8}

    def save():
        draw = random.Random(seed)
        for step in (9, 10, 10, 11, 12, 12, 13):
            saved = world.save(tmp_path / "elsewhere", some_state(step))
            if step not in whole and draw.random() < 0.5:
                harm(saved)
            else:
                whole.add(step)
            publish(saved.rename(partial_path(tmp_path, step, Owner("job", 0))), step_path(tmp_path, step))
        done.set()

    def keep_pruning(retention):
        try:
            while not done.is_set():
                verified = newest_whole(committed(tmp_path))
                if verified is not None:
                    prune(tmp_path, retention, verified)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=keep_pruning, args=(rule,)) for rule in (Retention(1), Retention(2, 2))]
    for thread in threads:
        thread.start()
    save()
    for thread in threads:
        thread.join()
    assert errors == []
    found = newest_whole(committed(tmp_path))
    assert found is not None
    assert step_of(found) == max(whole)
