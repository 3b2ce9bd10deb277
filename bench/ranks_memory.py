"""One rank of `bench.memory`: some training steps under a hook of torch's CPU allocator.

The hook is torch's profiler (`profile_memory`): the allocator tells it the size of whatever it hands out and takes back
while it runs, temporaries inside of operators included. It runs from before the engine is built, so the running sum is
the bytes of all tensors that live. Threads of gloo are not heard of: what one of them frees late stays in the sum.

Legend: B micro-batch size, T time (of an encoder-decoder, the decoder's), S time of the encoder, M masked tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from bench.ranks import join
from engine.config.objectives import row_lengths
from engine.config.rank_environment import RankEnvironment
from engine.config.resolve import num_micro_batches, resolve
from engine.config.schema.run import RunConfig
from engine.parallel.boundary import Tensors
from engine.train.build import build_pipeline, join_groups, stage_spec
from engine.train.sequence_slices import own_part

T = TypeVar("T")

NUM_STEPS = 2
"""Moments exist from the first one on."""
BUILT = "bench.memory: built"


@dataclass(frozen=True)
class Measured:
    """Bytes on one rank."""

    states: int
    """Tensors when the engine stands: weights and what ZeRO made at once."""
    peak: int
    """Most bytes of tensors at any time of the steps."""
    end: int
    """Tensors after the last step."""
    resident: int
    """Peak of resident memory (VmHWM) of the process: Python, torch and its threads, and the hook's own notes."""
    resident_before: int
    """Resident memory before the engine was built."""


def rank(connection: Connection, config: RunConfig, folder: str, global_rank: int, world_size: int) -> None:
    """Trains and sends a `Measured`."""
    environment, device = join(folder, global_rank, world_size)
    before = resident("VmRSS")
    (states, peak, end), _ = hooked(partial(train, config, environment, device))
    connection.send(Measured(states, peak, end, resident("VmHWM"), before))


def hooked(work: Callable[[], T]) -> tuple[tuple[int, int, int], T]:
    """`running_sums` of the allocator's bytes while `work`, which sets the mark, runs; and what it returns."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as hook:
        made = work()
    assert hook.profiler is not None
    assert hook.profiler.kineto_results is not None
    told: list[Any] = hook.profiler.kineto_results.events()
    events = [
        (event.start_ns(), event.nbytes() if event.name() == "[memory]" else None)
        for event in told
        if event.name() in ("[memory]", BUILT)
    ]
    return running_sums(size for _, size in sorted(events, key=lambda event: event[0])), made


def train(config: RunConfig, environment: RankEnvironment, device: torch.device) -> None:
    """Builds the engine, marks that it stands, and trains on random rows."""
    groups = join_groups(config, resolve(config, environment.world_size), environment.global_rank)
    pipeline = build_pipeline(config, stage_spec(config, config.stages[0], groups), groups, device)
    with record_function(BUILT):
        pass
    count = num_micro_batches(config.stages[0].global_batch_size, config.parallel, groups.layout.data)
    length = row_lengths(config.stages[0]).tokens
    generator = torch.Generator().manual_seed(groups.coordinates.data_rank)
    for _ in range(NUM_STEPS):
        batches = [random_rows(config, generator) for _ in range(count)]
        inputs = [{name: tensor for name, tensor in batch.items() if name in pipeline.spec.inputs} for batch in batches]
        inputs = [own_part(batch, length, config.parallel.sequence_ranks, groups.sequence) for batch in inputs]
        scales_L = torch.full((pipeline.num_losses,), 1e-3)
        pipeline.train(inputs, scales_L)
        pipeline.engine.step(config.optimizer.learning_rate)


def random_rows(config: RunConfig, generator: torch.Generator) -> Tensors:
    """A micro-batch of random tokens with every keyword of the family."""
    rows, stage = config.parallel.micro_batch_size, config.stages[0]
    lengths = row_lengths(stage)

    def tokens(length: int) -> torch.Tensor:
        return torch.randint(config.model.vocab_size, (rows, length), generator=generator)

    def zeros(length: int) -> torch.Tensor:
        return torch.zeros(rows, length, dtype=torch.int32)

    if stage.objective.name == "masked":
        return {
            "tokens_BT": tokens(lengths.tokens),
            "segments_BT": zeros(lengths.tokens),
            "token_types_BT": zeros(lengths.tokens).long(),
            "masked_BM": torch.arange(lengths.predicted).expand(rows, -1).contiguous(),
            "targets_BM": tokens(lengths.predicted),
            "weights_BM": torch.ones(rows, lengths.predicted),
            "pair_targets_B": torch.randint(2, (rows,), generator=generator),
            "pair_weights_B": torch.ones(rows),
        }
    targets = {"targets_BT": tokens(lengths.predicted), "weights_BT": torch.ones(rows, lengths.predicted)}
    if stage.objective.name == "span_corruption":
        return targets | {
            "tokens_BS": tokens(lengths.tokens),
            "segments_BS": zeros(lengths.tokens),
            "decoder_tokens_BT": tokens(lengths.decoder),
            "decoder_segments_BT": zeros(lengths.decoder),
        }
    documents = {"segments_BT": zeros(lengths.tokens)} if stage.data.attention == "document" else {}
    return targets | documents | {"tokens_BT": tokens(lengths.tokens)}


def running_sums(sizes: Iterable[int | None]) -> tuple[int, int, int]:
    """Of allocations (positive) and frees (negative) in order: the sum at the mark (None), the greatest one after it,
    and the last one."""
    total = at_mark = peak = 0
    for size in sizes:
        if size is None:
            at_mark = peak = total
        else:
            total += size
            peak = max(peak, total)
    return at_mark, peak, total


def resident(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))
