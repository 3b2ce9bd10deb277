"""The table of docs/cluster.md, from the result of the drills."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.drills.faults import DRILLS, Drill, Measured

ROOT = Path(__file__).parents[2]
PAGE, RESULTS = ROOT / "docs" / "cluster.md", ROOT / "bench" / "results"
HEAD = "| what happens | what follows | noticed after s | first step after s |"
"""First line of the table; it ends with the first empty line."""


def table(found: dict[str, Any]) -> str:
    """Return the result as a table."""
    lines = [HEAD, "| --- | --- | --- | --- |"]
    for drill in found["drills"]:
        cells = [drill["fault"], drill["follows"], _seconds(drill["noticed_seconds"])]
        lines.append(f"| {' | '.join([*cells, _seconds(drill['first_step_seconds'])])} |")
    return "\n".join(lines)


def source(found: dict[str, Any], name: str) -> str:
    """Return the sentence that says what the table was measured on; `name` is the file of the result."""
    if not name:
        return "The seconds are measured by `python -m bench.drills` (bench/results/README.md); none are there yet."
    machine, slurm = found["machine"], found["slurm"]
    loads = [load for drill in found["drills"] for load in drill["load"]]
    rounds = f"{found['rounds']} {'round' if found['rounds'] == 1 else 'rounds'}"
    return (
        f"Measured with two ranks of a tiny model on simulated nodes that share {machine['cores']} cores "
        f"({machine['processor']}), Slurm {slurm}, torch {machine['versions']['torch']}, {rounds}, load "
        f"{min(loads):.0f} to {max(loads):.0f} ([{name}](../bench/results/{name}), by `python -m bench.drills`)."
    )


def to_json(drill: Drill, measured: Sequence[Measured]) -> dict[str, Any]:
    """Return a drill and its figures as JSON values, one figure per round."""
    return {
        "name": drill.name,
        "fault": drill.fault,
        "follows": drill.follows,
        "noticed_seconds": [round(one.noticed, 1) for one in measured],
        "first_step_seconds": [round(one.first_step, 1) for one in measured if one.first_step is not None],
        "load": [round(one.load, 1) for one in measured],
        "bar_seconds": drill.bar_seconds,
    }


def newest(folder: Path = RESULTS) -> tuple[dict[str, Any], str]:
    """Return the newest result of the drills and its file's name; before the first one, the drills without figures."""
    files = sorted(folder.glob("cpu-drills-*.json"))
    if not files:
        return {"drills": [to_json(drill, ()) for drill in DRILLS]}, ""
    return json.loads(files[-1].read_text(encoding="utf-8")), files[-1].name


def replaced(page: str, found: dict[str, Any], name: str) -> str:
    """Return the text of the page with the table of a result."""
    before, _, rest = page.partition(HEAD)
    # Behind the table: an empty line, the sentence in one line, and an empty line.
    _, _, after = rest.partition("\n\n")
    _, _, after = after.partition("\n\n")
    return f"{before}{table(found)}\n\n{source(found, name)}\n\n{after}"


def bars(found: dict[str, Any]) -> list[str]:
    """Return a line for each drill with a bar."""
    lines = []
    for drill in found["drills"]:
        limit = drill["bar_seconds"]
        if limit is not None:
            seconds = statistics.median(drill["first_step_seconds"])
            verdict = "met    " if seconds < limit else "NOT met"
            lines.append(f"{verdict} {drill['name']}: {seconds:.1f} s to the first step (bar: below {limit:.0f} s)")
    return lines


def _seconds(measured: Sequence[float]) -> str:
    """Return the median, with the range of several rounds; empty where there is nothing to measure."""
    if not measured:
        return ""
    median = f"{statistics.median(measured):.0f}"
    return median if len(measured) == 1 else f"{median} ({min(measured):.0f} to {max(measured):.0f})"
