"""`ledger.png`: losses over tokens with stage borders and learning rate, the loss matrix, the mixture, the frontier."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.atomic import replacing
from engine.train.ledger import average, mean
from engine.train.ledger_records import Ledger
from engine.train.plot import MAX_POINTS, title

PLOT = "ledger.png"


def draw(ledger: Ledger, others: Sequence[tuple[str, Ledger]], path: Path) -> None:
    """Draw the ledger of a run; `others` are runs that the frontier shows beside it, by name."""
    from matplotlib.figure import Figure  # no pyplot: its figures are shared between threads

    figure = Figure(figsize=(12, 8), layout="constrained")
    losses, matrix, mixture, frontier = figure.subplots(2, 2).ravel()
    _draw_losses(losses, ledger)
    _draw_matrix(figure, matrix, ledger)
    _draw_mixture(mixture, ledger)
    _draw_frontier(frontier, [(ledger.config.name, ledger), *others])
    text, families = title(f"{ledger.config.name}: what was learned and forgotten")
    figure.suptitle(text, fontfamily=families)
    with replacing(path) as file:
        figure.savefig(file, dpi=120, format="png", metadata={"Title": ledger.config.name})


def _draw_losses(axes: Any, ledger: Ledger) -> None:
    """Held-out loss of each domain over tokens, with the borders of stages and the learning rate behind it."""
    for number, (name, points) in enumerate(ledger.validation.items()):
        axes.plot(*zip(*points, strict=True), "o-", markersize=3, linewidth=1.2, color=f"C{number}", label=_text(name))
    rates = axes.twinx()
    thinned = ledger.rates[:: -(-len(ledger.rates) // MAX_POINTS) or 1]
    if thinned:
        rates.plot(*zip(*thinned, strict=True), color="gray", linewidth=0.8, alpha=0.5)
    rates.set_ylabel("learning rate", color="gray")
    _draw_borders(axes, ledger)
    axes.set(xlabel="tokens", ylabel="held-out loss (nats per token)")
    axes.grid(alpha=0.3)
    if ledger.validation:
        axes.legend()


def _draw_borders(axes: Any, ledger: Ledger) -> None:
    for tokens, name in ledger.borders:
        if tokens:
            axes.axvline(tokens, color="gray", linewidth=0.8, linestyle="--", alpha=0.6)
        axes.annotate(
            _text(name), (tokens, 1.0), xycoords=("data", "axes fraction"), xytext=(3, 3), fontsize=7,
            textcoords="offset points", alpha=0.7, parse_math=False,
        )  # fmt: skip


def _draw_matrix(figure: Any, axes: Any, ledger: Ledger) -> None:
    """R as a heat map: a row for each stage, a column for each domain."""
    matrix = ledger.matrix
    values = [[float("nan") if loss is None else loss for loss in row] for row in matrix.losses]
    image = axes.imshow(values, aspect="auto", cmap="viridis_r")
    for stage, row in enumerate(matrix.losses):
        for domain, loss in enumerate(row):
            shown = "-" if loss is None else f"{loss:.3f}"
            axes.text(domain, stage, shown, ha="center", va="center", fontsize=8, color="black", bbox=_BOX)
    axes.set_xticks(range(len(matrix.domains)), [_text(name) for name in matrix.domains])
    axes.set_yticks(range(len(matrix.stages)), [f"after {_text(name)}" for name in matrix.stages])
    axes.set_title("held-out loss (nats per token)", fontsize=10)
    figure.colorbar(image, ax=axes)


_BOX = {"facecolor": "white", "alpha": 0.6, "edgecolor": "none", "pad": 1.5}


def _draw_mixture(axes: Any, ledger: Ledger) -> None:
    """Tokens of each domain so far, as stacked areas."""
    thinned = ledger.shares[:: -(-len(ledger.shares) // MAX_POINTS) or 1]
    names = list(dict.fromkeys(name for _, counts in ledger.shares for name in counts))
    if thinned:
        columns = [[counts.get(name, 0) for _, counts in thinned] for name in names]
        axes.stackplot([tokens for tokens, _ in thinned], columns, labels=[_text(name) for name in names], alpha=0.8)
        axes.legend(loc="upper left")
    _draw_borders(axes, ledger)
    axes.set(xlabel="tokens", ylabel="tokens of each domain")


def _draw_frontier(axes: Any, runs: Sequence[tuple[str, Ledger]]) -> None:
    """Old loss against new loss, a point for each run: to the left and below is better."""
    for number, (name, ledger) in enumerate(runs):
        old, new = old_and_new(ledger)
        if old is not None and new is not None:
            axes.plot([new], [old], "o", color=f"C{number}", label=_text(name))
    axes.set(xlabel="mean loss of the newest stage's domains", ylabel="mean loss of the earlier stages' domains")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()


def old_and_new(ledger: Ledger) -> tuple[float | None, float | None]:
    """Return the mean loss of the earlier stages' domains, and that of the newest stage's own, at its end."""
    matrix = ledger.matrix
    if matrix.last == 0:
        return None, average(matrix)
    row = matrix.losses[matrix.last]
    old = mean(row[domain] for domain in matrix.seen(matrix.last - 1))
    return old, mean(row[domain] for domain, home in enumerate(matrix.homes) if home == matrix.last)


def _text(name: str) -> str:
    """Return a name as it can be drawn: `$` begins a formula, and a legend hides a name that begins with `_`."""
    text = title(name)[0].replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
