"""Pictures of a fine-tuning run in its folder: `learning.png`, and of a task with labels `confusion.png`.

Names of runs and labels may be in any script (`engine.train.plot.title`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.atomic import replacing
from engine.train.plot import Curve, draw_curve, read_curves, title
from engine.train.records import METRICS, read_metrics

LEARNING, CONFUSION = "learning.png", "confusion.png"
_MOST_NUMBERS = 15  # labels of a matrix in whose cells the counts are written


def draw_learning(folder: Path, name: str, metric: str, best_step: int | None) -> None:
    """Draw training and validation loss of a run over its steps and, beside them, `metric` of its evaluations; the best
    checkpoint's step is marked."""
    from matplotlib.figure import Figure  # no pyplot: its figures are shared between threads

    with (folder / METRICS).open("rb") as lines:
        training, validation = read_curves(lines)
    records = [record for record in read_metrics(folder) if metric in record]
    measured: Curve = [(record["step"], float(record[metric])) for record in records]
    figure = Figure(figsize=(11 if measured else 6.5, 4.5), layout="constrained")
    losses, *others = figure.subplots(1, 2 if measured else 1, squeeze=False).ravel()
    for curve, label, style in ((training, "training", "-"), (validation, "validation", "o--")):
        draw_curve(losses, curve, style, label)
    losses.set(xlabel="step", ylabel="loss")
    for axes in others:
        draw_curve(axes, measured, "o--", metric.removeprefix("validation_"), color="C1")
        axes.set(xlabel="step", ylabel=metric.removeprefix("validation_").replace("_", " "))
    for axes in (losses, *others):
        axes.grid(alpha=0.3)
        if best_step is not None:
            axes.axvline(best_step, color="gray", linewidth=0.8, linestyle="--", label="best checkpoint")
        if axes.lines:
            axes.legend()
    _save(figure, folder / LEARNING, name)


def draw_confusion(folder: Path, name: str, labels: tuple[str, ...], confusion: list[list[int]]) -> None:
    """Draw a confusion matrix, whose rows are the labels expected and whose columns those predicted; shades are shares
    of a row."""
    from matplotlib.figure import Figure

    size = 3.0 + 0.45 * len(labels)
    figure = Figure(figsize=(size + 0.8, size), layout="constrained")
    axes = figure.add_subplot()
    shares = [[count / max(1, sum(row)) for count in row] for row in confusion]
    image = axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0)
    figure.colorbar(image, ax=axes, label="share of the label's examples", shrink=0.8)
    if len(labels) <= _MOST_NUMBERS:
        for i, row in enumerate(confusion):
            for j, count in enumerate(row):
                color = "white" if shares[i][j] > 0.5 else "black"  # readable on its shade
                axes.text(j, i, f"{count:,}", ha="center", va="center", color=color, fontsize=9)
    drawn = [title(label) for label in labels]
    axes.set(xlabel="predicted", ylabel="expected")
    axes.set_xticks(range(len(labels)), [text for text, _ in drawn], rotation=45, ha="right")
    axes.set_yticks(range(len(labels)), [text for text, _ in drawn])
    for axis in (axes.xaxis, axes.yaxis):
        for tick, (_, families) in zip(axis.get_ticklabels(), drawn, strict=True):
            tick.set(fontfamily=families, parse_math=False)
    _save(figure, folder / CONFUSION, name)


def _save(figure: Any, path: Path, name: str) -> None:
    text, families = title(name)
    figure.suptitle(text, fontfamily=families, parse_math=False)
    with replacing(path) as file:
        figure.savefig(file, dpi=120, format="png", metadata={"Title": name})
