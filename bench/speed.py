"""Tokens per second, MFU and peak memory of one model under one ZeRO stage, at growing micro-batch sizes.

Whole optimizer steps through our engine on random tokens that lie on the device: what reading data adds is not
here. The micro-batch doubles until memory ends or speed no longer grows. Steps are timed on the device (CUDA
events) between one synchronisation before and one after; the host's own waits in a step are the engine's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from bench.contest import Spread
from bench.ours import Ours, Precision, Shape, micro_batches, tokens_of_step
from engine.config.objectives import RowLengths
from engine.config.schema.model import GPTConfig
from engine.plan.operations import training_operations

PEAKS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bf16 operations per second by a part of the device's name, most special first (NVIDIA's data sheets)."""
REPEATS = 5
LEAST_REPEATS = 3
"""Fewer repeats than this are no measurement: the size is given up."""
GAIN = 1.01
"""A micro-batch that does not bring this much over the best one so far ends the search."""
SHOWN_KERNELS = 15


def peak_operations(device_name: str) -> float | None:
    """Dense bf16 operations per second of a device; None where it is not known."""
    return next((peak for part, peak in PEAKS.items() if part in device_name), None)


def gpt2(num_layers: int, hidden_size: int, num_heads: int) -> GPTConfig:
    """GPT-2 at one of its sizes (Radford et al. 2019, table 2)."""
    return GPTConfig(vocab_size=50257, num_layers=num_layers, hidden_size=hidden_size, num_heads=num_heads)


MODELS: dict[str, tuple[GPTConfig, int, tuple[int, ...]]] = {
    "124M": (gpt2(12, 768, 12), 512, (16, 32, 64)),
    "355M": (gpt2(24, 1024, 16), 256, (8, 16, 32)),
    "1.5B": (gpt2(48, 1600, 25), 128, (4, 8, 16)),
}
"""Model, samples of 1,024 tokens per step, and micro-batch sizes to try."""
TOY = (GPTConfig(vocab_size=250, num_layers=2, hidden_size=32, num_heads=2, max_positions=32), 4, (1, 2))


def cases(peak: float | None, toy: bool) -> list[tuple[str, tuple[Any, ...]]]:
    """(name, arguments of `work` but the last)."""
    models = {"toy": TOY} if toy else MODELS
    return [
        (f"{name} bf16 ZeRO-{stage}", (Shape(model, model.max_positions, rows, sizes[0]), sizes, stage, "bf16", peak))
        for name, (model, rows, sizes) in models.items()
        for stage in (1, 3)
    ]


def work(
    connection: Connection,
    end: float,
    shape: Shape,
    sizes: tuple[int, ...],
    zero_stage: int,
    precision: Precision,
    peak: float | None,
    profile: bool,
) -> None:
    """Measures each micro-batch size and sends it at once, the best one so far as `best`, a profile at the end."""
    begin = time.monotonic()
    ours = Ours(shape, zero_stage, precision)
    connection.send({"build_seconds": round(time.monotonic() - begin, 1), "zero_stage": zero_stage})
    best: dict[str, Any] | None = None
    for micro_rows in sizes:
        try:
            row = measure(ours, replace(shape, micro_rows=micro_rows), peak, end)
        except torch.OutOfMemoryError:
            connection.send({f"micro-batch {micro_rows}": "out of memory"})
            break  # gradients and gathered weights are in no known state now
        connection.send({f"micro-batch {micro_rows}": row})
        if row is None:
            break
        if best is not None and row["tokens_per_second"]["median"] < GAIN * best["tokens_per_second"]["median"]:
            break
        best = row
        connection.send({"best": best})
        if profile:
            connection.send({"hotspots": hotspots(ours, replace(shape, rows=micro_rows, micro_rows=micro_rows))})
    connection.send(None)


def measure(ours: Ours, shape: Shape, peak: float | None, end: float) -> dict[str, Any] | None:
    """Speed at one micro-batch size; None where the time until `end` (monotonic) does not suffice."""
    inputs = micro_batches(tokens_of_step(shape, 0, 0).to(ours.device), shape.micro_rows)
    is_cuda = ours.device.type == "cuda"

    def step() -> None:
        ours.step(inputs, shape.num_targets)

    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    warm = timed(step, ours.device)  # also grows the allocator's pool
    seconds: list[float] = []
    while len(seconds) < REPEATS and time.monotonic() + (seconds or [warm])[-1] < end:
        seconds.append(timed(step, ours.device))
    if len(seconds) < LEAST_REPEATS:
        return None
    speed = Spread.of([shape.tokens / second for second in seconds])
    per_row = training_operations(shape.model, RowLengths(shape.length, predicted=shape.length))
    per_token = per_row // shape.length
    return {
        "micro_rows": shape.micro_rows,
        "rows": shape.rows,
        "step_seconds": seconds,
        "tokens_per_second": asdict(speed),
        "operations_per_token": per_token,
        "mfu": None if peak is None else speed.median * per_token / peak,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if is_cuda else None,
        "reserved_memory_bytes": torch.cuda.max_memory_reserved() if is_cuda else None,
    }


def timed(step: Callable[[], object], device: torch.device) -> float:
    """Seconds of one step, on the device's own clock where it has one."""
    if device.type != "cuda":
        begin = time.perf_counter()
        step()
        return time.perf_counter() - begin
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    before.record()
    step()
    after.record()
    torch.cuda.synchronize()
    return before.elapsed_time(after) / 1000.0


def hotspots(ours: Ours, shape: Shape) -> dict[str, Any]:
    """Where one step of one micro-batch spends its time: kernels (operators on a CPU) by their own seconds.

    `busy_share` is the kernels' time over the step's, under the profiler: what is missing is the host's.
    """
    inputs = micro_batches(tokens_of_step(shape, 0, 0).to(ours.device), shape.micro_rows)
    is_cuda = ours.device.type == "cuda"
    with torch.profiler.profile(
        activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA] if is_cuda else [ProfilerActivity.CPU]
    ) as profiler:
        step_seconds = timed(lambda: ours.step(inputs, shape.num_targets), ours.device)
    rows = [(event.key, own_seconds(event, is_cuda), event.count) for event in profiler.key_averages()]
    rows = sorted((row for row in rows if row[1] > 0), key=lambda row: -row[1])
    total = sum(row[1] for row in rows)
    return {
        "step_seconds": step_seconds,
        "busy_share": total / step_seconds,
        "top": [
            {"name": name[:120], "seconds": seconds, "share": seconds / total, "count": count}
            for name, seconds, count in rows[:SHOWN_KERNELS]
        ],
    }


def own_seconds(event: Any, is_cuda: bool) -> float:
    """Time of a profiler's row itself: of kernels on a GPU (not of the operators that launch them)."""
    if not is_cuda:
        return event.self_cpu_time_total / 1e6
    if event.device_type.name != "CUDA":
        return 0.0
    return event.self_device_time_total / 1e6
