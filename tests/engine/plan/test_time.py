"""The estimate of a step's seconds against runs that others published, and against closed forms.

Published are model, accelerator and utilisation; where the batch and the layout were not, usual ones stand here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.config.resolve import resolve
from engine.config.schema.data import DataConfig
from engine.config.schema.model import make_model
from engine.config.schema.parallel import ParallelConfig
from engine.config.schema.run import RunConfig
from engine.config.schema.stage import Duration, RunStage
from engine.plan.hardware import cluster
from engine.plan.plan import run_stage_plans
from engine.plan.time import BAND, StepTime, mean_step_time

GPT = {"vocab_size": 50257, "max_positions": 1024}
LLAMA = {"position": "rope", "norm": "rmsnorm", "activation": "swiglu", "bias": False, "tie_embeddings": False}

PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any], int, int, float]] = {
    # name: model, layout, accelerators, rows of the global batch, model FLOPs utilisation (middle of the range)
    "llm.c, GPT-2 124M, one H100": (
        GPT | {"num_layers": 12, "hidden_size": 768, "num_heads": 12},
        {"micro_batch_size": 64},
        1,
        512,
        0.37,
    ),
    "llm.c, GPT-2 1.5B, eight H100": (
        GPT | {"num_layers": 48, "hidden_size": 1600, "num_heads": 25},
        {"zero_stage": 1, "micro_batch_size": 16},
        8,
        1024,
        0.50,
    ),
    "llm-foundry, 760M, H100": (
        GPT | {"num_layers": 24, "hidden_size": 1536, "num_heads": 12, "max_positions": 2048},
        {"zero_stage": 3, "micro_batch_size": 8},
        64,
        512,
        0.375,
    ),
    "llm-foundry, 1.3B, H100": (
        GPT | {"num_layers": 24, "hidden_size": 2048, "num_heads": 16, "max_positions": 2048},
        {"zero_stage": 3, "micro_batch_size": 8},
        64,
        512,
        0.425,
    ),
    "llm-foundry, 7B, H100": (
        GPT | {"num_layers": 32, "hidden_size": 4096, "num_heads": 32, "max_positions": 2048},
        {"zero_stage": 3, "micro_batch_size": 8},
        64,
        512,
        0.46,
    ),
    "torchtitan, Llama 3 8B, H100": (
        LLAMA
        | {
            "vocab_size": 128256,
            "num_layers": 32,
            "hidden_size": 4096,
            "num_heads": 32,
            "num_kv_heads": 8,
            "feed_forward_size": 14336,
            "max_positions": 8192,
        },
        {"zero_stage": 3, "micro_batch_size": 1},
        64,
        64,
        0.36,
    ),
}


def estimate(model: dict[str, Any], parallel: dict[str, Any], world: int, batch: int, gpu: str) -> StepTime:
    shape = make_model(**model)
    stage = RunStage(
        data=DataConfig(train="data"),
        sequence_length=shape.max_positions,
        global_batch_size=batch,
        duration=Duration(steps=1),
    )
    config = RunConfig(
        folder=Path("run"),
        tokenizer=Path("tokenizer"),
        model=shape,
        stages=(stage,),
        parallel=ParallelConfig(**parallel),
    )
    layout = resolve(config, world)
    return mean_step_time(config, layout, run_stage_plans(config, layout), cluster(gpu, world, 8))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_runs_lie_within_the_band(name: str) -> None:
    row = PUBLISHED[name]
    found, utilisation = estimate(*row[:4], gpu="h100-80gb").utilisation, row[4]
    assert 1 / BAND <= found / utilisation <= BAND, f"{found:.3f} for {utilisation}"


def test_the_band_is_no_wider_than_those_runs_ask_for() -> None:
    ratios = [estimate(*row[:4], gpu="h100-80gb").utilisation / row[4] for row in PUBLISHED.values()]
    worst = max(max(ratio, 1 / ratio) for ratio in ratios)
    assert worst <= BAND < worst + 0.05, f"{worst:.3f}"


def test_arithmetic_alone_is_operations_over_the_reached_peak() -> None:
    time = estimate(PUBLISHED["llm.c, GPT-2 124M, one H100"][0], {"micro_batch_size": 64}, 1, 64, "a100-80gb")
    tokens = 64 * 1024
    operations = 6 * (12 * 12 * 768**2 + 768 * 50304) * tokens + 12 * 12 * 768 * 1024 * tokens + 3 * 2 * 768 * tokens
    share = 0.60 * 768 / (768 + 400) * tokens / (tokens + 256)
    assert time.arithmetic == pytest.approx(operations / (312e12 * share), rel=1e-12)
    assert (time.tensor, time.pipe, time.data, time.idle) == (0, 0, 0, 0)


def test_offload_updates_at_the_hosts_speed_and_pays_for_the_way() -> None:
    """Per parameter of the rank: 28 bytes of state and gradient, 4 + 4 of copies, 2 of the bf16 weight; 4 + 2 sent."""
    model, layout = PUBLISHED["llm-foundry, 1.3B, H100"][0], {"zero_stage": 2, "micro_batch_size": 8}
    on_device = estimate(model, layout, 8, 64, "h100-80gb")
    on_host = estimate(model, layout | {"offload": "optimizer"}, 8, 64, "h100-80gb")
    updated = on_device.optimizer * 3.35e12 / 28
    assert on_host.optimizer == pytest.approx(
        updated * 38 / (2 * 8 * 4.8e9)
    )  # of 8 GPUs: two sockets, 8 channels, 8 bytes
    assert on_host.offload == pytest.approx(updated * 6 / (16 * 32e9 / 8 * 128 / 130))
    assert on_device.offload == 0
    assert on_host.total == pytest.approx(on_device.total - on_device.optimizer + on_host.optimizer + on_host.offload)


def test_idle_time_is_the_schedules_share_of_all_but_the_step_boundary() -> None:
    model = PUBLISHED["llm-foundry, 1.3B, H100"][0]
    time = estimate(model, {"pipe": 4, "micro_batch_size": 1}, 8, 16, "h100-80gb")  # 8 micro-batches on 4 stages
    busy = time.arithmetic + time.tensor + time.pipe
    assert time.idle / (busy + time.idle) == pytest.approx(3 / 11)


def test_a_group_that_leaves_its_node_is_as_fast_as_its_network_cards() -> None:
    two_nodes = cluster("h100-80gb", 16, 8)
    assert two_nodes.bytes_per_second(8, 1) == 450e9, "one node, over NVLink"
    assert two_nodes.bytes_per_second(16, 1) == 8 * 50e9, "all eight cards of a node"
    assert two_nodes.bytes_per_second(2, 8) == 50e9, "one rank on each node"
    assert two_nodes.bytes_per_second(4, 4) == 2 * 50e9
