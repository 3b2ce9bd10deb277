"""`palimpsest plan`: what a run costs on a world, and what would be refused there, before anything is started."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from engine.config.load import load_run
from engine.plan.plan import make_plan


def main(
    config: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run's configuration.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="SECTION.KEY=VALUE", help="Keys to change.")] = None,
    world: Annotated[int | None, typer.Option(min=1, help="Ranks of the run (default: what the layout needs).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show layout, parameters, memory, bytes per step and idle time of a run, and what would be refused."""
    run = load_run(config, overrides or [])
    parallel = run.parallel
    plan = make_plan(run, world or parallel.pipe * parallel.tensor * parallel.sequence * (parallel.data or 1))
    if as_json:
        print(json.dumps(plan.as_json(), indent=1))
        return
    from tools.plan_tables import show

    show(plan, run)
