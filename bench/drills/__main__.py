"""Faults of clusters, hit on a simulated Slurm cluster: seconds until they are noticed, and until the run goes on.

    python -m bench.drills --output bench/results/cpu-drills-DATE.json

It needs root and Slurm's packages (`tests.slurm.cluster`), and takes about ten minutes per round on a quiet machine.
With `--output` the table of docs/cluster.md is replaced by this one's.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from bench.command import run
from bench.drills.faults import DRILLS, Measured, measure
from bench.drills.page import PAGE, bars, replaced, table, to_json
from bench.machine import machine
from engine.errors import ConfigError, EnvironmentProblem
from tests.slurm.cluster import PATH as CLUSTER_PATH
from tests.slurm.cluster import missing


def main(
    output: Annotated[
        Path | None, typer.Option(help="Write all figures to this JSON file, and docs/cluster.md.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Times that each drill is run.")] = 1,
    only: Annotated[list[str] | None, typer.Option(help="Names of drills to run alone, not with --output.")] = None,
) -> None:
    """Measure the drills, one after the other."""
    if reason := missing():
        raise EnvironmentProblem(reason, "root on Linux, and Slurm", "see the message, or run it in a container")
    chosen = [drill for drill in DRILLS if not only or drill.name in only]
    names = ", ".join(drill.name for drill in DRILLS)
    if only and (len(chosen) < len(only) or output is not None):
        raise ConfigError(f"--only = {', '.join(only)}", f"without --output: {names}", "choose from these")
    measured: dict[str, list[Measured]] = {drill.name: [] for drill in chosen}
    before = machine(threads=1)
    for number in range(1, rounds + 1):
        for drill in chosen:
            found = measure(drill)
            measured[drill.name].append(found)
            first = "" if found.first_step is None else f", first step after {found.first_step:.1f} s"
            words = f"noticed after {found.noticed:.1f} s{first} (load {found.load:.1f})"
            print(f"round {number}, {drill.name}: {words}", file=sys.stderr, flush=True)
    drills = [to_json(drill, measured[drill.name]) for drill in chosen]
    result = {"machine": before, "slurm": slurm_version(), "rounds": rounds, "drills": drills}
    print("\n".join([table(result), "", *bars(result)]))
    if output is not None:
        output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        PAGE.write_text(replaced(PAGE.read_text(encoding="utf-8"), result, output.name), encoding="utf-8")


def slurm_version() -> str:
    """Return Slurm's version."""
    # Of the daemon: clients want a configuration, which only the nodes of the cluster have.
    daemon = shutil.which("slurmctld", path=CLUSTER_PATH) or "slurmctld"
    return subprocess.run([daemon, "-V"], capture_output=True, text=True, check=True).stdout.split()[-1]


if __name__ == "__main__":
    run(main)
