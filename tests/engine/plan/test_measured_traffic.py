"""The plan's bytes against every byte that real ranks hand to torch.distributed in a step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from engine.plan.plan import make_plan
from engine.plan.traffic import all_reduce_factor, gather_factor
from tests.distributed.cases import Case, config_of, global_batch, stage_inputs, weights
from tests.distributed.ranks import run_ranks

SCALAR_BYTES = 8
"""Norms and counts, which a plan leaves out."""
matrix = pytest.mark.matrix


@pytest.mark.parametrize(
    "case",
    [
        Case(zero_stage=3, data=2),
        Case(zero_stage=1, pipe=2, tensor=2),
        Case(zero_stage=3, data=2, gather="step", reduce="step"),
        Case(zero_stage=3, data=4, gather_within=2),
        Case("llama", zero_stage=3, data=2, optimizer="muon"),
        Case("llama", zero_stage=3, data=2, freeze=("embed*", "layers.0.*", "layers.2.ffn.*")),
        pytest.param(Case(zero_stage=1, pipe=3, data=2, freeze=("embed*", "layers.0.*")), marks=matrix),
        pytest.param(Case("gpt2", zero_stage=3, tensor=2, data=2, optimizer="muon"), marks=matrix),
        pytest.param(Case("llama", zero_stage=3, pipe=2, data=4, gather_within=2, reduce="step"), marks=matrix),
        pytest.param(Case("bert", zero_stage=3, tensor=2, data=4, gather_within=2, recompute="full"), marks=matrix),
        pytest.param(Case(zero_stage=3, pipe=2, data=2, reduce="step"), marks=matrix),
        pytest.param(Case(zero_stage=2, data=2, reduce="step"), marks=matrix),
        pytest.param(Case("gpt2-deep", zero_stage=3, pipe=2, data=2, chunks_per_stage=3, reduce="step"), marks=matrix),
        pytest.param(Case("gpt2-deep", zero_stage=3, pipe=4, data=2, gather="step", attention="row"), marks=matrix),
        Case("bert", zero_stage=1, pipe=2, tensor=2),
        Case("t5", zero_stage=1, pipe=3, tensor=2),
        pytest.param(Case("t5", zero_stage=3, pipe=2, data=2), marks=matrix),
        pytest.param(Case("t5-v1.1", zero_stage=2, pipe=4), marks=matrix),
        pytest.param(Case(zero_stage=1, pipe=2, tensor=2, sequence_parallel=True), marks=matrix),
        pytest.param(Case("llama", zero_stage=1, pipe=2, sequence=2, recompute="full"), marks=matrix),
        pytest.param(Case(zero_stage=3, tensor=2, data=2, sequence_parallel=True, recompute="full"), marks=matrix),
        pytest.param(Case("t5", zero_stage=1, tensor=2, sequence_parallel=True, recompute="full"), marks=matrix),
        pytest.param(Case("bert", zero_stage=0, sequence=2, data=2, recompute="full"), marks=matrix),
        pytest.param(Case("t5", zero_stage=1, tensor=2, sequence=2, sequence_parallel=True), marks=matrix),
        pytest.param(Case("t5-v1.1", zero_stage=0, pipe=2, sequence=4, recompute="selective"), marks=matrix),
    ],
    ids=str,
)
def test_a_step_sends_what_the_plan_says(case: Case) -> None:
    stages = make_plan(config_of(case), case.world_size).stages
    ranks_per_stage = case.world_size // case.pipe
    found = run_ranks(case.world_size, bytes_of_a_step, case)
    if case.optimizer == "muon":  # the plan's is the mean: owners differ in what they hold
        (planned,) = (stage.traffic for stage in stages)
        exchanged = sum(sent["exchange"] for sent in found)
        assert exchanged == case.world_size * (planned.updates + planned.updates_across)
        found = [sent | {"exchange": 0} for sent in found]
    for global_rank, sent in enumerate(found):
        planned = stages[global_rank // ranks_per_stage].traffic
        assert sent.pop("exchange") == planned.sequence, f"rank {global_rank}"
        if case.sequence_parallel:  # gathers and scatters on both axes
            assert sent["send"] == planned.pipe, f"rank {global_rank}"
            assert sum(sent.values()) == planned.total - planned.sequence, f"rank {global_rank}"
            continue
        scatters = case.zero_stage in (1, 3) or case.reduce == "step"
        scattered = planned.gradients if scatters else 0
        assert sent == {
            "all_reduce": planned.gradients - scattered + planned.tensor + planned.tie,
            "reduce_scatter": scattered,
            "all_gather": planned.weights,
            "gather_within": planned.weights_within,
            "send": planned.pipe,
        }, f"rank {global_rank}"


def bytes_of_a_step(environment: Any, case: Case) -> dict[str, int]:
    """What one rank sends in its second step by a ring's count; runs in a process of its own."""
    import torch
    import torch.distributed as dist
    from deepspeed.comm import comm

    from engine.config.resolve import resolve
    from engine.train.build import build_pipeline, join_groups, stage_spec

    config, sent, counting = config_of(case), Counter[str](), [False]
    groups = join_groups(config, resolve(config, environment.world_size), environment.global_rank)
    pipeline = build_pipeline(config, stage_spec(config, config.stages[0], groups), groups, torch.device("cpu"))

    def count(owner: Any, name: str, kind: str, factor: Callable[[int], Any]) -> None:
        original = getattr(owner, name)

        def counted(*arguments: Any, **named: Any) -> Any:
            if kind == "exchange" and len(arguments) > 2 and counting[0]:  # pieces of unequal sizes
                sizes, own = arguments[3], dist.get_rank(named.get("group"))
                sent[kind] += (sum(sizes) - sizes[own]) * arguments[1].element_size()
                return original(*arguments, **named)
            tensors = [value for value in (*arguments, *named.values()) if isinstance(value, torch.Tensor)]
            num_bytes = max(tensor.numel() * tensor.element_size() for tensor in tensors)
            if counting[0] and num_bytes > SCALAR_BYTES:
                size = dist.get_world_size(named.get("group"))
                gathered_within = kind == "all_gather" and size == case.gather_within
                sent["gather_within" if gathered_within else kind] += int(num_bytes * factor(size))
            return original(*arguments, **named)

        setattr(owner, name, counted)

    count(dist, "all_reduce", "all_reduce", all_reduce_factor)
    count(dist, "all_gather_into_tensor", "all_gather", gather_factor)
    count(dist, "all_to_all_single", "exchange", gather_factor)
    count(dist, "isend", "send", lambda _: 1)
    count(comm.cdb, "all_gather_function", "all_gather", gather_factor)
    count(comm.cdb, "reduce_scatter_function", "reduce_scatter", gather_factor)
    count(dist, "reduce_scatter_tensor", "reduce_scatter", gather_factor)
    for step in range(2):
        counting[0] = step == 1
        batch = global_batch(step, case.attention, case.model)
        pipeline.train(stage_inputs(batch, case, groups), groups.zero.size / weights(batch))
        pipeline.engine.step(learning_rate=1e-3)
    kinds = ("all_reduce", "reduce_scatter", "all_gather", "gather_within", "send", "exchange")
    return {kind: sent[kind] for kind in kinds}
