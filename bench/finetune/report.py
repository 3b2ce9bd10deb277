"""Means, spreads and bars over the seeds of the cells, and their table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from bench.finetune.cells import Cell, Result, Side
from bench.finetune.sets import TaskSet

OURS: Side = "ours"
THEIRS: Side = "Trainer"
RANDOM: Side = "ours from random weights"
Results = Mapping[Cell, Result]


def summarize(results: Results) -> list[dict[str, Any]]:
    """Return one entry per task set and number of training rows: mean and range of each side, CPU seconds, and bars."""
    groups: dict[tuple[TaskSet, int | None], dict[Side, list[Result]]] = {}
    for cell, result in results.items():
        groups.setdefault((cell.task, cell.num_rows), {}).setdefault(cell.side, []).append(result)
    return [_entry(task, num_rows, sides) for (task, num_rows), sides in groups.items()]


def _entry(task: TaskSet, num_rows: int | None, sides: dict[Side, list[Result]]) -> dict[str, Any]:
    scores = {side: [result.measures[task.measure] for result in found] for side, found in sides.items()}
    entry: dict[str, Any] = {
        "task": task.name,
        "measure": task.measure,
        "train_rows": next(iter(sides.values()))[0].train_rows,
        "is_whole": num_rows is None,
        "has_bar": task.has_bar and num_rows is None,
        "scores": scores,
        "cpu_seconds": {side: sum(result.cpu_seconds for result in found) for side, found in sides.items()},
    }
    if OURS in scores and THEIRS in scores:
        entry["within_spread"] = _gap(scores[OURS], scores[THEIRS]) <= max(_range(scores[OURS]), _range(scores[THEIRS]))
    if OURS in scores and RANDOM in scores:
        gain = statistics.mean(scores[OURS]) - statistics.mean(scores[RANDOM])
        entry["gain_over_random"] = gain
        entry["gain_above_spread"] = gain > max(_range(scores[OURS]), _range(scores[RANDOM]))
    return entry


def _gap(one: Sequence[float], other: Sequence[float]) -> float:
    return abs(statistics.mean(one) - statistics.mean(other))


def _range(scores: Sequence[float]) -> float:
    return max(scores) - min(scores)


def bars(entries: Sequence[Mapping[str, Any]]) -> dict[str, bool]:
    """Return the bars of the sets that have them, and that of CPU time over all; True where met."""
    found = {}
    for entry in entries:
        if not entry["has_bar"]:
            continue
        if "within_spread" in entry:
            found[f"{entry['task']}: mean within the seeds' range of Trainer's"] = entry["within_spread"]
        if "gain_above_spread" in entry:
            found[f"{entry['task']}: pretraining gains more than the seeds' range"] = entry["gain_above_spread"]
    paired = [entry["cpu_seconds"] for entry in entries if {OURS, THEIRS} <= entry["cpu_seconds"].keys()]
    if paired:
        ours, theirs = (sum(one[side] for one in paired) for side in (OURS, THEIRS))
        found[f"CPU time over Trainer's, {ours / theirs:.2f}, is at most 1"] = ours <= theirs
    return found


def table(entries: Sequence[Mapping[str, Any]]) -> str:
    """Return the summary as a Markdown table."""
    lines = [
        "| task | measure | training rows | ours | Trainer | ours from random weights | CPU over Trainer's |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for entry in entries:
        sides = [_told(entry["scores"].get(side)) for side in (OURS, THEIRS, RANDOM)]
        seconds = entry["cpu_seconds"]
        ratio = f"{seconds[OURS] / seconds[THEIRS]:.2f}" if {OURS, THEIRS} <= seconds.keys() else ""
        columns = [entry["task"], entry["measure"], f"{entry['train_rows']:,}", *sides, ratio]
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


def _told(scores: Sequence[float] | None) -> str:
    if not scores:
        return ""
    return f"{100 * statistics.mean(scores):.1f} ({100 * min(scores):.1f} to {100 * max(scores):.1f})"
