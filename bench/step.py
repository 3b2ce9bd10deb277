"""`python -m bench.step`: the CPU time of our step against transformers' Trainer and plain torch, in one run.

All sides start from the same weights and see the same batches; their losses are compared over the first steps, and
a side that computes something else is not timed. Then the sides take turns, round by round, and the median ratio of
a round's CPU seconds is what counts (below 1 is faster). Nothing here decides what a good ratio is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.command import run
from bench.contest import Contestant, ContestFailed, Lap, Spread, ratios, run_rounds
from bench.machine import machine
from launcher.devices import multiplies_bf16

TRAINER, PLAIN, MODULES = "transformers Trainer", "plain torch", "our modules, plain loop"
CHECK_STEPS = 5
"""Steps whose losses must agree before anything is timed; the timed steps come after them."""
BF16_EPSILON = 2.0**-8
"""Relative rounding error of bf16. Half of the sides round weights to it, half only what they multiply."""
FP32_TOLERANCE = 1e-4
"""Between losses of fp32 sides, which differ in the order of sums alone."""


class PrecisionChoice(StrEnum):
    """What `--precision` takes."""

    FP32 = "fp32"
    BF16 = "bf16"
    ALL = "all"


def main(
    rounds: Annotated[int, typer.Option(min=5, help="Rounds; every side has one turn in each.")] = 7,
    steps: Annotated[int, typer.Option(min=1, help="Steps of a turn.")] = 6,
    threads: Annotated[int, typer.Option(min=1, help="torch threads of each side.")] = 1,
    precision: Annotated[
        PrecisionChoice, typer.Option(help="bf16 needs a processor that multiplies it.")
    ] = PrecisionChoice.ALL,
    small: Annotated[bool, typer.Option("--small", help="A toy model: for tests, its ratios mean nothing.")] = False,
    output: Annotated[Path | None, typer.Option(help="Write all figures to this JSON file.")] = None,
) -> None:
    """Compare the CPU time of a training step: ours under ZeRO 0, 1, 3, transformers' Trainer, plain torch."""
    os.environ["DS_ACCELERATOR"] = "cpu"  # a GPU at hand is not looked at
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    shape = make_shape(small)
    result: dict[str, Any] = {
        "machine": machine(threads),
        "shape": {"model": shape.model.model_dump(mode="json"), "length": shape.length, "rows": shape.rows},
        "rounds": rounds,
        "steps_per_turn": steps,
    }
    print(f"{describe(result['machine'])}\n{shape.tokens} tokens per step, {rounds} rounds of {steps} steps")
    for name in wanted(precision):
        print(f"\n{name}: checking that all sides compute the same", flush=True)
        result[name] = compare(shape, name, rounds, steps, threads)
        show(result[name])
        if output is not None:
            output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def make_shape(small: bool) -> Any:
    """6 layers, width 384, length 256, vocabulary 8,192 and 1,024 tokens per step; a toy of it if `small`."""
    from bench.ours import Shape
    from engine.config.schema.model import GPTConfig

    if small:
        model = GPTConfig(vocab_size=250, num_layers=2, hidden_size=32, num_heads=2, max_positions=32)
        return Shape(model, length=32, rows=4, micro_rows=4)
    model = GPTConfig(vocab_size=8192, num_layers=6, hidden_size=384, num_heads=6, max_positions=256)
    return Shape(model, length=256, rows=4, micro_rows=4)


def wanted(choice: PrecisionChoice) -> list[str]:
    """Precisions to run; bf16 only where it is asked for by name or native."""
    if choice is not PrecisionChoice.ALL:
        return [choice.value]
    return ["fp32", "bf16"] if multiplies_bf16() else ["fp32"]


def sides(shape: Any, precision: str, threads: int) -> dict[str, Callable[[], Contestant]]:
    """The contestants by name. ZeRO-0 has no bf16: its contract refuses it."""
    from bench import ours, plain, theirs

    made: dict[str, Callable[[], Contestant]] = {
        TRAINER: lambda: Contestant(TRAINER, "forkserver", theirs.contestant, shape, precision, threads),
        PLAIN: lambda: Contestant(PLAIN, "forkserver", plain.plain_contestant, shape, precision, threads),
        MODULES: lambda: Contestant(MODULES, "forkserver", plain.modules_contestant, shape, precision, threads),
    }
    for zero_stage in (0, 1, 3) if precision == "fp32" else (1, 3):
        name = f"ours, ZeRO-{zero_stage}"
        made[name] = partial(Contestant, name, "forkserver", ours.contestant, shape, zero_stage, precision, threads)
    return made


def compare(shape: Any, precision: str, rounds: int, steps: int, threads: int) -> dict[str, Any]:
    """One precision: losses checked, then laps; figures by side. Ratios are ours (or an anchor's) over Trainer's."""
    contestants = [start() for start in sides(shape, precision, threads).values()]
    try:
        for contestant in contestants:
            contestant.wait_ready()
        losses = {contestant.name: contestant.lap(CHECK_STEPS).losses for contestant in contestants}
        tolerance = FP32_TOLERANCE if precision == "fp32" else BF16_EPSILON * losses[TRAINER][0]
        check_losses(losses, tolerance)
        laps = run_rounds(contestants, rounds, steps)
    finally:
        for contestant in contestants:
            contestant.end()
    return figures(losses, laps, steps)


def check_losses(losses: dict[str, list[float]], tolerance: float) -> None:
    """Raises `ContestFailed` where a side's loss is further than `tolerance` from Trainer's at any step."""
    expected = losses[TRAINER]
    for name, found in losses.items():
        distance = max(abs(one - other) for one, other in zip(found, expected, strict=True))
        if not distance <= tolerance:
            raise ContestFailed(
                f"{name} computes something else than {TRAINER}: losses {found} against {expected}",
                f"equal within {tolerance:.1e}",
                "look for a difference in weights, batch, clip, decay groups or loss before timing anything",
            )


def figures(losses: dict[str, list[float]], laps: dict[str, list[Lap]], steps: int) -> dict[str, Any]:
    """Losses, seconds per step and ratios to Trainer and to plain torch, by side, as JSON values."""
    return {
        name: {
            "losses": losses[name],
            "cpu_seconds_per_step": asdict(Spread.of([lap.cpu_seconds / steps for lap in own])),
            "wall_seconds_per_step": asdict(Spread.of([lap.wall_seconds / steps for lap in own])),
            "cpu_over_trainer": asdict(ratios(own, laps[TRAINER])),
            "wall_over_trainer": asdict(ratios(own, laps[TRAINER], "wall_seconds")),
            "cpu_over_plain": asdict(ratios(own, laps[PLAIN])),
        }
        for name, own in laps.items()
    }


def show(found: dict[str, Any]) -> None:
    """Prints the table of one precision: medians, with least..greatest."""
    print(f"{'CPU seconds; median (least..greatest)':<38} {'a step':>24} {'/ Trainer':>22} {'/ plain torch':>22}")
    for name, row in found.items():
        cells = [Spread(**row[key]) for key in ("cpu_seconds_per_step", "cpu_over_trainer", "cpu_over_plain")]
        print(f"{name:<38} {cells[0]!s:>24} {cells[1]!s:>22} {cells[2]!s:>22}")


def describe(facts: dict[str, Any]) -> str:
    """The machine in two lines."""
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items() if number)
    return (
        f"{facts['processor']}, {facts['cores']} cores, {facts['threads']} threads used, load {facts['load_average']}\n"
        f"python {facts['python']}, {versions}, commit {facts['commit']}"
    )


if __name__ == "__main__":
    run(main)
