"""docs/checkpoint-format.md is true: its recipe, run as it stands there, reads every parameter."""

import re
from pathlib import Path

import numpy as np
import pytest

from tests.engine.checkpoint.worlds import World, layout_of, random_state, small_model, some_state

DOCUMENT = Path(__file__).parents[3] / "docs" / "checkpoint-format.md"


@pytest.mark.parametrize(("layout", "zero_stage"), [((1, 1, 1), 0), ((2, 3, 2), 1), ((2, 12, 2), 3)])
def test_a_stranger_reads_a_checkpoint_with_safetensors_and_json_alone(tmp_path, monkeypatch, layout, zero_stage):
    world = World(layout_of(*layout), zero_stage, small_model(real_rows=7))
    whole = random_state(world.specs, 0)
    world.fill(whole)
    world.save(tmp_path / "checkpoints", some_state(123))
    monkeypatch.chdir(tmp_path)
    (recipe,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    example = "layers.0.attention.out_proj.weight"
    assert recipe.count(example) == 1
    assert "palimpsest" not in recipe
    for spec in world.specs:
        result: dict = {}
        exec(recipe.replace(example, spec.name), result)
        assert np.array_equal(result["whole"], whole[f"model.{spec.name}"]), spec.name
