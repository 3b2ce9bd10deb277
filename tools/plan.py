"""`palimpsest plan`: what a run costs on a world, and what would be refused there, before anything is started."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from engine.config.load import load_run
from engine.config.twins import export_warning
from engine.plan.hardware import ACCELERATORS, cluster
from engine.plan.plan import make_plan
from engine.plan.ranking import advise

KINDS = tuple(ACCELERATORS)


def main(
    config: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run's configuration.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="SECTION.KEY=VALUE", help="Keys to change.")] = None,
    world: Annotated[int | None, typer.Option(min=1, help="Ranks of the run (default: what the layout needs).")] = None,
    gpu: Annotated[str | None, typer.Option(help=f"Estimate a step and rank layouts for: {', '.join(KINDS)}.")] = None,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="Ranks of a node: with --gpu, checkpoint.memory.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show layout, parameters, memory, bytes per step and idle time of a run, and what would be refused.

    With --gpu also the seconds of a step, and the layouts of the same world ranked by them.
    """
    run = load_run(config, overrides or [])
    warning = export_warning(run)
    if warning is not None:
        print(f"warning: {warning}", file=sys.stderr)
    parallel = run.parallel
    world = world or parallel.pipe * parallel.tensor * parallel.sequence * (parallel.data or 1)
    machine = None if gpu is None else cluster(gpu, world, gpus_per_node)
    plan = make_plan(run, world)
    advice = None if machine is None else advise(run, plan, machine)
    node_memory = None if run.checkpoint.memory is None else plan.node_memory_bytes(gpus_per_node)
    if as_json:
        tree = plan.as_json() | ({} if advice is None else {"advice": advice.as_json()})
        tree |= {} if warning is None else {"export_warning": str(warning)}
        print(json.dumps(tree | ({} if node_memory is None else {"node_memory_bytes": node_memory}), indent=1))
        return
    from tools.plan_tables import show

    show(plan, advice, run, node_memory)
