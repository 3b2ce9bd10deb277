"""Data loaders in turn on the same tokens: throughput per CPU-second, time to the first batch (files in memory or not)
and after a resume, memory, bytes on disk; and our masking alone.

    python -m bench.data --output bench/results/cpu-data-DATE.json

`ours with replay` draws one sample in ten from a second data set: `ours_is_faster_by` says what that costs, best with
`--only "ours with replay"` and many rounds. Each loader has a process of its own; they open in turn, then they read in
turn, and only ratios within a round are compared. Peers that are not installed are left out. `make bench` installs
litdata. No version of mosaicml-streaming goes with transformers 5 for pip: `pip install --no-deps mosaicml-streaming`
and, until it can be imported, what it misses (catalogue, python-snappy, cramjam, zstd, clients of clouds, a torchvision
of torch's build).
megatron-core is `pip install --no-deps megatron-core==0.16.1`, whose wheel carries the helpers that build its indices.
"""

from __future__ import annotations

import gc
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from bench.command import run
from bench.contest import Spread, Worker, in_turn
from bench.loaders import BATCH_TOKENS, SIDES, VOCAB, Side, Task, write_ours
from bench.machine import machine

OPENINGS = ("cold", "warm", "resume")
"""How a loader is opened: its files on the disk alone, in the memory of the system, and there after so many steps."""
TASKS = (Task("gpt", 1024), Task("bert", 128), Task("gpt", 128), Task("bert", 1024))
RESUME_STEP = 40
TIMEOUT_SECONDS = 240.0


def main(
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of laps.")] = 5,
    lap_seconds: Annotated[float, typer.Option(min=0.01, help="About how long a lap takes.")] = 0.5,
    num_tokens: Annotated[int, typer.Option(min=200_000, help="Tokens of the corpus.")] = 8_000_000,
    only: Annotated[list[str] | None, typer.Option(help="A loader beside ours; may be given several times.")] = None,
) -> None:
    """Measure our loader and its peers."""
    sides = chosen(only)
    left_out = [name for name, side in SIDES.items() if not side.is_installed]
    results: dict[str, Any] = {"machine": machine(1), "tokens": num_tokens, "left_out": left_out}
    with tempfile.TemporaryDirectory() as folder:
        for task in TASKS:
            results[str(task)] = contest(task, Path(folder), rounds, lap_seconds, num_tokens, sides)
            _keep(results, output)
            print(task, json.dumps(results[str(task)], indent=1), flush=True)
    results["masking"] = masking(rounds)
    print("masking", json.dumps(results["masking"]), "left out:", ", ".join(left_out) or "none")
    _keep(results, output)


def _keep(results: dict[str, Any], output: Path | None) -> None:
    if output is not None:
        output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def chosen(only: list[str] | None) -> dict[str, Side]:
    """Return the sides that are measured: all that are installed, or ours and the named ones."""
    for name in only or ():
        if name not in SIDES:
            raise typer.BadParameter(f"--only {name}: the loaders are {', '.join(SIDES)}")
    wanted = SIDES if not only else {"ours", *only}
    return {name: side for name, side in SIDES.items() if side.is_installed and name in wanted}


def contest(
    task: Task, folder: Path, rounds: int, lap_seconds: float, num_tokens: int, sides: dict[str, Side]
) -> dict[str, Any]:
    """The figures of every side at one task."""
    sides = {name: side for name, side in sides.items() if task.model in side.models}
    workers, found = {}, {name: {} for name in sides}
    for name in sides:
        target = prepared(name, task, folder, num_tokens)
        found[name]["bytes_per_token"] = sum(path.stat().st_size for path in target.rglob("*")) / num_tokens
        workers[name] = Worker(name, "spawn", {"OMP_NUM_THREADS": "1"}, serve, name, task, target)
        workers[name].receive(TIMEOUT_SECONDS)
    opened: dict[str, list[Opened]] = {name: [] for name in sides}
    for name in in_turn(list(sides), rounds):
        workers[name].connection.send(True)
        opened[name].append(workers[name].receive(TIMEOUT_SECONDS))
    steps = {}
    for name, worker in workers.items():
        worker.connection.send(False)
        steps[name] = max(2, int(lap_seconds / worker.receive(TIMEOUT_SECONDS)))
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for name in in_turn(list(sides), rounds):
        workers[name].connection.send(steps[name])
        speeds[name].append(steps[name] * BATCH_TOKENS / workers[name].receive(TIMEOUT_SECONDS))
    for name, worker in workers.items():
        worker.connection.send(0)
        found[name] |= worker.receive(TIMEOUT_SECONDS)
        worker.end()
        found[name]["tokens_per_cpu_second"] = asdict(Spread.of(speeds[name]))
        ratio = [mine / theirs for mine, theirs in zip(speeds["ours"], speeds[name], strict=True)]
        found[name]["ours_is_faster_by"] = asdict(Spread.of(ratio))
        found[name]["first_batch"] = {kind: first_batch(opened[name], opened["ours"], kind) for kind in OPENINGS}
    return found


