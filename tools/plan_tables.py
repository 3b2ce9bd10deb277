"""A plan as tables for a terminal. No figure is computed here."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from engine.config.schema.run import RunConfig
from engine.plan.elastic import World
from engine.plan.hardware import GIB
from engine.plan.plan import Plan
from engine.plan.ranking import Advice

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
SHORT = {"gradients": "grads", "activations": "activ.", "weights_within": "near"}
"""Headings that would not fit 80 columns."""
MEMORY = ("weights", "master", "moments", "gradients", "bucket", "gathered", "activations", "logits", "total")
OFFLOADED = ("master", "moments")
"""Columns that `host` takes the place of."""
TRAFFIC = ("gradients", "weights", "tensor", "sequence", "pipe", "tie", "total")
WORLDS_SHOWN = 16
LAYOUTS_SHOWN = 10


def show(
    plan: Plan,
    advice: Advice | None,
    run: RunConfig,
    node_memory: int | None = None,
    console: Console | None = None,
) -> None:
    """Prints the whole plan, and the advice where there is some; `node_memory`: bytes that checkpoints take of it."""
    console = console or Console(soft_wrap=False)
    _summary(plan, run, node_memory, console)
    memory = (*(name for name in MEMORY if name not in OFFLOADED), "host") if run.parallel.offload != "none" else MEMORY
    within = ("weights_within",) if run.parallel.gather_within else ()
    for table in (
        _stages(plan),
        _figures(plan, "memory", memory, "memory of one rank with a GPU (activations and logits: estimates)"),
        _figures(plan, "traffic", (*TRAFFIC, *within), "bytes that one rank sends per step"),
    ):
        console.print("", table)
    _neighbours(plan, console)
    if advice is not None:
        _advice(advice, console)


def scale(largest_bytes: int) -> tuple[int, str]:
    """The unit, as its bytes and its name, in which a table's largest figure has at most four digits."""
    power = 0
    while largest_bytes >= 1024 ** (power + 1) and power < len(UNITS) - 1:
        power += 1
    return 1024**power, UNITS[power]


def _summary(plan: Plan, run: RunConfig, node_memory: int | None, console: Console) -> None:
    stage, parallel = run.stages[0], run.parallel
    rows = {
        "layout": f"{plan.layout} on {plan.layout.world_size} ranks, ZeRO-{plan.zero_stage}, {run.precision.dtype}",
        "parameters": f"{plan.parameters:,} ({plan.parameters_in_memory:,} with the vocabulary padded)",
        "step": f"{stage.batches.largest} samples of {stage.sequence_length} = {plan.tokens:,} tokens, in "
        f"{plan.num_micro_batches} micro-batches of {parallel.micro_batch_size} on each data rank",
        "arithmetic": f"{plan.operations_per_token:,} operations per token, {plan.operations:.3g} per step",
        "pipeline": f"{parallel.schedule}, idle {plan.bubble:.1%} of a step",
        "worlds": _some([str(size) for size in plan.worlds]),
        "elastic": _some([_how(world) for world in plan.elastic if world.padded_rows or world.size not in plan.worlds]),
    }
    if node_memory is not None and run.checkpoint.memory is not None:
        unit_bytes, unit = scale(node_memory)
        folder = run.checkpoint.memory.folder
        rows["node memory"] = f"at most {node_memory / unit_bytes:.4g} {unit} of {folder} for two generations"
    table = Table.grid(padding=(0, 2))
    for name, text in rows.items():
        table.add_row(f"[bold]{name}", text)
    console.print(table)


def _stages(plan: Plan) -> Table:
    table = _table("pipeline stages")
    for heading in ("stage", "layers", "parameters", "per tensor rank", "passes alive"):
        table.add_column(heading, justify="right")
    for stage in plan.stages:
        layers = ", ".join(f"{first} to {last}" for first, last in stage.chunks)
        numbers = (f"{stage.parameters:,}", f"{stage.parameters_per_rank:,}", str(stage.in_flight))
        table.add_row(str(stage.stage), layers, *numbers)
    return table


