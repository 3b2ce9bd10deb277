"""`palimpsest init` writes run files that resolve and plan, by options or by questions, and replaces nothing."""

import json
from pathlib import Path

import pytest

from engine.cli import main
from engine.config.load import load_run
from engine.config.resolve import check, resolve
from tests.engine.data.corpus import made_up_documents, write_shards
from tools.init import SIZES


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_shards(tmp_path / "data/train", made_up_documents(40))
    write_shards(tmp_path / "data/validation", made_up_documents(4))
    recipe = {"recipe": {"tokenizer": str(tmp_path / "tokenizer")}}
    (tmp_path / "data/prepare.json").write_text(json.dumps(recipe))
    return tmp_path / "data"


def init(data: Path, output: Path, family: str = "gpt", size: str = "tiny", gpus: int = 1) -> int:
    options = ["--family", family, "--size", size, "--data", str(data), "--gpus", str(gpus), "--output", str(output)]
    return main(["init", *options])


@pytest.mark.parametrize(("family", "size"), [(family, size) for family in SIZES for size in SIZES[family]])
def test_every_size_resolves_on_its_gpus(data: Path, tmp_path: Path, family: str, size: str) -> None:
    for gpus in (1, 6):
        path = tmp_path / f"{gpus}.yaml"
        assert init(data, path, family, size, gpus) == 0
        run = load_run(path)
        assert not check(run)
        resolve(run, gpus)
        assert run.model.family == family
        assert run.tokenizer == tmp_path / "tokenizer"
        lines = path.read_text().splitlines()
        assert sum("#" in line for line in lines) > len(lines) / 3, "most groups of keys say why"


def test_the_file_plans(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert init(data, tmp_path / "run.yaml", gpus=2) == 0
    assert "is written" in capsys.readouterr().out
    assert main(["plan", str(tmp_path / "run.yaml"), "--world", "2", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"]
    assert plan["inputs"]["wrong"] == []


def test_domains_become_a_mixture(tmp_path: Path) -> None:
    for domain in ("en", "zh"):
        write_shards(tmp_path / "data/train" / domain, made_up_documents(20))
    assert init(tmp_path / "data", tmp_path / "run.yaml") == 0
    stage = load_run(tmp_path / "run.yaml").stages[0]
    assert [source.name for source in stage.data.sources] == ["en", "zh"]
    assert stage.data.validation is None


def test_a_file_that_exists_is_kept(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("mine")
    assert init(data, path) == 2
    assert path.read_text() == "mine"
    assert "exists\n  allowed: a new file" in capsys.readouterr().err


def test_a_folder_without_shards_and_a_size_of_another_family_are_refused(data: Path, tmp_path: Path, capsys) -> None:
    assert init(tmp_path / "nothing", tmp_path / "run.yaml") != 0
    assert "has no token shards in train/" in capsys.readouterr().err
    assert init(data, tmp_path / "run.yaml", "bert", "124m") == 2
    assert "--size 124m is no size of family bert\n  allowed: tiny, base, large" in capsys.readouterr().err
    assert not (tmp_path / "run.yaml").exists()


def test_what_is_missing_is_asked_for_on_a_terminal_alone(data: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    arguments = ["init", "--data", str(data), "--output", str(tmp_path / "run.yaml")]
    monkeypatch.setattr("sys.stdin.isatty", lambda: False)
    assert main(arguments) == 2
    assert "--family is missing" in capsys.readouterr().err
    answers = iter(["t5", "tiny", "2"])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("typer.prompt", lambda question, **how: next(answers))
    assert main(arguments) == 0
    assert load_run(tmp_path / "run.yaml").model.family == "t5"