Opened = dict[str, tuple[float, float]]
"""By kind of opening: wall and CPU seconds until the first batch was there."""


def first_batch(times: list[Opened], ours: list[Opened], kind: str) -> dict[str, Any]:
    """Seconds of one kind of opening over the rounds, and the CPU seconds of ours over them."""
    ratio = [mine[kind][1] / theirs[kind][1] for mine, theirs in zip(ours, times, strict=True)]
    return {
        "seconds": asdict(Spread.of([one[kind][0] for one in times])),
        "cpu_seconds": asdict(Spread.of([one[kind][1] for one in times])),
        "ours_takes": asdict(Spread.of(ratio)),
    }


def prepared(name: str, task: Task, folder: Path, num_tokens: int) -> Path:
    """The folder with a side's data, written when it is first asked for."""
    side, width = SIDES[name], task.length + (task.model == "gpt")
    target = folder / (side.write.__name__ + (f"-{width}" if side.by_width else ""))
    if not target.exists():
        side.write(target, num_tokens, *((width,) if side.by_width else ()))
    return target


def serve(connection: Connection, name: str, task: Task, target: Path) -> None:
    """One side in its process: opens in each way as long as it is sent True, then a lap for each number of steps."""
    import torch

    torch.set_num_threads(1)
    read = partial(SIDES[name].read, target, task)
    next(read(0))  # what is imported on the way is not the loader's time
    connection.send("ready")
    while connection.recv():
        connection.send({kind: opening(read, target, kind) for kind in OPENINGS})
    batches = read(0)
    next(batches)
    connection.send(lap(batches, 5) / 5)
    while steps := connection.recv():
        connection.send(lap(batches, steps))
    # not getrusage's: that remembers the parent
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    connection.send({"resident_bytes": peak * 1024})


def opening(read: Callable[[int], Iterator[Any]], target: Path, kind: str) -> tuple[float, float]:
    """Wall and CPU seconds until the first batch of a new loader is there."""
    gc.collect()  # no loader before it holds its files
    if kind == "cold":
        for path in target.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    begin, cpu = time.perf_counter(), time.process_time()
    next(read(RESUME_STEP if kind == "resume" else 0))
    return time.perf_counter() - begin, time.process_time() - cpu


def lap(batches: Iterator[Any], steps: int) -> float:
    """CPU seconds of so many batches, of all threads."""
    begin = time.process_time()
    for _ in range(steps):
        next(batches)
    return time.process_time() - begin


def masking(rounds: int) -> dict[str, Any]:
    """Tokens per CPU-second of choosing and replacing alone, on rows that lie in memory."""
    from engine.config.schema.objective import ObjectiveConfig
    from engine.data.objectives.draws import PURPOSE_OBJECTIVE, words
    from engine.data.objectives.masking import mask, num_words
    from engine.data.shards.dataset import TokenDataset

    with tempfile.TemporaryDirectory() as folder:
        write_ours(Path(folder), 200_000)
        vocabulary = TokenDataset(folder).index.vocabulary
    assert vocabulary is not None
    found = {}
    for length in (128, 512):
        rows, objective = BATCH_TOKENS // length, ObjectiveConfig(name="masked")
        tokens = np.random.default_rng(0).integers(5, VOCAB, (rows, length))
        samples = np.stack([np.zeros(rows), np.zeros(rows), np.arange(rows)], axis=1).astype(np.int64)
        real, starts, speeds = np.ones((rows, length), bool), np.zeros((rows, length), bool), []
        for _ in range(max(rounds, 3)):
            begin = time.process_time()
            for _ in range(20):
                drawn = words(1, PURPOSE_OBJECTIVE, samples, num_words(length, objective.rate))
                mask(tokens.copy(), real, starts, objective, vocabulary, drawn)
            speeds.append(20 * BATCH_TOKENS / (time.process_time() - begin))
        found[f"length {length}"] = asdict(Spread.of(speeds))
    return found


if __name__ == "__main__":
    run(main)