def _figures(plan: Plan, attribute: str, names: tuple[str, ...], title: str) -> Table:
    """One row per pipeline stage, one column per kind of bytes, all in one unit."""
    figures = [getattr(stage, attribute) for stage in plan.stages]
    unit_bytes, unit = scale(max(figure.total for figure in figures))
    table = _table(f"{title}, in {unit}")
    for heading in ("stage", *names):
        table.add_column(SHORT.get(heading, heading), justify="right")
    for stage, figure in enumerate(figures):
        table.add_row(str(stage), *(f"{getattr(figure, name) / unit_bytes:.4g}" for name in names))
    return table


def _neighbours(plan: Plan, console: Console) -> None:
    console.print()
    if plan.fitting:
        others = "; ".join(str(layout) for layout in plan.fitting)
        console.print(f"[bold]would also start on {plan.layout.world_size} ranks:[/] {others}")
    if not plan.refused:
        console.print("[bold]refused:[/] no other layout of this world")
        return
    table = _table(f"refused on {plan.layout.world_size} ranks")
    table.add_column("layout", no_wrap=True)
    table.add_column("why")
    table.add_column("allowed")
    for refusal in plan.refused:
        why = "\n".join(problem.wrong for problem in refusal.problems)
        table.add_row(refusal.layout, why, "\n".join(problem.allowed for problem in refusal.problems))
    console.print("", table)


def _advice(advice: Advice, console: Console) -> None:
    """The planned layout's step, then the layouts of the world by their seconds."""
    cluster, planned = advice.cluster, advice.planned
    least, most = planned.time.band
    gib = cluster.accelerator.memory_bytes / GIB
    console.print()
    console.print(
        f"[bold]as planned on {cluster.world_size} {cluster.accelerator.name}, {cluster.per_node} per node:[/] "
        f"{planned.time.total:.3g} s per step ({least:.3g} to {most:.3g}), "
        f"{planned.time.utilisation:.0%} of the peak, {planned.memory_bytes / GIB:.3g} of {gib:.3g} GiB"
        + ("" if planned.fits else " [bold red]does not fit[/]")
    )
    fitting = [candidate for candidate in advice.ranked if candidate.fits]
    if fitting and fitting[0].parallel.offload != "none":
        console.print("[bold]nothing fits without parallel.offload=optimizer[/]; the layouts below have it")
    table = _table("layouts of this world, fastest first (an estimate: see the band above)")
    for heading in ("layout", "seconds", "GiB", "why"):
        table.add_column(heading, justify="left" if heading in ("layout", "why") else "right")
    for candidate in fitting[:LAYOUTS_SHOWN]:
        held = f" + {candidate.host_bytes / GIB:.3g} host" if candidate.parallel.offload != "none" else ""
        figures = (f"{candidate.time.total:.3g}", f"{candidate.memory_bytes / GIB:.3g}{held}")
        table.add_row(str(candidate), *figures, candidate.why(fitting[0]))
    if fitting:
        console.print("", table)
    elif advice.ranked:
        nearest = advice.ranked[0]
        console.print(f"[bold]nothing fits:[/] {nearest} comes nearest: {nearest.lack()}")
    for one in advice.larger:
        how = "with" if one.parallel.offload != "none" else "without"
        console.print(f"[bold]smallest larger world, {how} offload:[/] {one.layout.world_size} ranks, {one}")


def _table(title: str) -> Table:
    """A table narrow enough for 80 columns."""
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
    )


def _how(world: World) -> str:
    """A world in which the run does not start as it is, and what has to change."""
    rows = f", {world.padded_rows} rows of weight 0" if world.padded_rows else ""
    return f"{world.size} (data {world.layout.data}, micro-batch {world.parallel.micro_batch_size}{rows})"


def _some(worlds: list[str]) -> str:
    if len(worlds) > WORLDS_SHOWN:
        return f"{', '.join(worlds[:WORLDS_SHOWN])}, ... up to {worlds[-1]}"
    return ", ".join(worlds) or "no other world"
