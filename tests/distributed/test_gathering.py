"""ZeRO-3 under a pipeline: the next layer's gather runs ahead of its use, and few whole weights are held at a time."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from engine.config.resolve import resolve
from tests.distributed.cases import GLOBAL_BATCH, Case, config_of, global_batch, stage_inputs
from tests.distributed.ranks import run_ranks

STEPS = 2
"""The order of modules is learnt in the first."""


class Events:
    """What happens to the weights of a stage in its last step, in order.

    ("gather", module) when the gather of its weights begins, ("use", module) when they are there and it may compute,
    ("done", module) when it has computed; each forward or backward.
    """

    def __init__(self, pipeline: Any) -> None:
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        from engine.parallel.zero.gathering import GATHER

        engine, self.absent = pipeline.engine._engine, ZeroParamStatus.NOT_AVAILABLE
        self.module: nn.Module = engine.module
        self.parameters: list[Any] = list(self.module.parameters())
        self.events: list[tuple[str, str]] = []
        self.peak = 0
        self.names = {module: name for name, module in self.module.named_modules()}
        self.owners = {id(p): module for module in self.names for p in module.parameters(recurse=False)}
        offload = engine.optimizer.parameter_offload
        coordinator = offload.param_coordinator
        real_gather, real_fetch = getattr(coordinator, GATHER), coordinator.fetch_sub_module

        def gather(parameters: Any, forward: bool) -> None:
            self.note("gather", self.owners[id(next(iter(parameters)))])
            real_gather(parameters, forward)

        def fetch(module: nn.Module, forward: bool) -> None:
            real_fetch(module, forward)
            self.note("use", module)
            self.peak = max(self.peak, self.held())

        def then_note(real: Any) -> Any:
            def done(module: nn.Module) -> None:
                self.note("done", module)
                real(module)

            return done

        setattr(coordinator, GATHER, gather)
        coordinator.fetch_sub_module = fetch
        offload.post_sub_module_forward_function = then_note(offload.post_sub_module_forward_function)
        offload.post_sub_module_backward_function = then_note(offload.post_sub_module_backward_function)

    def note(self, what: str, module: nn.Module) -> None:
        if any(True for _ in module.parameters(recurse=False)):
            self.events.append((what, self.names[module]))

    def held(self) -> int:
        """Elements of weights that are whole, or on their way."""
        return sum(p.ds_numel for p in self.parameters if p.ds_status != self.absent)


def watch(environment: Any, case: Case) -> dict[str, Any]:
    """Events of the last step, and elements of whole weights: at the peak, after the step, of modules, of the stage."""
    from engine.train.build import build_pipeline, join_groups, stage_spec

    config = config_of(case)
    groups = join_groups(config, resolve(config, environment.world_size), environment.global_rank)
    pipeline = build_pipeline(config, stage_spec(config, config.stages[0], groups), groups, torch.device("cpu"))
    seen = Events(pipeline)
    for step in range(STEPS):
        seen.events.clear()
        pipeline.train(stage_inputs(global_batch(step, case.attention), case, groups), torch.tensor(1.0))
    sizes = {
        name: sum(p.ds_numel for p in module.parameters(recurse=False))  # type: ignore[attr-defined]
        for module, name in seen.names.items()
    }
    return {
        "events": seen.events,
        "peak": seen.peak,
        "left": seen.held(),
        "largest": sum(sorted(sizes.values())[-2:]),
        "whole": sum(p.ds_numel for p in seen.parameters),
    }


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_two_layers_are_held_at_a_time_and_freed_after_use(schedule: str):
    for counted in run_ranks(2, watch, Case(model="llama", zero_stage=3, pipe=2, schedule=schedule)):
        assert 0 < counted["peak"] <= counted["largest"]
        assert counted["peak"] < counted["whole"] / 2
        assert counted["left"] == 0
        if schedule == "1f1b":
            check_ahead(counted["events"])


def check_ahead(events: list[tuple[str, str]]) -> None:
    """While a matrix computes, the gather of the next one has begun; but for the first matrix of every pass."""
    matrices = [
        (index, name)
        for index, (what, name) in enumerate(events)
        if what == "use" and name.endswith(("proj", "embed_tokens", "lm_head"))
    ]
    late = 0
    for (now, name), (later, following) in itertools.pairwise(matrices):
        gathered = max(index for index in range(later) if events[index] == ("gather", following))
        done = next((index for index in range(now, later) if events[index] == ("done", name)), now)
        late += not gathered < done
    assert late == 2 * GLOBAL_BATCH - 1, (
        "a pass forward and one backward per micro-batch; the very first is not counted"
    )
    assert len(matrices) >= 4 * late


def test_weights_gathered_once_stay_for_the_step():
    for counted in run_ranks(2, watch, Case(model="llama", zero_stage=3, pipe=2, gather="step")):
        gathered = [name for what, name in counted["events"] if what == "gather"]
        assert sorted(gathered) == sorted(set(gathered)), "each module once"
        assert counted["peak"] == counted["whole"]
        assert counted["left"] == 0
