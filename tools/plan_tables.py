"""A plan as tables for a terminal. No figure is computed here."""

from __future__ import annotations

import json

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from engine.config.schema.run import RunConfig
from engine.logs import duration
from engine.plan.cost import SECONDS_PER_HOUR, STORAGE_BYTES_PER_SECOND, Cost
from engine.plan.elastic import World
from engine.plan.hardware import GIB
from engine.plan.plan import Plan
from engine.plan.ranking import Advice
from tools.plan_inputs import Inputs

UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
SHORT = {"gradients": "grads", "activations": "activ.", "weights_within": "near", "updates_across": "across"} | {
    "added_moments": "added"
}
"""Headings that would not fit 80 columns."""
WORLDS_SHOWN = 16
LAYOUTS_SHOWN = 10
RULED_COLUMNS = 10
"""Number of columns of bytes from which on there is no room for wider gaps."""
REFUSED_SHOWN = 6
"""Number of layouts that are named of those that one rule forbids."""


def show(
    plan: Plan,
    advice: Advice,
    cost: Cost,
    inputs: Inputs,
    run: RunConfig,
    assumed: bool = False,
    node_memory: int | None = None,
    console: Console | None = None,
) -> None:
    """Print a plan. `assumed`: nobody named the accelerator; `node_memory`: bytes that checkpoints take of it."""
    console = console or Console(soft_wrap=False)
    _verdict(advice, assumed, console)
    for heading, sentences in (("[bold red]wrong", inputs.wrong), ("[bold]missing", inputs.missing)):
        for sentence in sentences:
            console.print(f"{heading}:[/] {escape(sentence)}", soft_wrap=True, highlight=False)
    console.print()
    _summary(plan, cost, inputs, run, node_memory, console)
    if len(plan.run_stages) > 1:
        console.print("", _run_stages(plan, cost, run))
    for table in (_stages(plan), _memory(plan), _traffic(plan)):
        console.print("", table)
    _neighbours(plan, console)
    _advice(advice, run, console)


def _verdict(advice: Advice, assumed: bool, console: Console) -> None:
    """Print on one line if the run fits."""
    cluster, planned = advice.cluster, advice.planned
    where = f"{cluster.world_size:,} x {cluster.accelerator.name}"
    there = cluster.accelerator.memory_bytes / GIB
    note = " (assumed; --gpu names another)" if assumed else ""
    if planned.fits:
        verdict = f"[bold]fits:[/] {planned.memory_bytes / GIB:.3g} of {there:.3g} GiB on {where}{note}"
    else:
        needed = f"needs {planned.memory_bytes / GIB:.3g} of {there:.3g} GiB"
        # The device has room, so it is the host that lacks memory.
        host = f"; {planned.lack()}" if planned.memory_bytes <= cluster.accelerator.memory_bytes else ""
        verdict = f"[bold red]does not fit[/] {where}{note}: {needed}{host}"
    console.print(verdict, soft_wrap=True, highlight=False)


def bytes_in_words(num_bytes: int) -> str:
    """Return a number of bytes as text, in the unit in which it has at most four digits."""
    unit_bytes, unit = scale(num_bytes)
    return f"{num_bytes / unit_bytes:.3g} {unit}"


def scale(largest_bytes: int) -> tuple[int, str]:
    """Return the unit, as its bytes and its name, in which a table's largest figure has at most four digits."""
    power = 0
    while largest_bytes >= 1024 ** (power + 1) and power < len(UNITS) - 1:
        power += 1
    return 1024**power, UNITS[power]


def _summary(plan: Plan, cost: Cost, inputs: Inputs, run: RunConfig, node_memory: int | None, console: Console) -> None:
    """Print the figures of the run; those of a step are of the run stage that needs the most memory."""
    planned, parallel = plan.largest, run.parallel
    number = plan.run_stages.index(planned)
    stage, time = run.stages[number], cost.run_stages[number].step
    least, most = time.band
    several = f" of {planned.name}" if len(plan.run_stages) > 1 else ""
    rows = {
        "layout": f"{plan.layout} on {plan.layout.world_size} ranks, ZeRO-{plan.zero_stage}, {run.precision.dtype}",
        "parameters": f"{plan.parameters:,} ({plan.parameters_in_memory:,} with the vocabulary padded)"
        + ("" if planned.trained == plan.parameters else f"; {_share(planned.trained, plan.parameters, several)}"),
        "run": f"{cost.steps:,} steps, {cost.tokens:,} tokens",
        f"step{several}": f"{stage.batches.largest:,} samples of {stage.sequence_length:,} = {planned.tokens:,} "
        f"tokens, in {planned.num_micro_batches:,} micro-batches of {parallel.micro_batch_size} on each data rank"
        + (" (the largest batch)" if stage.batch_ramp else ""),
        "step time": f"{time.total:.3g} s ({least:.3g} to {most:.3g}), {time.utilisation:.0%} of the peak, "
        f"{planned.tokens / time.total:,.0f} tokens/s",
        "time": _time(cost),
        "checkpoints": _checkpoints(cost, run),
        "arithmetic": f"{planned.operations_per_token:,} operations per token, {planned.operations:.3g} per step",
        "pipeline": f"{parallel.schedule}, idle {planned.bubble:.1%} of a step",
        "worlds": _some([str(size) for size in plan.worlds]),
        "elastic": _some([_how(world) for world in plan.elastic if world.padded_rows or world.size not in plan.worlds]),
    }
    if node_memory is not None and run.checkpoint.memory is not None:
        folder = run.checkpoint.memory.folder
        rows["node memory"] = f"at most {bytes_in_words(node_memory)} of {folder} for two generations"
    if inputs.found:
        rows["data"] = "\n".join(inputs.found)
    table = Table.grid(padding=(0, 2))
    for name, text in rows.items():
        table.add_row(f"[bold]{name}", escape(text))
    console.print(table)


