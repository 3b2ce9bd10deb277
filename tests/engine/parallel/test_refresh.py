"""Frozen weights are gathered after something has written them, and not after every change of the trained ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.config.resolve import Layout
from engine.config.schema.regularization import FIRST_WEIGHTS
from engine.parallel.sharding import ParameterSpec
from engine.parallel.state import ParameterShard
from engine.parallel.zero.held_state import HeldState
from engine.parallel.zero.other_weights import step_back, weights_from
from engine.train.mixout import mixed_weights
from tests.engine.checkpoint.worlds import fake_groups


class Held:
    """Parameters of one kind, which count how often they were made working weights."""

    def __init__(self, name: str, moments: tuple[str, ...] = ()) -> None:
        held = {moment: torch.ones(3) for moment in moments}
        self.shard, self.refreshed = ParameterShard(ParameterSpec(name, (3,)), 0, torch.zeros(3), held), 0

    def parameter_shards(self) -> list[ParameterShard]:
        return [self.shard]

    def refresh(self) -> None:
        self.refreshed += 1


def exchange(engine: Any) -> None:
    with weights_from(engine, FIRST_WEIGHTS):
        pass


def mix(engine: Any) -> None:
    with mixed_weights(engine, engine.groups.tensor, 0.5, 1, 2):
        pass


@pytest.mark.parametrize(
    ("change", "trained_times", "frozen_times"),
    [
        (lambda engine: engine.refresh(), 1, 1),
        (lambda engine: engine.fill(lambda spec, first, end: torch.zeros(end - first)), 1, 1),
        (exchange, 2, 0),
        (mix, 2, 0),
        (lambda engine: step_back(engine, FIRST_WEIGHTS, 0.5), 1, 0),
    ],
    ids=["load", "fill", "exchange", "mixout", "reptile"],
)
def test_frozen_weights_are_gathered_only_after_they_were_written(change, trained_times, frozen_times):
    trained, frozen = Held("layers.0.adapters.weight", (FIRST_WEIGHTS,)), Held("layers.0.weight")
    parts: Any = [trained, frozen]
    engine = HeldState(fake_groups(Layout(1, 1, 1, 1), 0), 1, [], {}, *parts, None)  # type: ignore[arg-type]
    change(engine)
    assert (trained.refreshed, frozen.refreshed) == (trained_times, frozen_times)
