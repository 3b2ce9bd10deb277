"""`python -m bench.convert`: CPU seconds and peak memory of `palimpsest convert`, beside a conversion in memory.

Two sides take turns, each in a process of its own, whose CPU seconds (user and system, imports included) and largest
resident memory the system counts: `convert` as users call it, which streams and reads back every weight; and the way
through transformers with the whole model in memory (weights, `save_pretrained`, `from_pretrained`, comparison of all
weights), as `convert` did it before it was streamed. Ratios are paired within a round; what both sides import (torch,
transformers and its class) is measured alone, too. A larger model shows that memory does not grow with it.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.command import run
from bench.machine import machine

GIB = 2**30
ALLOWANCE_BYTES = GIB // 2
"""Bytes of memory that a conversion may take beside its two largest tensors."""
_SIZES: dict[str, dict[str, Any]] = {
    "254 M, GPT-2 form": {"vocab_size": 50257, "num_layers": 16, "hidden_size": 1024, "num_heads": 16},
    "1.2 B, Llama form": {
        "vocab_size": 32000,
        "num_layers": 16,
        "hidden_size": 2048,
        "num_heads": 16,
        "feed_forward_size": 8192,
        "position": "rope",
        "norm": "rmsnorm",
        "activation": "swiglu",
        "bias": False,
        "tie_embeddings": False,
    },
}
_WHOLE = "254 M, GPT-2 form"
"""Model that is converted in memory, too."""


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of both sides on the smaller model.")] = 3,
    small: Annotated[bool, typer.Option("--small", help="Toy models: for tests, their figures mean nothing.")] = False,
    only: Annotated[list[str] | None, typer.Option(help="Models whose name has one of these in it.")] = None,
    scratch: Annotated[Path | None, typer.Option(help="Folder for the models, 10 GB at the most.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write all figures to this JSON file.")] = None,
) -> None:
    """Measure `palimpsest convert --to huggingface` and back."""
    result: dict[str, Any] = {"machine": machine(1), "models": {}}
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        for name, sizes in _SIZES.items():
            if not any(part in name for part in only or [""]):
                continue
            if small:
                sizes = sizes | {"vocab_size": 500, "num_layers": 2, "hidden_size": 64, "feed_forward_size": 128}
            found = measure(Path(folder) / str(len(result["models"])), sizes, rounds if name == _WHOLE else 0)
            result["models"][name] = found
            _show(name, found)
            if output is not None:
                output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def measure(folder: Path, sizes: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Return the figures of one model: `rounds` of both sides, or with 0 rounds one of `convert` alone."""
    about = json.loads(_child("make", folder, json.dumps(sizes))["said"])
    sides: dict[str, list[dict[str, Any]]] = {}
    for number, side in _turns(rounds):
        taken = _child(side, folder, str(number))
        sides.setdefault(side, []).append({key: taken[key] for key in ("cpu_seconds", "peak_bytes", "wall_seconds")})
    taken = _child("back", folder)
    sides["back"] = [{key: taken[key] for key in ("cpu_seconds", "peak_bytes", "wall_seconds")}]
    ratios = [
        ours["cpu_seconds"] / theirs["cpu_seconds"]
        for ours, theirs in zip(sides["convert"], sides.get("in memory", []), strict=bool(rounds))
    ]
    return about | {"sides": sides, "convert_over_in_memory": ratios}


def _turns(rounds: int) -> Iterator[tuple[int, str]]:
    if not rounds:
        yield 0, "convert"
    for number in range(rounds):
        order = ("convert", "in memory") if number % 2 == 0 else ("in memory", "convert")
        yield from ((number, side) for side in ("imports", *order))


def _child(step: str, folder: Path, *arguments: str) -> dict[str, Any]:
    """Run one step in a process of its own; return what it said and took."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.convert_steps", step, str(folder), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{step} failed:\n{said}")
    return {
        "said": said.strip().splitlines()[-1] if said.strip() else "",
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_bytes": usage.ru_maxrss * 1024,
        "wall_seconds": round(time.monotonic() - began, 1),
    }


def _show(name: str, found: dict[str, Any]) -> None:
    allowed = ALLOWANCE_BYTES + sum(found["largest_tensors_bytes"])
    print(f"{name}: {found['num_parameters'] / 1e6:,.0f} M parameters, {found['num_bytes'] / GIB:.2f} GiB in fp32")
    for side, laps in found["sides"].items():
        seconds = [lap["cpu_seconds"] for lap in laps]
        peak = max(lap["peak_bytes"] for lap in laps)
        print(
            f"  {side:>10}: {statistics.median(seconds):7.2f} CPU s ({min(seconds):.2f} to {max(seconds):.2f}), peak "
            f"{peak / GIB:.2f} GiB (bar {allowed / GIB:.2f})"
        )
    if ratios := found["convert_over_in_memory"]:
        print(f"  convert / in memory: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    run(main)
