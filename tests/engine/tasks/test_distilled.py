"""Distillation in a task: of labels that the start predicts already, and of the tokens of replayed text."""

import json
import re
from typing import Any

import pytest

from engine.config.resolve import examine
from engine.errors import ConfigError
from engine.tasks.resolve import resolve_task
from engine.train.starting_weights import StartingWeights
from tests.engine.serve.runs import save
from tests.engine.tasks.starts import tree_of, write_examples, write_start

DISTILS: dict[str, Any] = {"regularization": {"distillation": {"strength": 1.0}}}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return write_start(tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="module")
def fine_tuned(tmp_path_factory):
    """A folder of theirs that classifies into two labels, which have no names."""
    return write_start(tmp_path_factory.mktemp("tuned"), task_head={"task": "classification", "num_labels": 2})


def test_labels_that_the_start_predicts_are_distilled(tmp_path, fine_tuned):
    write_examples(tmp_path)
    run = resolve_task(tree_of(tmp_path, fine_tuned, **DISTILS), "task")
    assert examine(run, 1)[1] == []
    assert run.distils_labels(0)
    StartingWeights(run)


@pytest.mark.parametrize(
    ("objective", "reason"), [("classification", "has a new head to begin with"), ("regression", "predicts a number")]
)
def test_without_anything_to_keep_it_is_refused_before_examples_are_read(tmp_path, start, objective, reason):
    with pytest.raises(ConfigError, match=reason) as found:
        resolve_task(tree_of(tmp_path, start, objective, **DISTILS), "task")
    assert str(found.value).startswith(f"stages.0.regularization.distillation with objective {objective}")


def test_a_head_that_is_begun_anew_is_as_new_as_any(tmp_path, fine_tuned):
    tree = tree_of(tmp_path, fine_tuned, **DISTILS)
    with pytest.raises(ConfigError, match="has a new head"):
        resolve_task(tree | {"init_from": {"path": tree["init_from"], "head": "new"}}, "task")


@pytest.mark.parametrize("objective", ["classification", "regression"])
def test_beside_a_new_head_the_replayed_text_alone_is_distilled(tmp_path, start, objective):
    write_examples(tmp_path)
    if objective == "regression":
        rows = [{"text": "the ink fades", "label": number / 3} for number in range(8)]
        for part in ("train", "validation"):
            (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    replay = {"ratio": 0.25, "source": str(start / "train")}
    run = resolve_task(tree_of(tmp_path, start, objective, replay=replay, **DISTILS), "task")
    assert examine(run, 1)[1] == []
    assert not run.distils_labels(0)
    assert run.init_from is not None
    assert run.init_from.head == "new"
    more = run.stages[0].model_dump() | {"regularization": {"distillation": {"strength": 1.0, "top_k": 99999}}}
    [problem] = examine(run.model_copy(update={"stages": (type(run.stages[0]).model_validate(more),)}), 1)[1]
    assert "top_k = 99999 is more than" in str(problem)


def test_labels_of_other_names_or_in_another_order_are_refused(tmp_path, start, fine_tuned):
    theirs, own = tmp_path / "theirs", tmp_path / "own"
    for folder in (theirs, own):
        folder.mkdir()
        write_examples(folder, labels=("negative", "positive"))
    config = json.loads((fine_tuned / "hf" / "config.json").read_text())
    (theirs / "hf").mkdir()
    for path in (fine_tuned / "hf").iterdir():
        (theirs / "hf" / path.name).write_bytes(path.read_bytes())
    (theirs / "hf" / "config.json").write_text(json.dumps(config | {"id2label": {0: "positive", 1: "negative"}}))
    told = re.escape("hf are positive, negative, and those of the task negative, positive")
    with pytest.raises(ConfigError, match=told):
        resolve_task(tree_of(theirs, theirs, **DISTILS), "task")
    in_order = {"name": "classification", "labels": ["positive", "negative"]}
    assert resolve_task(tree_of(theirs, theirs, in_order, **DISTILS), "task").distils_labels(0)
    first = resolve_task(tree_of(own, start), "task")
    save(first, 2, seed=1)
    write_examples(tmp_path)
    second = tree_of(tmp_path, start, **DISTILS) | {"init_from": str(first.folder)}
    with pytest.raises(ConfigError, match="run are negative, positive, and those of the task new, old"):
        resolve_task(second, "task")
    assert resolve_task(tree_of(own, start, **DISTILS) | {"init_from": str(first.folder)}, "task").distils_labels(0)


def test_a_run_file_that_says_the_head_is_kept_has_a_start_with_one(tmp_path, start):
    write_examples(tmp_path)
    run = resolve_task(tree_of(tmp_path, start), "task")
    stage = type(run.stages[0]).model_validate(run.stages[0].model_dump() | DISTILS)
    with pytest.raises(ConfigError, match=re.escape("and it has no classifier.bias")):
        StartingWeights(run.model_copy(update={"stages": (stage,)}))
