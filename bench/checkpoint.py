"""`python -m bench.checkpoint`: how long a save holds training up: ours, DeepSpeed's native save, torch's DCP.

Ours saves to the disk, beside training or waiting, and into the memory of the node.

The sides take turns, round by round, in processes of their own, on one disk. The stall is the call that saves, by
which the step that ends with it is longer, and what the next update of the weights waits for copies. The drag is what
the steps beside the writing take longer, in all. Ratios are formed within a round: the stall over that of our own
synchronous save, and over DeepSpeed's. DeepSpeed's native save does not flush to the disk; the others do. Nothing
here decides what a good ratio is.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.command import run
from bench.contest import Spread, Worker, in_turn
from bench.machine import machine

OURS, OURS_SYNC, NATIVE = "ours, beside training", "ours, waiting", "DeepSpeed native"
MEMORY = "ours, into the node's memory"
DCP, DCP_ASYNC = "torch DCP", "torch DCP async"
TIMEOUT_SECONDS = 600.0


def main(
    rounds: Annotated[int, typer.Option(min=5, help="Rounds; every side saves once in each.")] = 5,
    small: Annotated[bool, typer.Option("--small", help="A toy model: for tests, its figures mean nothing.")] = False,
    folder: Annotated[Path | None, typer.Option(help="Disk to write to; a temporary folder by default.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write all figures to this JSON file.")] = None,
) -> None:
    """Compare what a save costs the training: stall of the saving step, drag on later steps, time until it stands."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    shape = make_shape(small)
    shared = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=folder) as target, tempfile.TemporaryDirectory(dir=shared) as memory:
        turns = compete(shape, rounds, Path(target), memory)
    result = {
        "machine": machine(1),
        "shape": {"model": shape.model.model_dump(mode="json"), "length": shape.length, "rows": shape.rows},
        "state_bytes": state_bytes(shape),
        "rounds": rounds,
        "sides": figures(turns),
    }
    show(result)
    if output is not None:
        output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def make_shape(small: bool) -> Any:
    """8 layers, width 512, 29 million parameters: 0.35 GB of weights and moments; a toy of it if `small`."""
    from bench.ours import Shape
    from engine.config.schema.model import GPTConfig

    if small:
        model = GPTConfig(vocab_size=250, num_layers=2, hidden_size=32, num_heads=2, max_positions=32)
        return Shape(model, length=32, rows=2, micro_rows=2)
    model = GPTConfig(vocab_size=8192, num_layers=8, hidden_size=512, num_heads=8, max_positions=128)
    return Shape(model, length=128, rows=2, micro_rows=2)


def state_bytes(shape: Any) -> int:
    """Bytes of fp32 weights and both moments."""
    from engine.models.gpt import specs

    return 12 * sum(spec.local_numel(1) for spec in specs(shape.model))


def compete(shape: Any, rounds: int, folder: Path, memory: str) -> dict[str, list[Any]]:
    """Every side's turns, one per round; who goes first moves on by one each round. `memory` is a folder in memory."""
    from bench import savers

    makers = {
        OURS: partial(savers.OurSide, shape, True),
        OURS_SYNC: partial(savers.OurSide, shape, False),
        MEMORY: partial(savers.MemorySide, shape, memory, str(folder)),
        NATIVE: partial(savers.DeepSpeedSide, shape),
        DCP: partial(savers.DcpSide, shape, False),
        DCP_ASYNC: partial(savers.DcpSide, shape, True),
    }
    targets = [folder / str(number) for number in range(len(makers))]
    for target in targets:
        target.mkdir()
    workers = [
        Worker(name, "forkserver", {}, savers.serve, make, str(target))
        for (name, make), target in zip(makers.items(), targets, strict=True)
    ]
    turns: dict[str, list[Any]] = {worker.name: [] for worker in workers}
    try:
        for worker in workers:
            worker.receive(TIMEOUT_SECONDS)
        for worker in in_turn(workers, rounds):
            os.sync()  # what one side left in the page cache is not written out in another's turn
            worker.connection.send("turn")
            turns[worker.name].append(worker.receive(TIMEOUT_SECONDS))
    finally:
        for worker in workers:
            worker.end()
    return turns


def figures(turns: dict[str, list[Any]]) -> dict[str, Any]:
    """Seconds by side, and ratios of stalls within a round, as JSON values."""
    stalls = {name: [one.stall for one in own] for name, own in turns.items()}

    def over(name: str, other: str) -> dict[str, float]:
        return asdict(Spread.of([a / b for a, b in zip(stalls[name], stalls[other], strict=True)]))

    return {
        name: {
            "ordinary_step_seconds": asdict(Spread.of([statistics.median(one.ordinary) for one in own])),
            "stall_seconds": asdict(Spread.of(stalls[name])),
            "drag_seconds": asdict(Spread.of([drag(one) for one in own])),
            "durable_seconds": asdict(Spread.of([one.durable for one in own])),
            "stall_over_our_synchronous": over(name, OURS_SYNC),
            "stall_over_deepspeed": over(name, NATIVE),
            "turns": [asdict(one) for one in own],
        }
        for name, own in turns.items()
    }


def drag(turn: Any) -> float:
    """What the steps beside the writing took beyond ordinary ones, in seconds."""
    return sum(turn.after) - len(turn.after) * statistics.median(turn.ordinary)


def show(result: dict[str, Any]) -> None:
    """Prints the table: medians, with least..greatest."""
    load = result["machine"]["load_average"]
    print(f"{result['state_bytes'] / 1e6:.0f} MB of state, {result['rounds']} rounds, load {load}")
    heads = ("stall", "drag", "until it stands", "stall / our waiting")
    print(f"{'seconds; median (least..greatest)':<34} " + " ".join(f"{head:>22}" for head in heads))
    keys = ("stall_seconds", "drag_seconds", "durable_seconds", "stall_over_our_synchronous")
    for name, row in result["sides"].items():
        cells = [Spread(**row[key]) for key in keys]
        print(f"{name:<34} " + " ".join(f"{cell!s:>22}" for cell in cells))


if __name__ == "__main__":
    run(main)
