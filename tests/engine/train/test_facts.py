"""Which facts a rank compares with rank 0's."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config.rank_environment import RankEnvironment
from engine.config.resume import flatten
from engine.parallel.meeting import compare
from engine.train.facts import facts_of_start
from tests.distributed.runs import run_config, run_tree

CPU = torch.device("cpu")
PLACE = RankEnvironment(0, 2, job="13", step="0")


def of(environment: RankEnvironment = PLACE, folder: Path = Path("run"), **changes: Any) -> dict[str, Any]:
    return facts_of_start(run_config(run_tree(Path("corpus"), folder, **changes)), environment, CPU)


@pytest.mark.parametrize(
    ("field", "value", "name"),
    [("job", "14", "job"), ("step", "1", "step"), ("attempt", 1, "attempt"), ("world_size", 4, "world size")],
)
def test_the_start(field: str, value: object, name: str) -> None:
    assert [differs[0] for differs in compare(of(dataclasses.replace(PLACE, **{field: value})), of())] == [name]
    own = dataclasses.replace(PLACE, global_rank=1, local_rank=1, node_rank=1, local_world_size=2)
    assert compare(of(own), of()) == [], "what a rank has of its own"


def test_every_key_of_the_configuration_whatever_its_kind() -> None:
    kinds = flatten(run_config(run_tree(Path("corpus"), Path("run"))))
    assert {kind for kind, _ in kinds.values()} == {"meaning", "schedule", "execution"}
    assert kinds.keys() - {"folder"} <= of().keys()
    every: list[dict[str, Any]] = [
        {"seed": 6},
        {"optimizer": {"learning_rate": 0.02}},
        {"optimizer": {"clip_norm": 0.4}},
        {"optimizer": {"weight_decay": 0.3}},
        {"logging": {"plot": True}},
        {"checkpoint": {"every_steps": 4}},
    ]
    for changes in every:
        ((section, value),) = changes.items()
        key = section if not isinstance(value, dict) else f"{section}.{next(iter(value))}"
        assert [differs[0] for differs in compare(of(**changes), of())] == [key]


def test_the_folder_is_where_it_is_seen_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = of()
    monkeypatch.chdir(tmp_path)
    assert [differs[0] for differs in compare(of(), here)] == ["run folder"]
    assert compare(of(), of(folder=tmp_path / "run")) == []


def test_the_code_and_the_versions() -> None:
    assert {"version of torch", "version of deepspeed", "version of python", "hash of Palimpsest's code"} <= of().keys()
