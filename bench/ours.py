"""Our engine on batches of random tokens, with no run folder: what `engine.train` does in a step, less reading data.

One rank; built through `build_pipeline`, stepped as `Trainer.fit` steps. Not here: what is measured, or against whom.

Legend: B micro-batch size, T time.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from bench.contest import Turns
from engine.config.rank_environment import RankEnvironment
from engine.config.resolve import resolve
from engine.config.schema.data import DataConfig
from engine.config.schema.model import AnyModelConfig
from engine.config.schema.optimizer import OptimizerConfig, PrecisionConfig
from engine.config.schema.parallel import ParallelConfig
from engine.config.schema.run import RunConfig
from engine.config.schema.stage import Duration, RunStage
from engine.parallel import zero
from engine.parallel.boundary import Tensors
from engine.parallel.groups import connect
from engine.train.build import build_pipeline, join_groups, stage_spec
from engine.train.run import choose_device

TOKENS_PURPOSE = 0xBE9C
"""Keeps the stream of the benchmarks' random tokens apart from every other of the same seed."""

Precision = Literal["fp32", "bf16"]
Offload = Literal["none", "optimizer"]


@dataclass(frozen=True)
class Shape:
    """A model and its batch: `rows` samples of `length` tokens per step, `micro_rows` of them per forward pass."""

    model: AnyModelConfig
    length: int
    rows: int
    micro_rows: int
    packed: bool = False
    """Rows hold several documents, and attention stays inside them."""

    @property
    def tokens(self) -> int:
        """Tokens per step."""
        return self.rows * self.length

    @property
    def num_targets(self) -> int:
        """Targets per step: every token but the first of each row."""
        return self.rows * (self.length - 1)


OPTIMIZER = OptimizerConfig()
"""The run's defaults on every side: AdamW 0.9, 0.95, 1e-8, decay 0.1 on matrices, clip 1.0, 3e-4."""
DOCUMENT_TOKENS = 20
"""Of a document of packed rows, on average."""
DISTINCT_STEPS = 8
"""Batches come round again after so many steps."""


class Ours:
    """This process as the one rank of a run. Make one per process: DeepSpeed keeps globals."""

    def __init__(
        self, shape: Shape, zero_stage: int, precision: Precision, seed: int = 0, offload: Offload = "none"
    ) -> None:
        os.environ.update(LOCAL_RANK="0", RANK="0", WORLD_SIZE="1")  # DeepSpeed asks for them
        environment = RankEnvironment()
        self.shape, self.device = shape, choose_device(environment)
        self.config = run_config(shape, zero_stage, precision, seed, offload)
        connect(environment, self.device)
        zero.start(self.device)
        self.groups = join_groups(self.config, resolve(self.config, 1), 0)
        self.pipeline = build_pipeline(
            self.config, stage_spec(self.config, self.config.stages[0], self.groups), self.groups, self.device
        )

    def step(
        self, inputs: list[Tensors], num_targets: int, accept: Callable[[float], bool] = zero.accept_finite
    ) -> tuple[float, float]:
        """One step on micro-batches that lie on the device; returns (loss per target, gradient norm)."""
        weight = torch.tensor(float(num_targets), dtype=torch.float64, device=self.device)
        (loss,) = self.pipeline.train(inputs, 1.0 / weight)
        norm = self.pipeline.engine.step(self.config.optimizer.learning_rate, accept).gradient_norm
        return (loss / weight).item(), norm

    def inputs(self, step: int) -> list[Tensors]:
        """The micro-batches of a step, on the device; a pure function of (seed, step)."""
        tokens_BT = tokens_of_step(self.shape, self.config.seed, step).to(self.device)
        return micro_batches(tokens_BT, self.shape.micro_rows, self.shape.packed)


def contestant(turns: Turns, shape: Shape, zero_stage: int, precision: Precision, threads: int) -> None:
    """Our engine in a contest."""
    torch.set_num_threads(threads)
    ours = Ours(shape, zero_stage, precision)
    batches = [ours.inputs(step) for step in range(DISTINCT_STEPS)]
    step = 0
    while True:
        turns.begin_step()
        loss, _ = ours.step(batches[step % DISTINCT_STEPS], shape.num_targets)
        turns.loss(loss)
        step += 1


def run_config(shape: Shape, zero_stage: int, precision: Precision, seed: int, offload: Offload = "none") -> RunConfig:
    """The run that stands behind a benchmark; its folders are never opened."""
    nowhere = Path("nowhere")
    stage = RunStage(
        data=DataConfig(train=str(nowhere), attention="document" if shape.packed else "row"),
        sequence_length=shape.length,
        global_batch_size=shape.rows,
        duration=Duration(steps=1_000_000),
    )
    return RunConfig(
        folder=nowhere,
        tokenizer=nowhere,
        seed=seed,
        model=shape.model,
        stages=(stage,),
        optimizer=OPTIMIZER,
        precision=PrecisionConfig(dtype=precision),
        parallel=ParallelConfig.model_validate(
            {"zero_stage": zero_stage, "micro_batch_size": shape.micro_rows, "offload": offload}
        ),
    )


def tokens_of_step(shape: Shape, seed: int, step: int) -> torch.Tensor:
    """tokens_BT of the whole step, int64, uniform over the real vocabulary."""
    sequence = np.random.SeedSequence([seed, TOKENS_PURPOSE, step % DISTINCT_STEPS])
    drawn = np.random.default_rng(sequence).integers(0, shape.model.vocab_size, (shape.rows, shape.length))
    return torch.from_numpy(drawn)


def micro_batches(tokens_BT: torch.Tensor, micro_rows: int, packed: bool = False) -> list[Tensors]:
    """A step's tokens as the keywords of our model: each token's target is the next one, a row's last has none.

    Where rows are `packed`, a document begins behind each token that `DOCUMENT_TOKENS` divides.
    """
    targets_BT = tokens_BT.roll(-1, dims=1)
    weights_BT = torch.ones_like(tokens_BT, dtype=torch.float32)
    weights_BT[:, -1] = 0.0
    whole = {"tokens_BT": tokens_BT, "targets_BT": targets_BT, "weights_BT": weights_BT}
    if packed:
        whole["segments_BT"] = (tokens_BT % DOCUMENT_TOKENS == 0).cumsum(1, dtype=torch.int32)
    return [
        {name: tensor[at : at + micro_rows].contiguous() for name, tensor in whole.items()}
        for at in range(0, len(tokens_BT), micro_rows)
    ]
