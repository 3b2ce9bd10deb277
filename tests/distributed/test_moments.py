"""A moment that is added to an engine is saved by one ZeRO stage and layout, and loaded into another one's."""

from __future__ import annotations

from pathlib import Path

import torch

from engine.checkpoint.folder import step_path
from engine.checkpoint.manifest import CheckpointState
from engine.config.rank_environment import RankEnvironment
from engine.config.resolve import resolve
from tests.distributed.cases import LEARNING_RATE, Case, config_of, global_batch, stage_inputs
from tests.distributed.ranks import run_ranks


def build(environment: RankEnvironment, case: Case):
    from engine.train.build import build_pipeline, join_groups, stage_spec

    config = config_of(case)
    groups = join_groups(config, resolve(config, environment.world_size), environment.global_rank)
    return groups, build_pipeline(config, stage_spec(config, config.stages[0], groups), groups, torch.device("cpu"))


def save_before_and_after(environment: RankEnvironment, case: Case, folder: Path) -> str:
    """Step 1 is saved without the moment, step 2 with half of each weight in it."""
    from engine.checkpoint.fingerprint import fingerprint
    from engine.checkpoint.saver import Saver

    groups, pipeline = build(environment, case)
    engine, saver = pipeline.engine, Saver(folder, groups)
    for step in (1, 2):
        if step == 2:
            engine.add_moment("ema", begins_at_zero=True)
        for shard in engine.parameter_shards():
            if step == 2:
                shard.moments["ema"].copy_(shard.weight * 0.5)
        state = CheckpointState(step, 0, case.zero_stage, "meaning")
        saver.save(engine.parameter_shards(), engine.placements(), state, "job", 0)
    return fingerprint(engine.parameter_shards(), engine.placements(), groups)


def load_both(environment: RankEnvironment, case: Case, folder: Path) -> str:
    from engine.checkpoint.fingerprint import fingerprint
    from engine.checkpoint.load import load

    groups, pipeline = build(environment, case)
    engine = pipeline.engine
    engine.add_moment("ema", begins_at_zero=True)
    for shard in engine.parameter_shards():
        shard.moments["ema"].fill_(7)
    for step, factor in ((1, 0.0), (2, 0.5)):
        path = step_path(folder, step)
        load(path, groups, engine.parameter_shards(), engine.placements(), zero_moments=engine.zero_moments)
        for shard in engine.parameter_shards():
            assert torch.equal(shard.moments["ema"], shard.weight * factor), shard.spec.name
    found = fingerprint(engine.parameter_shards(), engine.placements(), groups)
    engine.refresh()
    before = [shard.moments["ema"].clone() for shard in engine.parameter_shards()]
    pipeline.train(stage_inputs(global_batch(0, case.attention), case, groups), torch.tensor([0.1]))
    engine.step(LEARNING_RATE)  # the optimizer leaves alone what is not its own
    assert all(torch.equal(p.moments["ema"], old) for p, old in zip(engine.parameter_shards(), before, strict=True))
    return found


def test_it_goes_from_zero1_over_data_ranks_into_zero3_over_a_pipeline(tmp_path):
    folder = tmp_path / "checkpoints"
    saved = run_ranks(2, save_before_and_after, Case(zero_stage=1, data=2), folder)
    assert run_ranks(2, load_both, Case(zero_stage=3, pipe=2), folder) == saved
