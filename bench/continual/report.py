"""Result of the core experiment as a table, and as a plot of the old domain's loss against the new one's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.continual.core import JOINT, RESERVOIR, SCRATCH, Bar
from bench.continual.setup import BASE

Rows = dict[str, dict[str, float | None]]


def table(found: Rows) -> str:
    """Return the table of all runs as Markdown."""
    lines = [
        "| replay | loss, old | loss, new | forgetting removed | cost on the new domain | mean, to joint |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in found.items():
        cells = [name, _loss(row["old"]), _loss(row["new"])]
        cells += [_percent(row[key]) for key in ("forgetting_removed", "cost_on_new", "mean_over_joint")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def told(bars: list[Bar]) -> str:
    """Return the bars, a line for each."""
    return "\n".join(
        f"{'met    ' if bar.is_met else 'NOT met'} {bar.text}: {_percent(bar.value)} "
        f"(bar: {'at least' if bar.at_least else 'at most'} {bar.limit:.0%})"
        for bar in bars
    )


def methods_table(found: Rows) -> str:
    """Return the table of the methods as Markdown; CPU time is that over plain continuation's."""
    lines = [
        "| method | loss, old | loss, new | forgetting removed | cost on the new domain | mean loss | CPU time |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in found.items():
        cells = [name, _loss(row["old"]), _loss(row.get("new"))]
        cells += [_percent(row.get(key)) for key in ("forgetting_removed", "cost_on_new")]
        times = row.get("cpu_over_plain")
        cells += [_loss(row.get("mean")), "" if times is None else f"{times:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_methods(found: Rows, title: str, path: Path) -> None:
    """Draw the old domain's loss against the new one's, a point for each method."""
    from matplotlib.figure import Figure  # no pyplot: no window, no global state

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes: Any = figure.subplots()
    # A name beside each point: as many colours and markers could not be told apart.
    for name, row in found.items():
        if name != BASE:
            axes.plot([row["new"]], [row["old"]], "o", markersize=5, color="C0")
            axes.annotate(name, (row["new"], row["old"]), xytext=(5, 3), textcoords="offset points", fontsize=7)
    axes.axhline(found[BASE]["old"], color="gray", linestyle="--", linewidth=0.8, label="before the new domain")
    axes.set(xlabel="loss of the new domain (nats per token)", ylabel="loss of the old domain", title=title)
    axes.grid(alpha=0.3)
    axes.margins(x=0.12)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110, format="png", metadata={"Software": None})


def draw(found: Rows, title: str, path: Path) -> None:
    """Draw the old domain's loss against the new one's: branches joined in the order of their ratio, and controls."""
    from matplotlib.figure import Figure  # no pyplot: no window, no global state

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes: Any = figure.subplots()
    branches = [name for name in found if name not in (BASE, JOINT, SCRATCH, RESERVOIR)]
    axes.plot(
        [found[name]["new"] for name in branches], [found[name]["old"] for name in branches], "o-", label="replay"
    )
    for name, marker in ((RESERVOIR, "s"), (JOINT, "*")):
        axes.plot([found[name]["new"]], [found[name]["old"]], marker, markersize=9, label=name)
    for name in branches:
        point = (found[name]["new"], found[name]["old"])
        axes.annotate(name, point, xytext=(5, 5), textcoords="offset points", fontsize=8)
    if (before := found[BASE]["old"]) is not None:
        axes.axhline(before, color="gray", linestyle="--", linewidth=0.8, label="before the new domain")
    axes.set(xlabel="loss of the new domain (nats per token)", ylabel="loss of the old domain", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110, format="png", metadata={"Software": None})


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:+.1%}".replace("%", " %").removeprefix("+")
