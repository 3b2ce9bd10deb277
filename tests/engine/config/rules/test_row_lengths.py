"""Rows of several lengths are for a task's examples of one data set, in order, and divide among the ranks of a row."""

from typing import Any

import pytest

from engine.config.load import merge, parse_run
from engine.config.resolve import check


def problems(stage: dict[str, Any], **changes: Any) -> list[str]:
    given = {
        "name": "task",
        "objective": {"name": "classification", "labels": ["a", "b"]},
        "data": {"train": "d", "row_lengths": [8, 16]},
        "sequence_length": 24,
        "global_batch_size": 1,
        "duration": {"steps": 9},
    }
    head = {"task": "classification", "num_labels": 2}
    model = {"family": "gpt", "vocab_size": 64, "num_layers": 1, "hidden_size": 8, "num_heads": 2, "max_positions": 24}
    tree = {"folder": "r", "tokenizer": "t", "model": model | {"task_head": head}, "stages": [merge(given, stage)]}
    return [str(problem) for problem in check(parse_run(merge(tree, changes), "test"))]


def test_lengths_of_a_task_are_allowed():
    assert problems({}) == []
    assert problems({"data": {"row_lengths": []}}) == []
    tokens = {"task": "token_classification", "num_labels": 2}
    assert problems({"objective": {"name": "token_classification"}}, model={"task_head": tokens}) == []


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ({"data": {"row_lengths": [16, 8]}}, r"data.row_lengths = [16, 8]"),
        ({"data": {"row_lengths": [8, 8]}}, r"data.row_lengths = [8, 8]"),
        ({"data": {"row_lengths": [8, 24]}}, "rising lengths below 24"),
        ({"data": {"on_damage": "quarantine"}}, "row_lengths with on_damage = quarantine"),
        ({"replay": {"ratio": 0.1, "source": "s"}}, "row_lengths with replay"),
        ({"objective": {"name": "causal", "labels": []}}, "row_lengths with objective causal"),
    ],
)
def test_other_rows_have_one_length(stage, said):
    assert any(said in problem for problem in problems(stage)), problems(stage)


def test_ranks_that_share_a_row_divide_each_length():
    found = problems({"data": {"row_lengths": [9, 16]}}, parallel={"tensor": 2, "sequence_parallel": True})
    assert any("stages.0.data.row_lengths.0 = 9 does not divide by the 2 ranks" in problem for problem in found), found
