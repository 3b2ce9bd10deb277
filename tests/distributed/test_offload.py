"""Optimizer state in host memory: the same numbers, bit for bit, as where it lies on the device.

Both make the same sums in the same order, and torch's fused AdamW on the host is what runs on a CPU anyway. On a CPU
the host is the device: what is shown is which tensors DeepSpeed allocated, how often gradients go there, and that no
update comes before its gradients.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from engine.config.resolve import resolve
from tests.distributed.cases import LEARNING_RATE, Case, config_of, global_batch, stage_inputs
from tests.distributed.discarding import discarded_steps
from tests.distributed.parity import check, run
from tests.distributed.ranks import run_ranks

PARITY = Case("llama", zero_stage=3, pipe=2, offload="optimizer")
BITWISE = [
    Case("gpt2", zero_stage=1, pipe=2, dtype="bf16"),
    Case("gpt2", zero_stage=2, pipe=2, data=2, dtype="bf16"),
    Case("llama", zero_stage=3, data=2, dtype="bf16"),
    Case("llama", zero_stage=3, data=2, dtype="bf16", reduce_dtype="bf16", reduce="step"),
    Case("gpt2", zero_stage=3, pipe=2, data=2),
]


def test_offload_equals_plain_torch() -> None:
    check(PARITY)


@pytest.mark.matrix
@pytest.mark.parametrize("case", BITWISE, ids=str)
def test_the_host_computes_what_the_device_does_bit_for_bit(case: Case) -> None:
    plain, offloaded = run(case), run(dataclasses.replace(case, offload="optimizer"))
    assert (plain.losses, plain.norms) == (offloaded.losses, offloaded.norms)
    for name, weight in plain.weights.items():
        assert (weight == offloaded.weights[name]).all(), name


@pytest.mark.matrix
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_a_discarded_step_leaves_no_trace_on_the_host(zero_stage: int) -> None:
    run_ranks(2, discarded_steps, Case(zero_stage=zero_stage, data=2, offload="optimizer"))


def steps_of_both(environment: Any, case: Case) -> list[list[str]]:
    """Two steps of a run with and without offload, which have to end alike; what the host's side did in the second."""
    from engine.train.build import build_pipeline, join_groups, stage_spec
    from engine.train.checks import check_invariants

    ends, events = [], []
    for one in (case, dataclasses.replace(case, offload="optimizer")):
        config = config_of(one)
        groups = join_groups(config, resolve(config, environment.world_size), environment.global_rank)
        pipeline = build_pipeline(config, stage_spec(config, config.stages[0], groups), groups, torch.device("cpu"))
        host: Any = pipeline.engine._host
        norms = []
        for step in range(2):
            batch = global_batch(step, one.attention, one.model)
            pipeline.train(stage_inputs(batch, one, groups), torch.tensor([0.1]))
            if step == 1 and host is not None:
                watch(host, events)
            norms.append(pipeline.engine.step(LEARNING_RATE).gradient_norm)
            check_invariants(pipeline.engine, groups)
        shards = pipeline.engine.parameter_shards()
        ends.append((norms, [t.clone() for shard in shards for t in (shard.weight, *shard.moments.values())]))
    assert ends[0][0] == ends[1][0]
    assert all(map(torch.equal, ends[0][1], ends[1][1]))
    return events


def watch(host: Any, events: list[list[str]]) -> None:
    """Notes when a group's gradients go to the host, and when it is updated; DeepSpeed's switch is on only then."""
    copy, update = host._copy, host._update
    assert not getattr(host.zero, host.flag)

    def copied(index: int, scale: Any) -> None:
        copy(index, scale)
        events.append(["gradients", str(index)])

    def updated(index: int) -> None:
        assert getattr(host.zero, host.flag)
        assert host.masters[index].device.type == "cpu"
        events.append(["update", str(index)])
        update(index)

    host._copy, host._update = copied, updated


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_gradients_go_to_the_host_once_and_before_their_update(zero_stage: int) -> None:
    (events,) = run_ranks(1, steps_of_both, Case(zero_stage=zero_stage, micro_batch_size=2, dtype="bf16"))
    groups = sorted({index for _, index in events}, key=int)
    assert len(groups) > 1, "several groups, so that one is copied while another is updated"
    assert events == [["gradients", index] for index in groups] + [["update", index] for index in groups]
