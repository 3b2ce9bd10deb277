"""The shipped task files with adapters and switches are runs that can start."""

from pathlib import Path

import pytest

from engine.config.load import read_tree
from engine.config.resolve import examine
from engine.plan.frozen import check_patterns
from engine.tasks.resolve import resolve_task
from tests.engine.tasks.starts import write_examples, write_start

FOLDER = Path(__file__).parents[3] / "configs/tasks"
ADAPTERS = ("lora", "adalora", "ia3", "bottleneck", "prompt", "prefix")


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return write_start(tmp_path_factory.mktemp("start"))


@pytest.mark.parametrize("name", [*ADAPTERS, "few-labels", "unfreezing", "l2-sp", "replay"])
def test_a_shipped_task_file_can_start(tmp_path, start, name):
    write_examples(tmp_path, count=40)
    (tmp_path / "synonyms.tsv").write_text("ink\tdye\n")
    tree = read_tree(FOLDER / f"{name}.yaml")
    data = tree["stages"][0]["data"]
    data |= {part: str(tmp_path / f"{part}.jsonl") for part in ("train", "validation")}
    if "augment" in data:
        data["augment"]["synonyms"] = str(tmp_path / "synonyms.tsv")
    if "replay" in tree["stages"][0]:
        tree["stages"][0]["replay"] |= {"source": str(start / "train"), "validation": str(start / "validation")}
    tree |= {"folder": str(tmp_path / "run"), "init_from": str(start / "hf"), "precision": {"dtype": "fp32"}}
    run = resolve_task(tree, "shipped")
    _, problems = examine(run, 1)
    assert [*problems, *check_patterns(run)] == []
    assert (run.model.adapter is not None) == (name in ADAPTERS)