def _share(trained: int, parameters: int, of_stage: str) -> str:
    return f"{trained:,} of them are trained{of_stage} ({trained / parameters:.2%})"


def _time(cost: Cost) -> str:
    """Return the time of the whole run and its parts, in words."""
    least, most = (duration(seconds) for seconds in cost.band_seconds)
    evaluated = ""
    if cost.evaluation_seconds is None:
        evaluated = f"; without {cost.evaluations:,} evaluations, for evaluation.max_samples is not set"
    elif cost.evaluations:
        evaluated = f", {cost.evaluations:,} evaluations {duration(cost.evaluation_seconds)}"
    return (
        f"{duration(cost.seconds)} ({least} to {most}), {_hours(cost.gpu_hours)} GPU-hours: "
        f"steps {duration(cost.training_seconds)}{evaluated}"
    )


def _checkpoints(cost: Cost, run: RunConfig) -> str:
    each, kept = cost.checkpoint_bytes, cost.kept_checkpoints
    waits = "all of it" if not run.checkpoint.asynchronous else f"{cost.held_up_seconds:.2g} s of it"
    return (
        f"{cost.checkpoints:,} of {bytes_in_words(each)}, {kept:,} of them stay ({bytes_in_words(each * kept)}); each "
        f"takes {cost.checkpoint_seconds:.2g} s at {STORAGE_BYTES_PER_SECOND / 1e9:g} GB/s per node, and the run waits "
        f"for {waits}"
    )


def _run_stages(plan: Plan, cost: Cost, run: RunConfig) -> Table:
    """Return a table with a row per run stage; the one that the tables below describe is marked."""
    table = _table(f"run stages; {plan.largest.name} needs the most memory, the tables below are of it")
    for heading in ("run stage", "steps", "tokens", "batch", "length", "s/step", "time", "GPU-hours", "GiB"):
        table.add_column(heading, justify="left" if heading == "run stage" else "right", no_wrap=True)
    for stage, planned, costs in zip(run.stages, plan.run_stages, cost.run_stages, strict=True):
        table.add_row(
            escape(planned.name) + (" *" if planned is plan.largest else ""),
            f"{costs.steps:,}",
            f"{costs.tokens:.3g}",
            f"{stage.batches.largest:,}",
            f"{stage.sequence_length:,}",
            f"{costs.step.total:.3g}",
            duration(costs.seconds),
            _hours(costs.seconds * cost.ranks / SECONDS_PER_HOUR),
            f"{planned.memory_bytes / GIB:.3g}",
        )
    return table


def _hours(hours: float) -> str:
    """Return GPU-hours as text."""
    if hours < 0.01:
        return "less than 0.01"
    return f"{hours:.3g}" if hours < 100 else f"{hours:,.0f}"


def _stages(plan: Plan) -> Table:
    table = _table("pipeline stages")
    for heading in ("stage", "layers", "parameters", "per tensor rank", "passes alive"):
        table.add_column(heading, justify="right")
    for stage in plan.stages:
        layers = ", ".join(f"{first} to {last}" for first, last in stage.chunks)
        numbers = (f"{stage.parameters:,}", f"{stage.parameters_per_rank:,}", str(stage.in_flight))
        table.add_row(str(stage.stage), layers, *numbers)
    return table


def _memory(plan: Plan) -> Table:
    """Return the table of the parts that add up to what an accelerator has to have, and host memory beside."""
    title = "memory of one rank's GPU (activations and logits: estimates)"
    rows = [stage.memory.parts() for stage in plan.stages]
    hosts = [stage.memory.host for stage in plan.stages]
    return _figures(title, rows, hosts if any(hosts) else None)


def _traffic(plan: Plan) -> Table:
    rows = [
        {name: value for name, value in vars(stage.traffic).items() if isinstance(value, int)} for stage in plan.stages
    ]
    return _figures("bytes that one rank sends per step", rows)


