"""Objectives that a model or a packing cannot serve are refused before anything starts, each with its reason."""

from typing import Any, get_args

import pytest

from engine.config.objectives import OBJECTIVES
from engine.config.rules.objective import check_objective
from engine.config.schema.model import FamilyName, make_model
from engine.config.schema.stage import RunStage
from engine.errors import ConfigError

SIZES = {"vocab_size": 10, "num_layers": 1, "hidden_size": 4, "num_heads": 1}


def problems(family, objective, sequence_length=64, pair_head=None, task_head=None, duration=None, **data):
    """What the rules say; the model has a head for pairs where the objective has pairs, unless told otherwise."""
    stage = RunStage.model_validate(
        {
            "data": {"train": "x"} | data,
            "objective": objective,
            "sequence_length": sequence_length,
            "global_batch_size": 1,
            "duration": duration or {"steps": 1},
        }
    )
    found = []
    has_head = stage.objective.pairs != "none" if pair_head is None else pair_head
    head: dict[str, Any] = {"pair_head": has_head} if family == "bert" else {}
    if OBJECTIVES[stage.objective.name].has_head:
        head["task_head"] = task_head or {"task": stage.objective.name, "num_labels": len(stage.objective.labels) or 1}
    elif task_head:
        head["task_head"] = task_head
    check_objective("stages.0", stage, make_model(**SIZES, family=family, **head), found)
    assert all(isinstance(problem, ConfigError) for problem in found)
    return [str(problem) for problem in found]


@pytest.mark.parametrize("family", get_args(FamilyName))
@pytest.mark.parametrize("name", OBJECTIVES)
def test_each_family_has_its_objectives(family, name):
    objective: dict[str, Any] = {"name": name} | ({"labels": ["a", "b"]} if name.endswith("classification") else {})
    if name == "answer" and family == "t5":
        objective["answer_length"] = 8
    found = problems(family, objective)
    if family in OBJECTIVES[name].families:
        assert not found
    else:
        [message] = found
        assert f"stages.0.objective.name = {name} with model.family = {family}" in message
        assert next(other for other, entry in OBJECTIVES.items() if family in entry.families) in message


@pytest.mark.parametrize(
    ("objective", "task_head", "message"),
    [
        ("regression", {"task": "classification", "num_labels": 1}, "with model.task_head = classification"),
        ({"name": "masked"}, {"task": "regression", "num_labels": 1}, "with model.task_head = regression"),
        (
            {"name": "classification", "labels": ["a", "b"]},
            {"task": "classification", "num_labels": 3},
            "objective.labels has 2 names with model.task_head.num_labels = 3",
        ),
        ({"name": "masked", "labels": ["a"]}, None, "objective.labels = ('a',) with"),
    ],
)
def test_an_objective_and_the_head_of_the_model_belong_together(objective, task_head, message):
    [found] = problems("bert", objective, task_head=task_head)
    assert message in found


@pytest.mark.parametrize(("data", "duration"), [({"columns": {}}, {"steps": 1}), ({}, {"epochs": 2.0})])
def test_files_of_examples_are_encoded_before_a_run_reads_them(data, duration):
    [found] = problems("bert", "regression", duration=duration, **data)
    assert "files of examples have to be encoded" in found
    assert "palimpsest finetune" in found


@pytest.mark.parametrize(
    ("family", "objective", "message"),
    [
        ("gpt", {"pairs": "next_sentence"}, "objective.pairs = next_sentence with stages.0.objective.name = causal"),
        ("gpt", {"rate": 0.3}, "objective.rate = 0.3 with"),
        ("t5", {"name": "span_corruption", "mask_share": 0.5}, "objective.mask_share = 0.5 with"),
        ("bert", {"name": "masked", "mean_span_length": 4.0}, "objective.mean_span_length = 4.0 with"),
        ("bert", {"name": "masked", "mask_share": 0.9, "random_share": 0.2}, "objective.random_share = 0.2"),
        ("bert", {"name": "regression", "label_smoothing": 0.1}, "objective.label_smoothing = 0.1 with"),
        ("gpt", {"label_smoothing": 0.1}, "objective.label_smoothing = 0.1 with"),
    ],
)
def test_keys_that_are_not_used_or_do_not_add_up_are_refused(family, objective, message):
    assert any(message in problem for problem in problems(family, objective))


@pytest.mark.parametrize("name", ["classification", "token_classification", "question_answering", "answer"])
def test_labels_of_every_task_but_a_regression_are_smoothed(name):
    labels = {"labels": ["a", "b"]} if name.endswith("classification") else {}
    assert not problems("gpt", {"name": name, "label_smoothing": 0.1} | labels)


@pytest.mark.parametrize(("pairs", "pair_head"), [("sentence_order", False), ("none", True)])
def test_pairs_and_their_head_come_together(pairs, pair_head):
    [message] = problems("bert", {"name": "masked", "pairs": pairs}, pair_head=pair_head)
    assert f"stages.0.objective.pairs = {pairs} with model.pair_head = {pair_head}\n  allowed: pairs with" in message


def test_spans_of_masks_have_a_mean_length():
    assert not problems("bert", {"name": "masked", "mask_unit": "span", "mean_span_length": 4.0})


@pytest.mark.parametrize(
    ("family", "objective", "shortest"),
    [("gpt", "causal", 1), ("bert", "masked", 3), ("bert", {"name": "masked", "pairs": "sentence_order"}, 5)],
)
def test_rows_have_room_for_special_tokens(family, objective, shortest):
    assert not problems(family, objective, shortest)
    if shortest > 1:
        [message] = problems(family, objective, shortest - 1)
        assert f"stages.0.sequence_length = {shortest - 1}" in message


def test_whole_documents_are_packed_for_objectives_that_can_read_them():
    assert not problems("gpt", "causal", packing="best_fit")
    assert not problems("bert", "masked", packing="best_fit")
    for family, objective in (("t5", "span_corruption"), ("bert", {"name": "masked", "pairs": "next_sentence"})):
        [message] = problems(family, objective, packing="best_fit")
        assert "stages.0.data.packing = best_fit with objective" in message
    [message] = problems("gpt", "causal", packing="best_fit", attention="row")
    assert "stages.0.data.attention = row" in message
