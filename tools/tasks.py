"""`palimpsest tasks`: what runs of tasks are worth together: learned one after the other, or as an ensemble."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer


def main(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders of tasks, in their order.")],
    ensemble: Annotated[
        bool, typer.Option("--ensemble", help="Measure the mean of the models' predictions instead.")
    ] = False,
    language_model: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Token shards to measure the language model's loss on, too.")
    ] = None,
    max_samples: Annotated[int, typer.Option(help="Samples of these shards that are read.", min=1)] = 256,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show the measure of each task after each task was learned, and what the language model has lost.

    The runs are trained one after the other, each with the one before as its start and a new head
    (init_from.head: new). With --ensemble they are runs of one task, whose predictions are averaged.
    """
    from engine.serve.quiet import quiet
    from launcher.devices import num_gpus

    quiet()
    if not num_gpus(os.environ):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would guess the same, and print that first
    found = _ensemble(runs) if ensemble else _sequence(runs, language_model, max_samples)
    print(json.dumps(found, indent=1, ensure_ascii=False) if as_json else _text(found))


def _ensemble(runs: list[Path]) -> dict[str, Any]:
    from engine.tasks.ensemble import ensemble

    measures = ensemble(runs).measures()
    return {"ensemble": {name: value for name, value in measures.items() if isinstance(value, int | float)}}


def _sequence(runs: list[Path], language_model: Path | None, max_samples: int) -> dict[str, Any]:
    from engine.tasks.sequence import language_model_losses, measures, measures_before, open_tasks

    tasks = open_tasks(runs)
    found: dict[str, Any] = {
        "tasks": [{"name": task.name, "measure": task.measure} for task in tasks],
        "before": measures_before(tasks),
        "measures": measures(tasks),
    }
    if language_model is not None:
        found["language_model_loss"] = language_model_losses(tasks, language_model, max_samples)
    return found


def _text(found: dict[str, Any]) -> str:
    if "ensemble" in found:
        return "\n".join(f"{name:20} {value:.4f}" for name, value in found["ensemble"].items())
    names = [task["name"] for task in found["tasks"]]
    losses = found.get("language_model_loss")
    heads = [f"{task['name']} ({task['measure']})" for task in found["tasks"]]
    heads += ["language-model loss"] if losses else []
    rows = [["before its run", *map(_number, found["before"]), *([_number(losses[0])] if losses else [])]]
    for number, measured in enumerate(found["measures"]):
        rows.append(
            [f"after {names[number]}", *map(_number, measured), *([_number(losses[number + 1])] if losses else [])]
        )
    table = [["", *heads], *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
