"""A task file becomes an ordinary run: the start's model with a head, steps, lengths, defaults; and its errors."""

import json
import shutil
from pathlib import Path

import pytest

from engine.config.load import load_run, read_tree
from engine.config.resolve import resolve
from engine.config.save import save_run, save_tree
from engine.config.schema.model import TaskHead
from engine.data.shards.dataset import TokenDataset
from engine.data.tokenizer.folder import load_tokenizer
from engine.errors import ConfigError, DataError, PalimpsestError
from engine.tasks.resolve import resolve_task
from tests.engine.serve.runs import run_config, save
from tests.engine.tasks.starts import tree_of, write_examples, write_start

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return write_start(tmp_path_factory.mktemp("start"))


def test_what_is_left_out_follows_from_start_and_examples(tmp_path, start):
    write_examples(tmp_path)
    run = resolve_task(tree_of(tmp_path, start), "task")
    stage = run.stages[0]
    assert run.model.task_head is not None
    assert (run.model.task_head.task, run.model.task_head.num_labels) == ("classification", 2)
    assert stage.objective.labels == ("new", "old")
    assert (stage.global_batch_size, stage.num_steps) == (20, 3)
    assert stage.sequence_length % 8 == 0
    assert all(length % 8 == 0 and length < stage.sequence_length for length in stage.data.row_lengths)
    assert stage.data.row_lengths, "texts of three lengths"
    assert run.model.dropout == 0.1
    assert run.init_from is not None
    assert run.init_from.missing == "initialise"
    assert (stage.schedule.shape, stage.schedule.warmup, stage.schedule.final_factor) == ("linear", 1, 0.0)
    assert run.evaluation.every_steps == 1
    assert stage.data.train is not None
    dataset = TokenDataset(stage.data.train)
    assert dataset.index.num_documents == 20
    assert resolve(run, 1).world_size == 1


def test_what_is_written_wins(tmp_path, start):
    write_examples(tmp_path)
    tree = tree_of(
        tmp_path,
        start,
        {"name": "classification", "labels": ["old", "new"]},
        duration={"epochs": 2.5},
        global_batch_size=8,
        sequence_length=16,
        schedule={"shape": "constant"},
    )
    run = resolve_task(tree | {"optimizer": {"learning_rate": 1e-3}, "model": {"dropout": 0.0}}, "task")
    stage = run.stages[0]
    assert stage.objective.labels == ("old", "new")
    assert (stage.num_steps, stage.sequence_length, stage.schedule.shape) == (7, 16, "constant")  # 2.5 x 20 / 8 = 6.25
    assert (run.optimizer.learning_rate, run.optimizer.beta2, run.model.dropout) == (1e-3, 0.999, 0.0)


def test_the_run_file_is_the_same_run(tmp_path, start):
    write_examples(tmp_path)
    run = resolve_task(tree_of(tmp_path, start), "task")
    save_tree(run.model_dump(mode="json", exclude_none=True), tmp_path / "run.yaml")
    assert load_run(tmp_path / "run.yaml") == run
    assert resolve_task(tree_of(tmp_path, start), "task") == run


def test_a_run_of_ours_is_a_start_with_its_own_tokenizer(tmp_path, start):
    write_examples(tmp_path)
    config = run_config(tmp_path / "pretrained", "bert", start / "tokenizer")
    size = load_tokenizer(start / "tokenizer").vocab_size
    save(config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": size})}), 3, 0)
    run = resolve_task(tree_of(tmp_path, start) | {"init_from": str(tmp_path / "pretrained")}, "task")
    assert run.tokenizer == start / "tokenizer"


def test_a_regression_has_one_number(tmp_path, start):
    write_examples(tmp_path, labels=(1, 0.5, -2))
    run = resolve_task(tree_of(tmp_path, start, "regression"), "task")
    assert run.model.task_head is not None
    assert (run.model.task_head.task, run.model.task_head.num_labels) == ("regression", 1)
    assert run.stages[0].objective.labels == ()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"init_from": None}, "task has no init_from"),
        ({"folder": ""}, "task has no folder"),
        ({"stages": []}, "a list of one stage"),
        ({"stages": [{"objective": "masked", "data": {"train": "x"}}]}, "classification or regression"),
        ({"stages": [{"objective": "classification", "data": {}}]}, "data.train names no file"),
        ({"init_from": "nowhere"}, "nowhere"),
        (
            {"stages": [{"objective": "classification", "data": {"train": "x", "columns": {"txt": "a"}}}]},
            "unknown key stages.0.data.columns.txt",
        ),
        (
            {"stages": [{"objective": {"name": "regression", "label": ["a"]}, "data": {"train": "x"}}]},
            "unknown key stages.0.objective.label",
        ),
        ({"evaluation": None}, "evaluation"),
        ({"evaluation": {"every_step": 3}}, "unknown key evaluation.every_step"),
        ({"checkpoint": "often"}, "checkpoint"),
        ({"model": [1]}, "model"),
        ({"model": {"hidden": 3}}, "unknown key model.hidden"),
        ({"model": {"dropout": "no"}}, "model.dropout"),
        ({"tokenizer": 3}, "tokenizer"),
        ({"folder": "~nobody-of-this-name/run"}, "no home folder"),
        ({"stages": [{"objective": "classification", "data": {"train": "x", "validation": ["a"]}}]}, "one file"),
        ({"stages": [{"objective": "classification", "data": {"train": "x", "columns": None}}]}, "columns"),
        *(
            ({"stages": [{"objective": "classification", "data": {"train": "x"}, key: value}]}, f"stages.0.{key}")
            for key, value in [
                ("global_batch_size", "8"),
                ("global_batch_size", 0),
                ("sequence_length", 1.5),
                ("duration", 3),
                ("duration", {"epochs": "3"}),
                ("duration", {"epochs": float("inf")}),
                ("duration", {"steps": -1}),
                ("name", ["a"]),
                ("schedule", "linear"),
            ]
        ),
    ],
)
def test_a_wrong_task_file_is_refused(tmp_path, start, change, said):
    write_examples(tmp_path)
    with pytest.raises(PalimpsestError, match=said):
        resolve_task(tree_of(tmp_path, start) | change, "task")


