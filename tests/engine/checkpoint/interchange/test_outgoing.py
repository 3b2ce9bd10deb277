"""Memory that writing the formats of training libraries takes: one state of one parameter, whatever the format."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from engine.checkpoint.interchange.initial import own_weights
from engine.checkpoint.interchange.sinks.dcp import write_dcp
from engine.checkpoint.interchange.sinks.deepspeed import write_deepspeed
from engine.checkpoint.interchange.sinks.outgoing import Outgoing
from engine.checkpoint.interchange.sinks.universal import write_universal
from engine.parallel.sharding import ParameterSpec
from tests.engine.checkpoint.memory import Alive
from tests.engine.checkpoint.worlds import World, layout_of, random_state, some_state
from tests.memory import traced_peak


@pytest.mark.parametrize("write", [write_universal, write_dcp, write_deepspeed])
def test_no_more_than_one_state_of_a_parameter_is_in_memory(tmp_path, write: Any) -> None:
    specs = [ParameterSpec(f"layers.{number}.ffn.up_proj.weight", (512, 512)) for number in range(8)]
    world = World(layout_of(1, 2, 1), 3, specs)
    world.fill(random_state(specs, 3))
    opened = own_weights(world.save(tmp_path / "checkpoints", some_state(5)))
    outgoing = Outgoing(opened, opened.own_map, with_moments=True)
    with Alive():  # what Python and torch import for it is not counted
        write(outgoing, tmp_path / "warm")
    largest, numbers = 512 * 512 * 4, itertools.count()

    def once() -> None:
        alive = Alive()
        with alive:
            write(outgoing, tmp_path / f"out-{next(numbers)}")
        # a moment is read beside the weight of the same rows, of which a checkpoint of ours gives 16 MiB at a time
        assert largest <= alive.peak <= 2.01 * largest

    assert traced_peak(once, at_most=largest) < largest  # headers and manifests
