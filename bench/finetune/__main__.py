"""Fine-tuning beside transformers' Trainer: the same start, recipe and rows, three seeds.

    python -m bench.finetune --data DATA --output bench/results/cpu-finetune-DATE.json

An encoder is pretrained first, by the project's own commands, on the text in DATA/corpus and on the texts of the
training rows, without their labels. Then each task set in DATA/tasks is trained by `palimpsest finetune`, by Trainer,
and by `palimpsest finetune` from random weights; with 10, 100 and 1,000 rows without Trainer. With `--ablate` each
guard against overfitting is tried alone instead. Finished parts are kept below `--work` and not done again.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.command import run
from bench.finetune import ablations
from bench.finetune.cells import Cell, Cells, Result
from bench.finetune.encoder import Encoder, Size
from bench.finetune.report import OURS, RANDOM, THEIRS, bars, summarize, table
from bench.finetune.sets import SETS, TaskSet
from bench.machine import machine
from engine.errors import ConfigError

FEW = (10, 100, 1000)


def main(
    data: Annotated[Path, typer.Option(help="Folder with corpus/ and tasks/.", envvar="PALIMPSEST_DATA")],
    work: Annotated[Path, typer.Option(help="Folder of the encoder and of finished cells.")] = Path(
        "build/bench-finetune"
    ),
    output: Annotated[Path | None, typer.Option(help="Write all figures to this JSON file.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Task sets to run alone.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of each cell.")] = 3,
    processes: Annotated[int, typer.Option(min=1, help="Cells that train at a time, one thread each.")] = 2,
    few: Annotated[bool, typer.Option(help="Train with few rows, too.")] = True,
    ablate: Annotated[bool, typer.Option("--ablate", help="Try each guard against overfitting alone instead.")] = False,
    pretraining_steps: Annotated[int, typer.Option(min=1, help="Steps of the encoder's pretraining.")] = Size.steps,
    rows: Annotated[
        int | None, typer.Option(min=32, help="Rows of each half: for a look, figures mean little.")
    ] = None,
) -> None:
    """Pretrain the encoder, train all cells, and print the table and the bars."""
    chosen = [task for task in SETS if not only or task.name in only]
    if only and len(chosen) < len({*only}):
        raise ConfigError(f"--only = {', '.join(only)}", ", ".join(task.name for task in SETS), "choose from these")
    os.environ["DS_ACCELERATOR"] = "cpu"
    encoder = Encoder(data, work / f"encoder-{pretraining_steps}", Size(pretraining_steps))
    encoder.make()
    cells = Cells(data, work / "cells", encoder, rows)
    planned = ablation_cells(seeds) if ablate else cells_of(chosen, seeds, few)
    figures = (_ablations if ablate else _compared)(cells.run(planned, processes))
    if output is not None:
        size = {"layers": encoder.size.layers, "hidden": encoder.size.hidden, "steps": encoder.size.steps}
        found = {"machine": machine(1), "encoder": size, "rows": rows, "seeds": seeds, **figures}
        output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _compared(results: dict[Cell, Result]) -> dict[str, Any]:
    """Print the table of the sides and the bars; return their figures."""
    entries = summarize(results)
    met = bars(entries)
    print(f"\n{table(entries)}\n")
    print("\n".join(f"{'met' if is_met else 'NOT met':<8}{words}" for words, is_met in met.items()))
    return {"entries": entries, "bars": met}


def _ablations(results: dict[Cell, Result]) -> dict[str, Any]:
    """Print the table of the switches; return their figures."""
    scores: dict[str, list[dict[str, float]]] = {}
    for cell, result in results.items():
        scores.setdefault(str(cell.switch), []).append(result.measures)
    print(f"\n{ablations.table(scores)}\n")
    return {"task": ablations.SET.name, "train_rows": ablations.NUM_ROWS, "scores": scores}


def ablation_cells(seeds: int) -> list[Cell]:
    """Return the cells of the switches."""
    return [
        Cell(ablations.SET, OURS, seed, ablations.NUM_ROWS, switch.name)
        for switch in ablations.SWITCHES
        for seed in range(1, seeds + 1)
    ]


def cells_of(tasks: list[TaskSet], seeds: int, few: bool) -> list[Cell]:
    """Return the cells of some task sets, the same seed of all sides one after the other."""
    numbers = range(1, seeds + 1)
    whole = [Cell(task, side, seed) for task in tasks for seed in numbers for side in (OURS, THEIRS, RANDOM)]
    short = [
        Cell(task, side, seed, num_rows)
        for task in tasks
        for num_rows in (FEW if few and task.has_bar else ())
        for seed in numbers
        for side in (OURS, RANDOM)
    ]
    return whole + short


if __name__ == "__main__":
    run(main)
