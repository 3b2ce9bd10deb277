"""One rank of `bench.schedule`: steps under the schedule that is asked for, with the CPU time of each instruction.

CPU time of the thread that computes (backward passes too: on a CPU autograd runs in the thread that called it); waiting
for a message takes none of it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection

import torch
from torch.profiler import record_function

from bench.ranks import join
from bench.ranks_memory import BUILT, hooked, random_rows
from bench.replay import Spans
from engine.config.resolve import num_micro_batches, resolve
from engine.config.schema.run import RunConfig
from engine.parallel.boundary import Tensors
from engine.parallel.pipeline import Pipeline
from engine.parallel.schedule import Instruction, Schedule, instructions
from engine.train.build import build_pipeline, join_groups, stage_spec


@dataclass(frozen=True)
class Step:
    """One step of one stage."""

    spans: Spans
    wall_seconds: float
    in_flight: int
    """Most forward passes of a chunk whose activations were held at once."""


@dataclass(frozen=True)
class Request:
    """What the parent asks for; `memory`: bytes of one step in the place of steps."""

    schedule: Schedule
    steps: int = 1
    memory: bool = False


def rank(connection: Connection, config: RunConfig, folder: str, global_rank: int, world_size: int) -> None:
    """Says `ready`, then answers each `Request` with its `Step`s or bytes, until it is None."""
    _, device = join(folder, global_rank, world_size)
    groups = join_groups(config, resolve(config, world_size), global_rank)
    pipeline = build_pipeline(config, stage_spec(config, config.stages[0], groups), groups, device)
    count = num_micro_batches(config.stages[0].global_batch_size, config.parallel, groups.layout.data)
    generator = torch.Generator().manual_seed(0)
    rows = [random_rows(config, generator) for _ in range(count)]
    inputs = [{name: tensor for name, tensor in row.items() if name in pipeline.spec.inputs} for row in rows]
    connection.send("ready")
    while (request := connection.recv()) is not None:
        work = partial(train, pipeline, inputs, request.schedule, config.optimizer.learning_rate)
        connection.send(step_bytes(work) if request.memory else [work() for _ in range(request.steps)])


def train(pipeline: Pipeline, inputs: list[Tensors], schedule: Schedule, learning_rate: float) -> Step:
    """One step. Engine and weights are those of every schedule with as many chunks."""
    spans: list[tuple[Instruction, float]] = []
    held = [0]

    def traced(order: Iterable[Instruction]) -> Iterator[Instruction]:
        for instruction in order:
            begin = time.thread_time()
            yield instruction
            spans.append((instruction, time.thread_time() - begin))
            held[0] = max(held[0], len(pipeline._live) + len(pipeline._deferred))

    begin = time.perf_counter()
    order = instructions(schedule, pipeline.groups.coordinates.stage, *pipeline.sizes, len(inputs))
    pipeline._run(traced(order), inputs, torch.full((pipeline.num_losses,), 1e-3), by_domain=None)
    seconds = time.perf_counter() - begin
    pipeline.engine.step(learning_rate)
    return Step(spans, seconds, held[0])


def step_bytes(work: partial[Step]) -> int:
    """Most bytes of tensors that a step makes and holds at once."""

    def marked() -> None:
        with record_function(BUILT):
            pass
        work()

    (_, peak, _), _ = hooked(marked)
    return peak