def test_labels_of_the_validation_examples_have_to_be_known(tmp_path, start):
    write_examples(tmp_path)
    with (tmp_path / "validation.jsonl").open("a") as file:
        file.write('{"text": "scraped", "label": "third"}\n')
    with pytest.raises(DataError, match=r"row 5 of .*validation\.jsonl has label 'third'"):
        resolve_task(tree_of(tmp_path, start), "task")


def test_a_label_without_examples_is_refused(tmp_path, start):
    write_examples(tmp_path)
    with pytest.raises(DataError, match="no example of label never"):
        resolve_task(tree_of(tmp_path, start, {"name": "classification", "labels": ["old", "new", "never"]}), "task")


def test_a_family_without_a_head_for_tasks_is_refused(tmp_path, start):
    write_examples(tmp_path)
    save(run_config(tmp_path / "pretrained", "t5", start / "tokenizer"), 3, 0)
    with pytest.raises(ConfigError, match="of family t5"):
        resolve_task(tree_of(tmp_path, start) | {"init_from": str(tmp_path / "pretrained")}, "task")


ROWS_OF = {
    "classification": [{"text": "the ink fades", "label": "old"}, {"text": "a codex", "label": "new"}],
    "relations": [
        {"text": "the ink fades", "head": {"start": at, "end": at + 3}, "tail": {"start": 8, "end": 13}, "label": at}
        for at in (0, 4)
    ],
    "token_classification": [{"tokens": ["the", "ink"], "tags": ["O", "B-thing"]}],
    "question_answering": [
        {"context": "the ink fades", "question": "what?", "answers": [{"text": "ink", "start": 4}]},
    ],
}


@pytest.mark.parametrize("name", ROWS_OF)
def test_the_shipped_file_of_each_kind_is_a_run(tmp_path, start, name):
    tree = read_tree(REPOSITORY / f"configs/tasks/{name}.yaml")
    given = tree["stages"][0]["objective"]
    objective = given["name"] if isinstance(given, dict) else given
    for part in ("train", "validation"):
        lines = (json.dumps(row) + "\n" for row in ROWS_OF.get(name, ROWS_OF[objective]) * 4)
        (tmp_path / f"{part}.jsonl").write_text("".join(lines))
    tree["stages"][0]["data"] |= {part: str(tmp_path / f"{part}.jsonl") for part in ("train", "validation")}
    if "sequence_length" in tree["stages"][0]:
        tree["stages"][0]["sequence_length"] = 32  # the tiny start has no more positions
    run = resolve_task(tree | {"folder": str(tmp_path / "run"), "init_from": str(start / "hf")}, "shipped")
    stage = run.stages[0]
    assert stage.objective.name == objective
    assert stage.num_steps == tree["stages"][0]["duration"]["epochs"]
    assert run.model.task_head is not None
    assert run.model.task_head.num_labels == 2
    assert resolve(run, 1).world_size == 1
    if name == "classification":
        assert run.evaluation.every_steps == 500


def test_a_context_of_several_windows_is_several_rows(tmp_path, start):
    context = "the ink fades in the old codex. " * 6
    row = {"context": context, "question": "what?", "answers": [{"text": "ink", "start": 4}]}
    for part in ("train", "validation"):
        (tmp_path / f"{part}.jsonl").write_text((json.dumps(row) + "\n") * 2)
    tree = tree_of(tmp_path, start, {"name": "question_answering", "stride": 4}, sequence_length=24)
    stage = resolve_task(tree, "task").stages[0]
    assert stage.data.train is not None
    num_rows = TokenDataset(stage.data.train).index.num_documents
    assert num_rows > 2
    assert stage.num_steps == 3, "epochs count rows, of which a step takes all here"
    assert stage.global_batch_size == num_rows
    write_examples(tmp_path)
    other = resolve_task(tree_of(tmp_path, start, {"name": "classification", "no_answer": True}), "task")
    with pytest.raises(ConfigError, match=r"objective.no_answer = True with .* classification, which does not use it"):
        resolve(other, 1)


