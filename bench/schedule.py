"""`python -m bench.schedule`: idle time and memory of the pipeline schedules, measured, beside the plan's formulas.

GPipe, 1F1B, interleaved 1F1B (two chunks) and ZB-H1 take turns in one run, round by round, on ranks with the same model
and micro-batches. On a machine with fewer free cores than stages wall time cannot show a schedule's idle time, so what
counts is a replay (`bench.replay`): the CPU time of every instruction, put together as the schedule's order lets stages
with cores of their own run them. The idle share is given for stages as they are, for stages that are alike (each
instruction as long as its kind is on average), and as `palimpsest plan` has it. What was held at once is counted, and
the bytes of a step are told by the allocator's hook. Wall time stands beside it, as a ratio within a round.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.command import run
from bench.contest import Spread, Worker, in_turn
from bench.machine import machine

TIMEOUT_SECONDS = 600.0
BASELINE = "1F1B"


@dataclass(frozen=True)
class Side:
    """One schedule with its chunks per stage."""

    schedule: Any
    chunks: int = 1

    @property
    def world(self) -> tuple[str, int]:
        """What its ranks are built for: linear layers of ZB-H1 put their weights' gradients off."""
        return ("zb-h1" if self.schedule == "zb-h1" else "1f1b", self.chunks)


SIDES = {
    "GPipe": Side("gpipe"),
    BASELINE: Side("1f1b"),
    "interleaved, 2 chunks": Side("1f1b", 2),
    "ZB-H1": Side("zb-h1"),
}


def main(
    rounds: Annotated[int, typer.Option(min=5, help="Rounds; every schedule has one turn in each.")] = 7,
    steps: Annotated[int, typer.Option(min=1, help="Steps of a turn.")] = 2,
    stages: Annotated[
        list[int] | None, typer.Option(min=2, max=4, help="Pipeline stages (default: 2, then 4).")
    ] = None,
    small: Annotated[bool, typer.Option("--small", help="A toy model: for tests, its shares mean nothing.")] = False,
    output: Annotated[Path | None, typer.Option(help="Write all figures to this JSON file.")] = None,
) -> None:
    """Compare idle time and memory of the pipeline schedules with the plan's formulas."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    result: dict[str, Any] = {"machine": machine(1), "rounds": rounds, "steps_per_turn": steps, "stages": {}}
    for pipe in stages or [2, 4]:
        found = compare(pipe, rounds, steps, small)
        result["stages"][str(pipe)] = found
        show(pipe, found)
        if output is not None:
            output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def tree_of(pipe: int, schedule: str, chunks: int, small: bool) -> dict[str, Any]:
    """8 layers, width 192, micro-batches of two rows of 128 tokens, twice as many as four stages; a toy if `small`."""
    width, length = (16, 8) if small else (192, 128)
    shape = {"vocab_size": 500, "num_layers": 8, "hidden_size": width, "num_heads": 4, "max_positions": length}
    stage = {
        "data": {"train": "nowhere", "attention": "row"},
        "sequence_length": length,
        "global_batch_size": 2 * 8,
        "duration": {"steps": 10},
    }
    return {
        "folder": "nowhere",
        "tokenizer": "nowhere",
        "model": shape,
        "stages": [stage],
        "precision": {"dtype": "fp32"},
        "parallel": {
            "pipe": pipe,
            "data": 1,
            "schedule": schedule,
            "chunks_per_stage": chunks,
            "micro_batch_size": 2,
        },
    }


def compare(pipe: int, rounds: int, steps: int, small: bool) -> dict[str, Any]:
    """Figures by schedule, as JSON values."""
    from bench.ranks_schedule import Request, Step
    from engine.config.load import parse_run
    from engine.config.resolve import num_micro_batches

    configs = {side.world: parse_run(tree_of(pipe, *side.world, small), "bench.schedule") for side in SIDES.values()}
    base = configs[SIDES[BASELINE].world]
    turns: dict[str, list[list[list[Step]]]] = {name: [] for name in SIDES}  # by round, stage and step
    with ExitStack() as stack:
        worlds = {built: stack.enter_context(world(config, pipe)) for built, config in configs.items()}
        for side in SIDES.values():  # the first step makes what later ones find
            ask(worlds[side.world], Request(side.schedule))
        for name in in_turn(list(SIDES), rounds):
            turns[name].append(ask(worlds[SIDES[name].world], Request(SIDES[name].schedule, steps)))
        peaks = {name: ask(worlds[side.world], Request(side.schedule, memory=True)) for name, side in SIDES.items()}
    count = num_micro_batches(base.stages[0].global_batch_size, base.parallel, data_size=1)
    return {name: figures(name, pipe, count, turns, peaks) for name in SIDES}


@contextmanager
def world(config: Any, size: int) -> Iterator[list[Worker]]:
    """The ranks of a configuration, ready."""
    from bench import ranks_schedule

    with tempfile.TemporaryDirectory() as folder:
        workers = [
            Worker(f"stage {number}", "forkserver", {}, ranks_schedule.rank, config, folder, number, size)
            for number in range(size)
        ]
        try:
            for worker in workers:
                worker.receive(TIMEOUT_SECONDS)
            yield workers
        finally:
            for worker in workers:
                worker.end()


def ask(workers: Sequence[Worker], request: Any) -> list[Any]:
    """Every stage's answer."""
    for worker in workers:
        worker.connection.send(request)
    return [worker.receive(TIMEOUT_SECONDS) for worker in workers]


