"""docs/tasks.md: its task files and the pieces of them can start, and its rows of examples are read."""

import json
import re
from io import StringIO
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
from ruamel.yaml import YAML

from engine.config.load import merge
from engine.config.resolve import examine
from engine.config.schema.data import DataConfig
from engine.config.schema.run import RunConfig
from engine.config.schema.stage import RunStage
from engine.plan.frozen import check_patterns
from engine.tasks.resolve import resolve_task
from tests.distributed.runs import write_sentences
from tests.engine.tasks.answer_starts import write_folder
from tests.engine.tasks.starts import write_start
from tests.readme import text_of

BLOCKS: list[tuple[str, str]] = re.findall(r"^```(\w+)\n(.*?)^```", text_of("docs/tasks.md"), re.M | re.S)
TREES: list[dict[str, Any]] = [YAML(typ="safe").load(StringIO(text)) for kind, text in BLOCKS if kind == "yaml"]
WHOLE = [tree for tree in TREES if "stages" in tree]
PIECES = [tree for tree in TREES if "stages" not in tree]
ROWS = [json.loads(line) for kind, text in BLOCKS if kind == "json" for line in text.splitlines()]


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with a start `hf` each: a pretrained encoder, one that classifies, a decoder."""
    made = {name: tmp_path_factory.mktemp(name) for name in ("encoder", "classifier", "decoder")}
    write_start(made["encoder"])
    write_start(made["classifier"], task_head={"task": "classification", "num_labels": 2})
    write_sentences(made["decoder"], "bpe", 400, "causal")
    write_folder(made["decoder"] / "hf", "gpt2", made["decoder"] / "tokenizer", max_positions=96)
    return made


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write_rows(stage: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    for part in ("train", "validation"):
        path = Path(stage["data"][part])
        path.parent.mkdir(parents=True, exist_ok=True)
        # an id of its own for each question; of other rows nobody reads it
        path.write_text("".join(json.dumps(row | {"id": str(number)}) + "\n" for number, row in enumerate(rows * 40)))


def check(tree: dict[str, Any], start: Path, rows: list[dict[str, Any]]) -> RunConfig:
    """Assert that a task file can start where its files and its start are at the paths that it names."""
    [stage] = tree["stages"]
    write_rows(stage, rows)
    init_from = tree["init_from"]
    copytree(start / "hf", init_from["path"] if isinstance(init_from, dict) else init_from)
    for part in ("train", "validation"):
        copytree(start / part, Path("data/pretraining") / part)
    Path("translate-there-and-back.py").write_text("import sys\nsys.stdout.write(sys.stdin.read())\n")
    run = resolve_task({"folder": "runs/task"} | tree, "docs/tasks.md")
    assert [*examine(run, 1)[1], *check_patterns(run)] == []
    return run


def labelled() -> list[dict[str, Any]]:
    return [next(row for row in ROWS if row.keys() == {"text", "label"}), {"text": "dull", "label": "negative"}]


@pytest.mark.parametrize("number", range(len(WHOLE)))
def test_a_task_file_can_start(starts, number):
    is_answer = WHOLE[number]["stages"][0]["objective"] == "answer"
    rows = [row for row in ROWS if "prompt" in row] if is_answer else labelled()
    check(WHOLE[number], starts["decoder" if is_answer else "encoder"], rows)


def placed(piece: dict[str, Any]) -> dict[str, Any]:
    """Return the first task file with the keys of a piece of one, wherever they belong."""
    tree = merge({}, WHOLE[0])
    [stage] = tree["stages"]
    if piece.keys() <= RunConfig.model_fields.keys() | {"adapter"}:
        return tree | piece
    if piece.keys() <= RunStage.model_fields.keys():
        return tree | {"stages": [stage | piece]}
    assert piece.keys() <= DataConfig.model_fields.keys()
    return tree | {"stages": [stage | {"data": stage["data"] | piece}]}


@pytest.mark.parametrize("number", range(len(PIECES)))
def test_a_piece_of_a_task_file_can_start(starts, number):
    # distillation keeps the labels of a start that has them
    check(placed(PIECES[number]), starts["classifier" if "regularization" in PIECES[number] else "encoder"], labelled())


COLUMNS: dict[str, dict[str, Any]] = {
    "head": {"entities_of_relation": ["head", "tail"]},
    "messages": {"messages": "messages"},
}
OBJECTIVES = {
    "tokens": "token_classification",
    "entities": "token_classification",
    "context": "question_answering",
    "prompt": "answer",
    "messages": "answer",
}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(row))
def test_rows_are_read(starts, row):
    objective = next((OBJECTIVES[key] for key in row if key in OBJECTIVES), "classification")
    columns = next((COLUMNS[key] for key in row if key in COLUMNS), {})
    rows = [row, row | {"label": "other"}] if "label" in row else [row]
    data = {"train": "train.jsonl", "validation": "validation.jsonl", "columns": columns}
    tree = {"init_from": "exported/start", "stages": [{"objective": objective, "data": data}]}
    run = check(tree, starts["decoder" if objective == "answer" else "encoder"], rows)
    assert run.stages[0].objective.name == objective