def test_a_head_of_another_size_or_task_is_refused(tmp_path, start):
    fine_tuned = tmp_path / "start"
    fine_tuned.mkdir()
    write_start(fine_tuned, task_head={"task": "classification", "num_labels": 3})
    write_examples(tmp_path)
    with pytest.raises(
        ConfigError, match=r"has a head for classification of 3 labels, and the task is classification of 2"
    ):
        resolve_task(tree_of(tmp_path, fine_tuned), "task")
    write_examples(tmp_path, labels=("a", "b", "c"))
    assert resolve_task(tree_of(tmp_path, fine_tuned), "task").model.task_head == TaskHead(
        task="classification", num_labels=3
    ), "the head of the start is trained further"
    write_examples(tmp_path)
    tree = tree_of(tmp_path, fine_tuned)
    begun = resolve_task(tree | {"init_from": {"path": tree["init_from"], "head": "new"}}, "task").model.task_head
    assert begun == TaskHead(task="classification", num_labels=2)


def test_a_pooling_is_of_the_file_or_of_the_head_of_the_start(tmp_path):
    fine_tuned, mean = tmp_path / "start", {"task_head": {"pooling": "mean"}}
    fine_tuned.mkdir()
    write_start(fine_tuned, "modernbert", task_head={"task": "classification", "num_labels": 2, "pooling": "mean"})
    write_examples(tmp_path)
    tree = tree_of(tmp_path, fine_tuned)
    head = resolve_task(dict(tree), "task").model.task_head
    assert head is not None
    assert head.pooling == "mean"
    new = {"init_from": {"path": tree["init_from"], "head": "new"}}
    given = ({}, mean, {"task_head": {"pooling": "token"}})
    begun = [resolve_task(tree | new | {"model": dict(one)}, "task").model.task_head for one in given]
    assert [one.pooling for one in begun if one is not None] == ["mean", "mean", "token"]
    with pytest.raises(ConfigError, match=r"2 labels with pooling mean, and the task is classification of 2 labels"):
        resolve_task(tree | {"model": {"task_head": {"pooling": "token"}}}, "task")
    with pytest.raises(ConfigError, match=r"model.task_head.pooling"):
        resolve_task(tree | {"model": {"task_head": {"pooling": "max"}}}, "task")


def test_a_pretrained_start_is_read_as_its_configuration_says(tmp_path):
    """ModernBERT's published one says so, and AutoModelForSequenceClassification makes its class with it."""
    folder = tmp_path / "start"
    folder.mkdir()
    write_start(folder, "modernbert")
    file = folder / "hf" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"classifier_pooling": "mean"}))
    write_examples(tmp_path)
    head = resolve_task(tree_of(tmp_path, folder), "task").model.task_head
    assert head is not None
    assert head.pooling == "mean"


@pytest.mark.parametrize(
    ("objective", "given"),
    [
        ("regression", {"num_labels": 2}),
        ("classification", {"task": "classification", "pooling": "mean"}),
        ("question_answering", {"pooling": "mean"}),
        ("answer", {"pooling": "token"}),
    ],
)
def test_what_the_objective_says_of_the_head_is_not_said_again(tmp_path, start, objective, given):
    write_examples(tmp_path)
    with pytest.raises(ConfigError, match=rf"model.task_head.\w+ with objective {objective}"):
        resolve_task(tree_of(tmp_path, start, objective) | {"model": {"task_head": given}}, "task")


def test_a_run_that_has_begun_keeps_its_lengths_and_its_pooling(tmp_path):
    folder = tmp_path / "start"
    folder.mkdir()
    write_start(folder, "modernbert", task_head={"task": "classification", "num_labels": 2, "pooling": "mean"})
    write_examples(tmp_path)
    first = resolve_task(tree_of(tmp_path, folder), "task")
    assert first.stages[0].data.row_lengths == (8, 16)
    save(first, 2, 0)
    save_run(first, first.folder)
    wider = resolve_task(tree_of(tmp_path, folder) | {"parallel": {"sequence": 16}}, "task")
    assert wider.stages[0].data.row_lengths == first.stages[0].data.row_lengths
    shutil.rmtree(folder / "hf")
    again = resolve_task(tree_of(tmp_path, folder), "task")
    assert again.model == first.model


def test_a_mean_is_for_encoders_that_transform_it(tmp_path, start):
    write_examples(tmp_path)
    run = resolve_task(tree_of(tmp_path, start) | {"model": {"task_head": {"pooling": "mean"}}}, "task")
    with pytest.raises(ConfigError, match=r"model.task_head.pooling = mean with task classification"):
        resolve(run, 1)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("length", [None, 8])
def test_virtual_tokens_that_leave_no_position_are_refused_before_examples_are_encoded(tmp_path, start, method, length):
    write_examples(tmp_path)
    given = {} if length is None else {"sequence_length": length}
    for number in (40, 45):  # of 40 positions
        tree = tree_of(tmp_path, start, **given) | {"adapter": {"method": method, "virtual_tokens": number}}
        with pytest.raises(ConfigError, match=rf"virtual_tokens = {number} leaves none of the model's 40 positions"):
            resolve_task(tree, "task")
