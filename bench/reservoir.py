"""The replay reservoir at its full size: rows admitted per CPU-second, and memory, while it fills, is full, and merges.

    python -m bench.reservoir --output bench/results/cpu-reservoir-DATE.json

Memory is what numpy has asked for (`tracemalloc`), beyond what there was before; CPU seconds are taken in turns of
their own, since counting allocations takes time.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from bench.command import run
from bench.machine import machine
from engine.data.replay.files import write
from engine.data.replay.reservoir import Reservoir, Settings
from engine.data.replay.rows import Rows

SHARD_ROWS = 20_000


def main(
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    rows: Annotated[int, typer.Option(min=SHARD_ROWS, help="Rows of the reservoir.")] = 10_000_000,
) -> None:
    """Measure the reservoir."""
    found: dict[str, Any] = {"machine": machine(1), "rows": rows}
    found["speed"] = turns(rows, cpu_seconds)
    found["memory"] = turns(rows, traced)
    print(json.dumps(found, indent=1))
    if output is not None:
        output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def turns(rows: int, measure: Callable[[Callable[[], None], int], dict[str, float]]) -> dict[str, dict[str, float]]:
    """Figures of each turn of one reservoir."""
    reservoir, shards = Reservoir(Settings(rows, 1)), rows // SHARD_ROWS
    reservoir.add_domain("bench", "fingerprint", 1)
    part = reservoir.empty()
    admit(part, 2 * shards, shards // 8)
    with tempfile.TemporaryDirectory() as folder:
        found = {
            "fill": measure(lambda: admit(reservoir, 0, shards), rows),
            "as many rows again": measure(lambda: admit(reservoir, shards, shards), rows),
            "merge of an eighth": measure(lambda: reservoir.merge(part), part.num_rows),
            "write all": measure(lambda: save(Path(folder), reservoir), rows),
        }
        few = reservoir.empty()
        admit(few, 4 * shards, 10)
        reservoir.merge(few)
        fresh = sum(int(entries.is_fresh.sum()) for entries in reservoir.entries.values())
        return found | {"write what 10 shards changed": measure(lambda: save(Path(folder), reservoir, True), fresh)}


def admit(reservoir: Reservoir, first: int, count: int) -> None:
    """Admit all rows of some shards."""
    inside = np.arange(SHARD_ROWS, dtype=np.uint64) << np.uint64(16)
    rows = Rows(inside, np.full(SHARD_ROWS, 2048, np.uint16))
    for number in range(first, first + count):
        reservoir.admit("bench", hashlib.sha256(str(number).encode()).hexdigest()[:32], rows)
    reservoir.settle()


def save(folder: Path, reservoir: Reservoir, only_fresh: bool = False) -> None:
    """Write the reservoir, or what is new in it."""
    write(folder, reservoir, only_fresh)
    reservoir.mark_written()


def cpu_seconds(action: Callable[[], None], rows: int) -> dict[str, float]:
    """CPU seconds of an action, and rows per second."""
    begin = time.process_time()
    action()
    seconds = time.process_time() - begin
    return {"cpu_seconds": seconds, "rows": rows, "rows_per_cpu_second": rows / max(seconds, 1e-9)}


def traced(action: Callable[[], None], rows: int) -> dict[str, float]:
    """MB that are held after an action, and at its peak."""
    del rows
    if not tracemalloc.is_tracing():
        tracemalloc.start()
    tracemalloc.reset_peak()
    action()
    held, peak = tracemalloc.get_traced_memory()
    return {"held_mb": held / 1e6, "peak_mb": peak / 1e6}


if __name__ == "__main__":
    run(main)
