"""What is kept must be saved, and what is judged must be measured."""

import copy

import pytest

from engine.config.load import merge, parse_run
from engine.config.rules.checkpoint import check_keeping

RUN = {
    "folder": "r",
    "tokenizer": "t",
    "model": {"vocab_size": 8, "num_layers": 1, "hidden_size": 4, "num_heads": 1},
    "stages": [
        {
            "data": {"train": "d", "validation": "v"},
            "sequence_length": 4,
            "global_batch_size": 1,
            "duration": {"steps": 9},
        }
    ],
    "evaluation": {"every_steps": 5},
    "checkpoint": {"every_steps": 10},
}


def problems(**changes):
    found = []
    check_keeping(parse_run(merge(copy.deepcopy(RUN), changes), "test"), found)
    return found


@pytest.mark.parametrize(
    "checkpoint",
    [
        {},
        {"keep_every": 30},
        {"keep_best": 2},
        {"every_steps": 7, "keep_best": 2, "best_metric": "loss"},
        {"memory": {"every_steps": 3}},
        {"memory": {"every_steps": 15}},
        {"every_steps": None, "memory": {"every_steps": 10}},
    ],
)
def test_what_is_allowed(checkpoint):
    assert problems(checkpoint=checkpoint) == []


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"checkpoint": {"keep_every": 25}}, "checkpoint.keep_every = 25 with checkpoint.every_steps = 10"),
        ({"checkpoint": {"every_steps": None, "keep_every": 25}}, "keep_every = 25 with checkpoint.every_steps = None"),
        ({"checkpoint": {"every_steps": None, "keep_best": 1}}, "keep_best = 1 without checkpoint.every_steps"),
        ({"checkpoint": {"keep_best": 1}, "evaluation": {"every_steps": 4}}, "evaluation.every_steps = 4"),
        ({"checkpoint": {"keep_best": 1}, "evaluation": {"every_steps": None}}, "evaluation.every_steps = None"),
        ({"checkpoint": {"memory": {"every_steps": 10}}}, "each of these steps goes to the disk"),
        ({"checkpoint": {"memory": {"every_steps": 20}}}, "memory.every_steps = 20 with checkpoint.every_steps = 10"),
        ({"checkpoint": {"memory": {"every_steps": 3, "folder": "shm"}}}, "checkpoint.memory.folder = shm"),
    ],
)
def test_what_is_refused_says_what_to_do(changes, wrong):
    (problem,) = problems(**changes)
    assert wrong in problem.wrong
    assert problem.allowed
    assert problem.remedy


def test_the_best_by_held_out_loss_wants_held_out_data():
    stages = [RUN["stages"][0] | {"data": {"train": "d"}}]
    (problem,) = problems(stages=stages, checkpoint={"keep_best": 1})
    assert "no validation data" in problem.wrong
