"""The schema that editors take knows every key of the shipped files, and no other, and explains each."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from engine.cli import main
from engine.config.json_schema import run_schema

CONFIGS = Path(__file__).parents[3] / "configs"
SHIPPED = sorted(path for path in CONFIGS.glob("*/*.yaml") if path.parent.name != "sites")
"""Run files and their parts; site profiles have a schema of their own."""
RIDDLE = re.compile(r"^(What|Whether|Which|Where|How|Who|Of|By|From|The same|As|In which|For whom|With which)\b")


def problems(tree: Any) -> list[str]:
    jsonschema = pytest.importorskip("jsonschema")
    return [error.message for error in jsonschema.Draft202012Validator(run_schema()).iter_errors(tree)]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_shipped_files_fit(path: Path) -> None:
    assert problems(YAML(typ="safe", pure=True).load(path)) == []


@pytest.mark.parametrize(
    "tree",
    [
        {"optimizer": {"learning_rat": 1}},
        {"stages": [{"data": {"tarin": "x"}}]},
        {"model": {"family": "gpt", "token_types": 2}},
        {"model": {"family": "brt"}},
        {"stages": [{"objective": "clm"}]},
        {"parallel": {"zero_stage": 4}},
        {"zzz": 1},
    ],
)
def test_what_load_refuses_does_not_fit(tree: Any) -> None:
    assert problems(tree)


def test_every_key_has_a_sentence_of_its_own() -> None:
    """A full sentence or noun phrase that ends with a full stop and does not open as a riddle."""
    schema, wrong = run_schema(), []
    for name, section in {"RunConfig": schema, **schema["$defs"]}.items():
        parts = [section, *section.get("anyOf", [])]
        for key, value in {key: value for part in parts for key, value in part.get("properties", {}).items()}.items():
            text = value.get("description", "")
            if len(text.split()) < 2 or not text.endswith(".") or RIDDLE.match(text):
                wrong.append(f"{name}.{key}: {text!r}")
    assert wrong == []


def test_the_command_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == run_schema()
