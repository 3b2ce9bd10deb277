"""A plan as tables for a terminal. No figure is computed here."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from engine.config.schema import RunConfig
from engine.plan.plan import Plan

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
MEMORY = ("weights", "master", "moments", "gradients", "gathered", "activations", "logits", "total")
TRAFFIC = ("gradients", "weights", "tensor", "pipe", "tie", "total")
WORLDS_SHOWN = 16


def show(plan: Plan, run: RunConfig, console: Console | None = None) -> None:
    """Prints the whole plan."""
    console = console or Console(soft_wrap=False)
    _summary(plan, run, console)
    console.print(_stages(plan))
    console.print(_figures(plan, "memory", MEMORY, "memory of one rank (activations and logits are estimates)"))
    console.print(_figures(plan, "traffic", TRAFFIC, "bytes that one rank sends per step"))
    _neighbours(plan, console)


def size(num_bytes: float) -> str:
    """Bytes with a unit, three digits or so."""
    power = 0
    while num_bytes >= 1024 and power < len(UNITS) - 1:
        num_bytes, power = num_bytes / 1024, power + 1
    return f"{num_bytes:.0f} {UNITS[power]}" if power == 0 else f"{num_bytes:.1f} {UNITS[power]}"


def _summary(plan: Plan, run: RunConfig, console: Console) -> None:
    stage, parallel = run.stages[0], run.parallel
    rows = {
        "layout": f"{plan.layout} on {plan.layout.world_size} ranks, ZeRO-{plan.zero_stage}, {run.precision.dtype}",
        "parameters": f"{plan.parameters:,} ({plan.parameters_in_memory:,} with the vocabulary padded)",
        "step": f"{stage.global_batch_size} samples of {stage.sequence_length} = {plan.tokens:,} tokens, in "
        f"{plan.num_micro_batches} micro-batches of {parallel.micro_batch_size} on each data rank",
        "arithmetic": f"{plan.operations_per_token:,} operations per token, {plan.operations / 1e12:.3g} TFLOP per step",
        "pipeline": f"{parallel.schedule}, idle {plan.bubble:.1%} of a step",
        "worlds": _some(plan.worlds),
    }
    table = Table.grid(padding=(0, 2))
    for name, text in rows.items():
        table.add_row(f"[bold]{name}", text)
    console.print(table)


def _stages(plan: Plan) -> Table:
    table = Table(title="pipeline stages", title_justify="left")
    for heading in ("stage", "layers", "parameters", "per tensor rank", "micro-batches alive"):
        table.add_column(heading, justify="right")
    for stage in plan.stages:
        layers = f"{stage.first_layer} to {stage.first_layer + stage.num_layers - 1}"
        numbers = (f"{stage.parameters:,}", f"{stage.parameters_per_rank:,}", str(stage.in_flight))
        table.add_row(str(stage.stage), layers, *numbers)
    return table


def _figures(plan: Plan, attribute: str, names: tuple[str, ...], title: str) -> Table:
    """One row per pipeline stage, one column per kind of bytes."""
    table = Table(title=title, title_justify="left")
    for heading in ("stage", *names):
        table.add_column(heading, justify="right")
    for stage in plan.stages:
        figures = getattr(stage, attribute)
        table.add_row(str(stage.stage), *(size(getattr(figures, name)) for name in names))
    return table


def _neighbours(plan: Plan, console: Console) -> None:
    if plan.fitting:
        others = "; ".join(str(layout) for layout in plan.fitting)
        console.print(f"[bold]would also start on {plan.layout.world_size} ranks:[/] {others}")
    if not plan.refused:
        console.print("[bold]refused:[/] no other layout of this world")
        return
    table = Table(title=f"refused on {plan.layout.world_size} ranks", title_justify="left", show_lines=True)
    table.add_column("layout", no_wrap=True)
    table.add_column("why")
    table.add_column("allowed")
    for refusal in plan.refused:
        why = "\n".join(problem.wrong for problem in refusal.problems)
        table.add_row(refusal.layout, why, "\n".join(problem.allowed for problem in refusal.problems))
    console.print(table)


def _some(worlds: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, worlds[:WORLDS_SHOWN]))
    return f"{shown}, ... (up to {worlds[-1]} ranks)" if len(worlds) > WORLDS_SHOWN else shown
