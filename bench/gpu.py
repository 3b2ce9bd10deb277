"""`python -m bench.gpu`: is our engine right on this GPU, and how fast is it; everything within ten minutes.

Correctness first: losses and gradient norms of several steps against the CPU in fp32, bf16 near fp32, and a save
and load on the device. Then tokens per second, MFU and peak memory of GPT-2 at three sizes under ZeRO-1 and ZeRO-3,
at several micro-batch sizes. Each case is a process of its own, so that one that runs out of memory costs itself
alone, and the results so far are on the disk after each. With `--toy` the same code runs at toy size, on a CPU where
there is no GPU.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.command import run
from bench.contest import ContestFailed, Worker
from bench.machine import machine
from engine.atomic import write_atomically

RESULTS = Path(__file__).parent / "results"
CASE_SECONDS = {"correctness": 90.0, "speed": 120.0}
"""At most this long for one case; a case that is cut off keeps what it had found."""
LEAST_SECONDS = 20.0
"""With less than this left no case is started: a process needs it to begin."""


def main(
    minutes: Annotated[float, typer.Option(min=0.5, help="End within this time; what is left out is named.")] = 9.5,
    toy: Annotated[bool, typer.Option("--toy", help="Toy size, on a CPU where there is no GPU.")] = False,
    only: Annotated[str, typer.Option(help="Run the cases whose names contain this (regular expression).")] = "",
    profile: Annotated[
        bool, typer.Option(help="Also name the kernels that the best micro-batch spends time in.")
    ] = True,
    output: Annotated[Path | None, typer.Option(help="JSON file (default: bench/results/DEVICE-DATE.json).")] = None,
) -> None:
    """Check correctness and measure speed on one GPU."""
    deadline = time.monotonic() + 60 * minutes
    device = find_device(toy)
    facts = machine(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    result: dict[str, Any] = {"device": device, "machine": facts, "toy": toy, "correctness": {}, "speed": {}}
    path = output or default_path(device["name"], facts["date"])
    print(f"{device['name']}, {facts['processor']}, {facts['versions']}\nwriting {path}", flush=True)
    for kind, name, function, arguments in cases(device, toy, profile):
        if not re.search(only, name):
            continue
        found = result[kind].setdefault(name, {})
        run_case(name, device, function, arguments, deadline, CASE_SECONDS[kind], found)
        write(result, path)
        print(f"{kind}: {name}: {short(found)}", flush=True)
    from bench.correctness import verdicts

    result["verdicts"] = verdicts(result["correctness"])
    write(result, path)
    for name, verdict in result["verdicts"].items():
        print(f"{name}: {verdict}")
    if not all(verdict.startswith("ok") for verdict in result["verdicts"].values()):
        raise ContestFailed("this device does not compute what the CPU does", remedy=f"see the verdicts in {path}")


def find_device(toy: bool) -> dict[str, Any]:
    """Name, type, memory and peak of the first GPU; of the CPU if `toy` and there is none.

    Raises:
        ContestFailed: there is no GPU.
    """
    import torch

    from bench.speed import peak_operations

    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        return {
            "name": found.name,
            "type": "cuda",
            "memory_bytes": found.total_memory,
            "peak_operations": peak_operations(found.name),
            "cuda": torch.version.cuda,
        }
    os.environ["DS_ACCELERATOR"] = "cpu"
    if not toy:
        raise ContestFailed("no GPU that torch can use", "one CUDA device", "look at nvidia-smi, or pass --toy")
    return {"name": "CPU", "type": "cpu", "memory_bytes": None, "peak_operations": None, "cuda": None}


Case = tuple[str, str, Callable[..., None], tuple[Any, ...]]
"""(kind, name, function of a worker, its arguments)"""


def cases(device: dict[str, Any], toy: bool, profile: bool) -> Iterator[Case]:
    """Every case in the order of its worth: what comes last is left out first."""
    from bench import correctness, speed

    for name, arguments in correctness.cases(device["type"], toy):
        yield "correctness", name, correctness.work, arguments
    for name, arguments in speed.cases(device["peak_operations"], toy):
        yield "speed", name, speed.work, (*arguments, profile)


def run_case(
    name: str,
    device: dict[str, Any],
    function: Callable[..., None],
    arguments: tuple[Any, ...],
    deadline: float,
    limit_seconds: float,
    found: dict[str, Any],
) -> None:
    """Runs one case in a process of its own and fills `found` with what it sends, piece by piece.

    `function(connection, end, *arguments)` is told when it will be cut off, on the monotonic clock, which all processes
    of a machine share. A failure of any kind is an entry `failed` and no error: the other cases have something to say.
    """
    end = min(deadline, time.monotonic() + limit_seconds)
    if end - time.monotonic() < LEAST_SECONDS:
        found["failed"] = "left out: no time left"
        return
    # On a CPU a fork server has torch and DeepSpeed loaded; a process with CUDA must not come from a fork.
    method = "spawn" if device["type"] == "cuda" else "forkserver"
    on_cpu = {"DS_ACCELERATOR": "cpu"} if name.startswith("cpu") or device["type"] == "cpu" else {}
    worker = Worker(name, method, on_cpu, function, end, *arguments)
    try:
        while (piece := worker.receive(end - time.monotonic())) is not None:
            found |= piece
    except ContestFailed as error:
        found["failed"] = error.wrong
    finally:
        worker.end()


def default_path(device: str, date: str) -> Path:
    """bench/results/DEVICE-DATE.json, the device's name in lower case with hyphens."""
    return RESULTS / f"{re.sub('[^a-z0-9]+', '-', device.lower())}-{date[:10]}.json"


def write(result: dict[str, Any], path: Path) -> None:
    """Write everything found so far; a reader never sees half a file."""
    write_atomically(path, json.dumps(result, indent=1) + "\n")


def short(found: dict[str, Any]) -> str:
    """One line about what a case found."""
    if "failed" in found:
        return str(found["failed"]).strip().splitlines()[-1]
    if "best" in found:
        best = found["best"]
        share = "" if best["mfu"] is None else f", MFU {100 * best['mfu']:.1f} %"
        return f"{best['tokens_per_second']['median']:,.0f} tokens/s at micro-batch {best['micro_rows']}{share}"
    return ", ".join(f"{loss:.4f}" for loss in found.get("losses", []))


if __name__ == "__main__":
    run(main)
