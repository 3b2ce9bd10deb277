"""Steps of a rank that are discarded, and what they leave behind: nothing."""

from __future__ import annotations

import torch

from engine.config.resolve import resolve
from tests.distributed.cases import LEARNING_RATE, Case, config_of, global_batch, stage_inputs


def discarded_steps(environment, case: Case) -> None:
    """Step 0; steps 1 (finite) and 2 (not) discarded; step 3. And step 3 again from the state after step 0."""
    from engine.train.build import build_pipeline, join_groups, stage_spec

    config = config_of(case)
    groups = join_groups(config, resolve(config, environment.world_size), environment.global_rank)
    pipeline = build_pipeline(config, stage_spec(config, config.stages[0], groups), groups, torch.device("cpu"))
    engine = pipeline.engine

    def step(number: int, accept=lambda norm: True, poison: float = 1.0) -> None:
        batch = global_batch(number, case.attention)
        batch["weights_BT"][-1, 0] *= poison
        pipeline.train(stage_inputs(batch, case, groups), torch.tensor([0.1]))
        engine.step(LEARNING_RATE, accept)

    def state() -> list[torch.Tensor]:
        return [t.clone() for shard in engine.parameter_shards() for t in (shard.weight, *shard.moments.values())]

    step(0)
    before = state()
    step(1, accept=lambda norm: False)
    step(2, accept=lambda norm: norm == norm, poison=torch.nan)
    assert all(map(torch.equal, before, state())), "a discarded step changed weights or moments"
    step(3)
    found = state()
    assert not all(map(torch.equal, before, found))
    held = [t for shard in engine.parameter_shards() for t in (shard.weight, *shard.moments.values())]
    for tensor, value in zip(held, before, strict=True):
        tensor.copy_(value)
    engine.refresh()
    engine.set_updates(1)
    step(3)
    assert all(map(torch.equal, found, state())), "a discarded step left something behind"
