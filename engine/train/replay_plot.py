"""`fit.png`: measured losses of short runs with different replay ratios, and the curves that the law forecasts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.atomic import replacing
from engine.train.replay_fit import NEW, OLD
from engine.train.replay_law import Areas, Law
from engine.train.replay_runs import Fitted


def draw(fitted: Fitted, path: Path) -> None:
    """Draw the old domains' losses and the new ones' over the steps of the stage: dots are measured, lines forecast for
    the whole stage with the ratios that were tried and with the recommended one."""
    from matplotlib.figure import Figure  # no pyplot: its figures are shared between threads

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, key in zip(figure.subplots(1, 2), (OLD, NEW), strict=True):
        _draw_domain(axes, fitted, key)
    with replacing(path) as file:
        figure.savefig(file, dpi=120, format="png")


def _draw_domain(axes: Any, fitted: Fitted, key: str) -> None:
    found, law = fitted.found, fitted.found.laws.get(key)
    for number, run in enumerate(fitted.runs):
        label = f"ratio {run.ratio:g}"
        axes.plot(*zip(*run.losses[key], strict=True), ".", color=f"C{number}", label=label)
        if isinstance(law, Law):
            _draw_forecast(axes, fitted.whole, law, run.ratio, color=f"C{number}", linewidth=1)
    if isinstance(law, Law) and found.ratio is not None:
        label = f"{'recommended' if found.is_carried else 'smallest mean'}: {found.ratio:.3g}"
        _draw_forecast(axes, fitted.whole, law, found.ratio, color="black", linestyle="--", label=label)
    axes.set(xlabel="step of the stage", ylabel=f"held-out loss of the {key} data (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _draw_forecast(axes: Any, whole: Areas, law: Law, ratio: float, **style: Any) -> None:
    step = -(-whole.forward.size // 400)
    forward, annealing = whole.forward[::step], whole.annealing[::step]
    axes.plot(range(0, whole.forward.size, step), law.predict(forward, annealing, ratio + 0 * forward), **style)
