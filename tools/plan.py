"""`palimpsest plan`: the cost of a run on a world, and the rules that it breaks there, before anything is started."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from engine.checkpoint.interchange.initial import model_of
from engine.config.huggingface_forms import export_warning
from engine.config.load import load_run
from engine.errors import EXIT_USAGE
from engine.plan.cost import run_cost
from engine.plan.hardware import ACCELERATORS, cluster
from engine.plan.plan import make_plan
from engine.plan.ranking import advise
from engine.plan.worlds import LARGEST_WORLD
from tools.plan_inputs import look

KINDS = tuple(ACCELERATORS)
ASSUMED = "h100-80gb"


def main(
    config: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run's configuration.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="SECTION.KEY=VALUE", help="Keys to change.")] = None,
    world: Annotated[
        int | None, typer.Option(min=1, max=LARGEST_WORLD, help="Ranks of the run (default: what the layout needs).")
    ] = None,
    gpu: Annotated[str | None, typer.Option(help=f"One of {', '.join(KINDS)} (default: {ASSUMED}).")] = None,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="Ranks of a node.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show what a run takes: steps, time, memory, bytes per step, checkpoints; the best layouts; what would be refused.

    Ends with 2 where the run does not fit, or what it reads does not suit it.
    """
    run = load_run(config, overrides or [], model_of)
    warning = export_warning(run)
    if warning is not None:
        print(f"warning: {warning}", file=sys.stderr)
    parallel = run.parallel
    # The smallest world of the layout: one data rank where the run leaves their number open.
    world = world or parallel.pipe * parallel.tensor * parallel.sequence * (parallel.data or 1)
    machine = cluster(gpu or ASSUMED, world, gpus_per_node)
    plan = make_plan(run, world)
    advice, cost, inputs = advise(run, plan, machine), run_cost(run, plan.layout, machine), look(run)
    node_memory = None if run.checkpoint.memory is None else plan.node_memory_bytes(gpus_per_node)
    if as_json:
        tree = {"fits": advice.planned.fits, **plan.as_json(), "cost": cost.as_json(), "advice": advice.as_json(run)}
        tree |= {"inputs": {"missing": inputs.missing, "wrong": inputs.wrong}}
        tree |= {} if warning is None else {"export_warning": str(warning)}
        print(json.dumps(tree | ({} if node_memory is None else {"node_memory_bytes": node_memory}), indent=1))
    else:
        from tools.plan_tables import show

        show(plan, advice, cost, inputs, run, assumed=gpu is None, node_memory=node_memory)
    # Missing data is no mistake: a run is planned before its data is prepared.
    if not advice.planned.fits or inputs.wrong:
        raise typer.Exit(EXIT_USAGE)
