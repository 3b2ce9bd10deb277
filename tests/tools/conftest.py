"""Fixtures of tests of commands."""

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
