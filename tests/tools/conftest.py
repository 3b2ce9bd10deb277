"""Fixtures of tests of commands."""

import os
from pathlib import Path

import pytest


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with checkpoints of steps 10 and 20."""
    from tests.engine.checkpoint.worlds import World, layout_of, random_state, small_model, some_state

    world = World(layout_of(2, 2, 1), 3, small_model())
    for step in (10, 20):
        world.fill(random_state(world.specs, step))
        world.save(tmp_path / "checkpoints", some_state(step))
    return tmp_path


@pytest.fixture
def bare_node(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No launcher's variables, no GPU, and run folders under `tmp_path`."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "PMI", "PALIMPSEST_", "TORCHELASTIC_")) or name in (
            "RANK",
            "WORLD_SIZE",
            "LOCAL_RANK",
            "TORCH_EXTENSIONS_DIR",
        ):
            monkeypatch.delenv(name)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.chdir(tmp_path)