def figures(
    name: str, pipe: int, count: int, turns: dict[str, list[list[list[Any]]]], peaks: dict[str, list[int]]
) -> dict[str, Any]:
    """Of one schedule; ratios are over 1F1B, round by round."""
    from bench.replay import levelled, replay
    from engine.plan.pipeline import bubble, in_flight

    side, own, base = SIDES[name], turns[name], turns[BASELINE]
    spans = [typical(turn) for turn in own]
    steps = [replay(stages, side.chunks) for stages in spans]
    alike = [replay(levelled(stages), side.chunks) for stages in spans]
    base_steps = [replay(typical(turn), 1) for turn in base]
    wall, base_wall = ([slowest(turn) for turn in held] for held in (own, base))
    return {
        "idle_share": {
            "plan": float(bubble(side.schedule, pipe, side.chunks, count)),
            "alike": asdict(Spread.of([step.idle_share for step in alike])),
            "as_measured": asdict(Spread.of([step.idle_share for step in steps])),
        },
        "busy_cpu_seconds": asdict(Spread.of([sum(step.busy) for step in steps])),
        "busy_over_1f1b": asdict(ratios([sum(s.busy) for s in steps], [sum(s.busy) for s in base_steps])),
        "step_over_1f1b": asdict(ratios([s.length for s in steps], [s.length for s in base_steps])),
        "wall_seconds": asdict(Spread.of(wall)),
        "wall_over_1f1b": asdict(ratios(wall, base_wall)),
        "mean_seconds": mean_seconds(spans),
        "in_flight": [
            {
                "plan": in_flight(side.schedule, stage, pipe, side.chunks, count),
                "held": max(step.in_flight for turn in own for step in turn[stage]),
            }
            for stage in range(pipe)
        ],
        "step_bytes": peaks[name],
        "step_bytes_over_1f1b": [one / other for one, other in zip(peaks[name], peaks[BASELINE], strict=True)],
    }


def typical(turn: list[list[Any]]) -> list[list[tuple[Any, float]]]:
    """Spans of every stage, each instruction as long as the median of the turn's steps."""
    return [
        [
            (spans[0][0], statistics.median(seconds for _, seconds in spans))
            for spans in zip(*(step.spans for step in stage), strict=True)
        ]
        for stage in turn
    ]


def slowest(turn: list[list[Any]]) -> float:
    """Median wall seconds of a step on the stage that took longest."""
    return max(statistics.median(step.wall_seconds for step in stage) for stage in turn)


def ratios(own: Sequence[float], others: Sequence[float]) -> Spread:
    return Spread.of([one / other for one, other in zip(own, others, strict=True)])


def mean_seconds(rounds: Sequence[Sequence[Sequence[tuple[Any, float]]]]) -> dict[str, float]:
    """CPU seconds of each kind of instruction."""
    kinds: dict[str, list[float]] = {}
    for instruction, seconds in (span for stages in rounds for spans in stages for span in spans):
        kinds.setdefault(type(instruction).__name__, []).append(seconds)
    return {kind: statistics.mean(found) for kind, found in kinds.items()}


def show(pipe: int, found: dict[str, Any]) -> None:
    """Prints the table of one number of stages: medians, with least..greatest."""
    print(
        f"\n{f'{pipe} stages':<22} {'plan':>6} {'idle, stages alike':>22} {'idle as measured':>22} "
        f"{'step / 1F1B':>22} {'CPU / 1F1B':>22} {'wall / 1F1B':>22}  held (bound), bytes / 1F1B"
    )
    for name, row in found.items():
        shares = row["idle_share"]
        cells = [
            Spread(**cell)
            for cell in (
                shares["alike"],
                shares["as_measured"],
                row["step_over_1f1b"],
                row["busy_over_1f1b"],
                row["wall_over_1f1b"],
            )
        ]
        held = ", ".join(f"{stage['held']} ({stage['plan']})" for stage in row["in_flight"])
        more = ", ".join(f"{ratio:.2f}" for ratio in row["step_bytes_over_1f1b"])
        print(
            f"{name:<22} {shares['plan']:>6.3f} {' '.join(f'{cell!s:>22}' for cell in cells)}  {held}; {more}",
            flush=True,
        )


if __name__ == "__main__":
    run(main)
