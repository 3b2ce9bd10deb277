"""Each invariant holds in a real layout, and fires on every rank when it is broken on purpose on one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from engine.config.resolve import resolve
from engine.parallel.pipeline import Pipeline
from tests.distributed.cases import LEARNING_RATE, Case, config_of, global_batch, stage_inputs
from tests.distributed.ranks import run_ranks

Break = Callable[[Pipeline], torch.Tensor]


def master(name: str) -> Break:
    return lambda pipeline: next(
        shard.weight for shard in pipeline.engine.parameter_shards() if shard.spec.name == name
    )


def moment(name: str) -> Break:
    return lambda pipeline: next(
        p.moments["exp_avg"] for p in pipeline.engine.parameter_shards() if p.spec.name == name
    )


def working(name: str) -> Break:
    return lambda pipeline: next(weight for spec, weight in pipeline.engine.working_weights() if spec.name == name)


def gradient(pipeline: Pipeline) -> torch.Tensor:
    """A gradient that stays behind on one parameter."""
    parameter = next(iter(pipeline.engine._named[0]))[1]
    parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def reduced_gradient(pipeline: Pipeline) -> torch.Tensor:
    """A reduced gradient that stays behind in DeepSpeed's optimizer."""
    held: Any = pipeline.engine._engine.optimizer.averaged_gradients
    held[0] = [torch.zeros(1)]
    return held[0][0]


CASES = {
    "data-zero0-weights": (
        Case(data=2),
        master("final_norm.weight"),
        "final_norm.weight (master weights)",
        "data ranks",
    ),
    "data-zero0-moments": (Case(data=2), moment("final_norm.bias"), "final_norm.bias (exp_avg)", "data ranks"),
    "data-zero2-working": (
        Case(zero_stage=2, data=2),
        working("embed_tokens.weight"),
        "embed_tokens.weight (working weights)",
        "data ranks",
    ),
    "tensor": (
        Case(zero_stage=1, tensor=2),
        master("final_norm.weight"),
        "final_norm.weight (master weights)",
        "tensor ranks",
    ),
    "tied": (
        Case(zero_stage=3, pipe=2),
        master("embed_tokens.weight"),
        "embed_tokens.weight (master weights)",
        "the stages of a tie",
    ),
}
UNCLEARED = {
    "zero0": (Case(data=2), gradient),
    "zero1": (Case(zero_stage=1, data=2), gradient),
    "zero2-reduced": (Case(zero_stage=2, data=2), reduced_gradient),
    "zero3-reduced": (Case(zero_stage=3, data=2), reduced_gradient),
}


def broken(environment, case: Case, name: str, table: str) -> str:
    """One step, a check that passes, and what the check says when rank 1 has broken something."""
    from engine.train.build import build_pipeline, join_groups, stage_spec
    from engine.train.checks import InvariantBroken, check_invariants

    config = config_of(case)
    groups = join_groups(config, resolve(config, environment.world_size), environment.global_rank)
    pipeline = build_pipeline(config, stage_spec(config, config.stages[0], groups), groups, torch.device("cpu"))
    batch = global_batch(0, case.attention)
    pipeline.train(stage_inputs(batch, case, groups), torch.tensor([0.1]))
    pipeline.engine.step(LEARNING_RATE)
    check_invariants(pipeline.engine, groups)
    if environment.global_rank == 1:
        # kept in a table of this module: what is broken is a function, which does not travel to a rank
        tensor = (CASES if table == "CASES" else UNCLEARED)[name][1](pipeline)
        tensor.view(-1)[0] += 1e-3
    with pytest.raises(InvariantBroken) as raised:
        check_invariants(pipeline.engine, groups)
    return raised.value.wrong


@pytest.mark.parametrize("name", CASES)
def test_copies_that_differ_are_named_with_their_ranks(name):
    case, _, what, relation = CASES[name]
    first, second = run_ranks(2, broken, case, name, "CASES")
    assert first == second
    lines = first.splitlines()[1:]
    assert [line.strip().split(": ")[0] for line in lines] == [f"{what} differs between {relation}"]
    assert "[0] hold" in lines[0]
    assert "[1] hold" in lines[0]


@pytest.mark.parametrize("name", UNCLEARED)
def test_a_gradient_that_outlives_its_step_is_named(name):
    first, second = run_ranks(2, broken, UNCLEARED[name][0], name, "UNCLEARED")
    assert first == second
    (line,) = first.splitlines()[1:]
    assert line.strip().startswith("rank 1: the gradient of ")
    assert line.endswith(" was not cleared")
