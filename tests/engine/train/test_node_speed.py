"""Slow hosts are found by their slowest rank, told once they stay slow, and written as a list to exclude."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.train import node_speed
from engine.train.node_speed import FILE, NodeSpeed, probe_seconds, slow_hosts


@pytest.mark.parametrize(
    ("seconds", "slow"),
    [
        ([("a", 1.0), ("b", 1.0)], {}),
        ([("a", 1.0), ("b", 2.0)], {"b": 2.0}),
        ([("a", 1.0), ("a", 3.0), ("b", 1.0), ("b", 1.0)], {"a": 3.0}),
        ([("a", 1.0), ("b", 1.4), ("c", 1.2)], {}),
        ([("a", 2.0), ("b", 2.0), ("c", 2.0)], {}),
    ],
)
def test_a_host_is_as_slow_as_its_slowest_rank(seconds: list[tuple[str, float]], slow: dict[str, float]) -> None:
    assert slow_hosts(seconds) == slow


def run_at(step: int, folder: Path, size: int = 2) -> Any:
    groups = SimpleNamespace(world=SimpleNamespace(size=size))
    pipeline = SimpleNamespace(engine=SimpleNamespace(device=torch.device("cpu")))
    config = SimpleNamespace(folder=folder)
    return SimpleNamespace(
        groups=groups, pipeline=pipeline, config=config, state=SimpleNamespace(step=step), is_main_rank=True
    )


def test_a_host_that_stays_slow_is_told_and_noted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Host b is slow at steps 20, 40, 50 and 60: twice in a row only then, and once more at 70."""
    slow_at = {20, 40, 50, 60}
    hook, told = NodeSpeed(10, lambda device: 0.0), []

    def gather(value: Any, group: Any) -> list[Any]:
        return [("a", 1.0), ("b", 2.5 if step in slow_at else 1.0)]

    monkeypatch.setattr(node_speed, "gather_objects", gather)
    for step in range(1, 75):
        caplog.clear()
        assert hook.between_steps(run_at(step, tmp_path)) is False
        told += [step] if "node b computes 2.5 times slower" in caplog.text else []
    assert told == [50]
    (line,) = (tmp_path / FILE).read_text().splitlines()
    assert line.startswith("b  # 2.5 times slower at step 50")


def test_a_run_of_one_rank_measures_nothing(tmp_path: Path) -> None:
    hook = NodeSpeed(1, lambda device: pytest.fail("measured"))
    assert hook.between_steps(run_at(1, tmp_path, size=1)) is False
    assert NodeSpeed(None).between_steps(run_at(1, tmp_path)) is False


def test_the_probe_takes_time() -> None:
    assert probe_seconds(torch.device("cpu")) > 0
