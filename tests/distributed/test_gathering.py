"""ZeRO-3 under a pipeline holds few whole weights at a time, with several micro-batches in flight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from engine.config.resolve import resolve
from tests.distributed.cases import GLOBAL_BATCH, Case, config_of, global_batch
from tests.distributed.ranks import run_ranks


def count_gathered(place, case: Case) -> dict[str, int]:
    """Elements of whole weights: the most at any module's turn, those left after a backward, the largest module's."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    from engine.train.build import build_pipeline, join_groups

    config = config_of(case)
    groups = join_groups(config, resolve(config, place.world_size), place.global_rank)
    pipeline = build_pipeline(config, config.stages[0], groups, torch.device("cpu"))
    engine: Any = pipeline.engine
    module: nn.Module = engine._engine.module
    parameters = list(module.parameters())

    def gathered() -> int:
        return sum(p.ds_numel for p in parameters if p.ds_status == ZeroParamStatus.AVAILABLE)  # type: ignore[attr-defined]

    peak, left = 0, 0

    coordinator = engine._engine.optimizer.parameter_offload.param_coordinator
    real_fetch, real_backward = coordinator.fetch_sub_module, engine.backward

    def fetch(*arguments, **keywords) -> None:
        nonlocal peak
        real_fetch(*arguments, **keywords)
        peak = max(peak, gathered())

    def backward(*arguments) -> None:
        nonlocal left
        real_backward(*arguments)
        left = max(left, gathered())

    coordinator.fetch_sub_module, engine.backward = fetch, backward
    owners = [owner for owner in module.modules() if any(True for _ in owner.parameters(recurse=False))]

    batch = global_batch(0, case.attention)
    names = ({"tokens_BT", "segments_BT"} if groups.is_first_stage else set()) | (
        {"targets_BT", "weights_BT"} if groups.is_last_stage else set()
    )
    rows = [
        {name: tensor[row : row + 1] for name, tensor in batch.items() if name in names} for row in range(GLOBAL_BATCH)
    ]
    pipeline.train(rows, torch.tensor(1.0))
    largest = max(sum(p.ds_numel for p in owner.parameters(recurse=False)) for owner in owners)  # type: ignore[attr-defined]
    return {"peak": peak, "left": left, "largest": largest, "whole": sum(p.ds_numel for p in parameters)}  # type: ignore[attr-defined]


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_weights_are_freed_after_each_use(schedule):
    case = Case(model="llama", zero_stage=3, pipe=2, schedule=schedule)
    for counted in run_ranks(2, count_gathered, case):
        assert 0 < counted["peak"] <= counted["largest"]
        assert counted["peak"] < counted["whole"] / 2
        assert counted["left"] == 0
