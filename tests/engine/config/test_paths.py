"""`~` is the home folder in every key that is a path, and in every command's path arguments."""

from __future__ import annotations

import json
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from pydantic import BaseModel

from engine import cli
from engine.checkpoint.storage import location_of
from engine.config import paths
from engine.config.load import load_run
from engine.config.schema.run import RunConfig
from engine.corpus.sources.chunks import split_domain
from engine.corpus.sources.hub import split_hub_name
from engine.errors import ConfigError

OTHERS = {
    "init_from",
    "init_from.path",
    "stages.*.data.train",
    "stages.*.data.sources.*.path",
    "stages.*.data.validation",
    "stages.*.data.validation.*",
    "stages.*.replay.source",
    "stages.*.replay.validation",
    "stages.*.replay.validation.*",
}
"""Keys of paths that may be URLs, and so are text to the schema."""


@pytest.fixture(autouse=True)
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def paths_in(annotation: Any, key: str) -> Iterator[str]:
    """The keys below `key` whose values are paths to the schema."""
    if annotation is Path:
        yield key
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        for name, field in annotation.model_fields.items():
            yield from paths_in(field.annotation, f"{key}.{name}".lstrip("."))
    else:
        listed = typing.get_origin(annotation) in (tuple, list, dict)
        for inner in typing.get_args(annotation):
            yield from paths_in(inner, f"{key}.*" if listed else key)


def test_every_path_of_the_schema_is_among_the_keys() -> None:
    assert set(paths_in(RunConfig, "")) == set(paths.KEYS) - OTHERS


def test_every_key(at_home: Path) -> None:
    data = {"train": "~/a", "sources": [{"path": "~/b"}], "validation": {"x": "~/c"}, "cache": {"folder": "~"}}
    tree = {
        "folder": "~/d",
        "tokenizer": "e/~",
        "name": "~/f",
        "stages": [{"data": data}, {"data": {"validation": "~/g"}}],
    }
    tree |= {"checkpoint": {"memory": {"folder": "~/h"}}, "model": None}
    paths.expand_keys(tree)
    assert json.dumps(tree).count(str(at_home)) == 7
    assert data == {
        "train": f"{at_home}/a",
        "sources": [{"path": f"{at_home}/b"}],
        "validation": {"x": f"{at_home}/c"},
        "cache": {"folder": str(at_home)},
    }
    assert (tree["tokenizer"], tree["name"]) == ("e/~", "~/f")


def test_a_file_its_includes_and_overrides(at_home: Path, tmp_path: Path) -> None:
    below = {"model": {"vocab_size": 500, "num_layers": 4, "hidden_size": 64, "num_heads": 4}}
    (at_home / "below.yaml").write_text(json.dumps(below))
    stage = {"data": {"train": "~/train"}, "sequence_length": 64, "global_batch_size": 24, "duration": {"steps": 10}}
    own = {"include": "~/below.yaml", "folder": "~/one", "tokenizer": "~/tokenizer", "stages": [stage]}
    (tmp_path / "run.yaml").write_text(json.dumps(own))
    run = load_run(tmp_path / "run.yaml", ["folder=~/two"])
    assert (run.folder, run.tokenizer) == (at_home / "two", at_home / "tokenizer")
    assert run.stages[0].data.train == f"{at_home}/train"


def test_a_user_who_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        paths.expand_keys({"stages": [{"data": {"train": "~no-such-user/x"}}]})
    assert caught.value.wrong == "stages.0.data.train = ~no-such-user/x: there is no home folder ~no-such-user"
    assert "./~no-such-user/x" in caught.value.remedy


def test_path_arguments_of_commands(at_home: Path) -> None:
    found: list[Any] = []

    def command(
        source: Annotated[Path, typer.Argument()],
        output: Annotated[Path, typer.Option()],
        more: Annotated[list[Path] | None, typer.Option()] = None,
        prompt: Annotated[str, typer.Option()] = "",
    ) -> None:
        """Do something."""
        found.append((source, output, more, prompt))

    app = typer.Typer()
    app.command("sub")(command)
    app.command("other")(lambda: None)
    given = ["~/a", "--output=~/b", "--more=~", "--prompt=~/text"]
    assert cli.run(command, "x", given) == 0
    assert cli.run(app, "x", ["sub", *given]) == 0
    assert cli.run(app, "x", ["sub", *given]) == 0
    assert found == [(at_home / "a", at_home / "b", [at_home], "~/text")] * 3


def test_a_command_names_the_home_folder_and_not_a_tilde(at_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect-data", "~/nothing-here"]) != 0
    assert f"{at_home}/nothing-here" in capsys.readouterr().err


def test_paths_that_may_be_something_else(at_home: Path) -> None:
    assert location_of("~/run") == at_home / "run"
    assert split_domain("~/text/*.txt") == ("", f"{at_home}/text/*.txt")
    assert split_domain("web=~/text") == ("web", f"{at_home}/text")
    assert split_domain("a/~b=c") == ("", "a/~b=c")
    assert split_hub_name("hf:~/set@train")[0] == f"{at_home}/set"


@pytest.mark.parametrize("key", paths.ON_DISK)
def test_a_url_is_refused_where_a_path_has_to_lie_on_a_disk(key):
    *above, last = key.split(".")
    tree: Any = {last: "s3://bucket/run"}
    for name in reversed(above):
        tree = [tree] if name == "*" else {name: tree}
    with pytest.raises(ConfigError, match=rf"{last} = s3://bucket/run is a URL") as caught:
        paths.expand_keys(tree)
    assert "./s3:" in caught.value.remedy
    paths.expand_keys({"stages": [{"data": {"train": "s3://bucket/train", "validation": {"a": "gs://b"}}}]})
    assert paths.with_homes(lambda output: output)(output=Path("C:")) == Path("C:")
    with pytest.raises(ConfigError, match="output = s3:/bucket/out is a URL"):
        paths.with_homes(lambda output: output)(output=Path("s3://bucket/out"))