def _figures(title: str, rows: list[dict[str, int]], beside: list[int] | None = None) -> Table:
    """Return a table with a row per pipeline stage and a column per kind of bytes that some stage has, all in one unit.

    The total is the sum of what is shown. `beside` are bytes that do not belong to it."""
    unit_bytes, unit = scale(max(sum(row.values()) for row in rows))
    names = [name for name in rows[0] if any(row[name] for row in rows)]
    largest = max(sum(row.values()) for row in rows) / unit_bytes
    # Four digits in all, below 1000.
    digits = 3 if largest < 10 else 2 if largest < 100 else 1
    headings = ("stage", *(SHORT.get(name, name) for name in names), "total", *(["host"] if beside is not None else []))
    table = _table(f"{title}, in {unit}", ruled=len(headings) < RULED_COLUMNS)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for stage, row in enumerate(rows):
        # Rounded before they are added, so that a reader who adds up the row finds its total.
        shown = [round(row[name] / unit_bytes, digits) for name in names]
        shown += [sum(shown), *([beside[stage] / unit_bytes] if beside is not None else [])]
        table.add_row(str(stage), *(f"{figure:.{digits}f}" for figure in shown))
    return table


def _neighbours(plan: Plan, console: Console) -> None:
    console.print()
    if plan.fitting:
        others = "; ".join(str(layout) for layout in plan.fitting)
        console.print(f"[bold]would also start on {plan.layout.world_size} ranks:[/] {others}")
    if not plan.refused:
        console.print("[bold]refused:[/] no other layout of this world")
        return
    table = _table(f"refused on {plan.layout.world_size} ranks, each rule once")
    for heading in ("why", "allowed", "layouts"):
        table.add_column(heading)
    for refusal in plan.refused:
        names, more = refusal.layouts[:REFUSED_SHOWN], len(refusal.layouts) - REFUSED_SHOWN
        layouts = ", ".join(names) + (f" and {more} more" if more > 0 else "")
        table.add_row(escape(refusal.problem.wrong), escape(refusal.problem.allowed), layouts)
    console.print("", table)


def _advice(advice: Advice, run: RunConfig, console: Console) -> None:
    """Print the layouts of the world by their seconds, and the best one as keys to paste."""
    fitting = [candidate for candidate in advice.ranked if candidate.fits]
    console.print()
    if fitting and fitting[0].parallel.offload != "none":
        console.print("[bold]nothing fits without parallel.offload=optimizer[/]; the layouts below have it")
    table = _table("layouts of this world, fastest first (an estimate: see the range of the step time)")
    for heading in ("layout", "seconds", "GiB", "why"):
        table.add_column(heading, justify="left" if heading in ("layout", "why") else "right")
    for candidate in fitting[:LAYOUTS_SHOWN]:
        held = f" + {candidate.host_bytes / GIB:.3g} host" if candidate.parallel.offload != "none" else ""
        figures = (f"{candidate.time.total:.3g}", f"{candidate.memory_bytes / GIB:.3g}{held}")
        table.add_row(str(candidate), *figures, candidate.why(fitting[0]))
    if fitting:
        console.print(table)
        console.print("", "[bold]the best of them, for the run file or the command line:[/]", sep="\n")
        # JSON's `null` and `true` are YAML's; text needs no quotes there.
        keys = {name: json.dumps(value).strip('"') for name, value in fitting[0].keys(run).items()}
        pairs = ", ".join(f"{name}: {value}" for name, value in keys.items())
        overrides = " ".join(f"parallel.{name}={value}" for name, value in keys.items())
        # One line each, however long: a wrapped line cannot be pasted.
        for line in (f"parallel: {{ {pairs} }}", overrides):
            console.print(line, soft_wrap=True, markup=False, highlight=False)
    elif advice.ranked:
        nearest = advice.ranked[0]
        console.print(f"[bold]nothing fits:[/] {nearest} comes nearest: {nearest.lack()}")
    for one in advice.larger:
        how = "with" if one.parallel.offload != "none" else "without"
        console.print(f"[bold]smallest larger world, {how} offload:[/] {one.layout.world_size} ranks, {one}")


def _table(title: str, ruled: bool = True) -> Table:
    """Return a table narrow enough for 80 columns, with a rule below its headings where there is room."""
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE if ruled else None,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
    )


def _how(world: World) -> str:
    """Return a world in which the run does not start as it is, and the keys that have to change, as text."""
    rows = f", {world.padded_rows} rows of weight 0" if world.padded_rows else ""
    return f"{world.size} (data {world.layout.data}, micro-batch {world.parallel.micro_batch_size}{rows})"


def _some(worlds: list[str]) -> str:
    if len(worlds) > WORLDS_SHOWN:
        return f"{', '.join(worlds[:WORLDS_SHOWN])}, ... up to {worlds[-1]}"
    return ", ".join(worlds) or "no other world"
