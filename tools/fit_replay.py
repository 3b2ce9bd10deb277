"""`palimpsest fit-replay`: short runs with different replay ratios, and the ratio that they recommend."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engine.atomic import write_atomically
from engine.errors import ConfigError

if TYPE_CHECKING:  # pydantic and numpy would make --help slow
    from engine.train.replay_runs import Fitted

RESULT, PLOT = "fit.json", "fit.png"
SHOWN_RATIOS = 6
"""Ratios in the table, evenly spaced over those that were tried."""


def main(
    path: Annotated[Path, typer.Argument(metavar="RUN.yaml|DIR", help="Run file, or the folder of prepared runs.")],
    ratios: Annotated[str | None, typer.Option(metavar="R,R,...", help="With --prepare: ratios to try.")] = None,
    tokens: Annotated[int | None, typer.Option(metavar="N", help="With --prepare: length of each run.")] = None,
    prepare: Annotated[Path | None, typer.Option(metavar="DIR", help="Write the short runs into this folder.")] = None,
    old_weight: Annotated[float, typer.Option(min=0.0, max=1.0, help="Weight of the old domains' loss.")] = 0.5,
) -> None:
    """Find the replay ratio of a run file's last stage from short runs.

    With --prepare, write the files and folders of short runs that go on from the end of the stage before, and print the
    commands that train them. Then call this with that folder: it fits the losses of old and new data in the ratio and
    the step, recommends a ratio for the whole stage with its error, and says so where the runs do not carry one.
    """
    if prepare is not None:
        if ratios is None or tokens is None:
            raise ConfigError(
                "--prepare without --ratios or --tokens", "both of them", "--ratios 0,0.05,0.25 --tokens N"
            )
        _prepare(path, _numbers(ratios), tokens, prepare)
        return
    if ratios is not None or tokens is not None:
        raise ConfigError("--ratios or --tokens without --prepare", "--prepare DIR beside them", "name a new folder")
    from engine.train.replay_plot import draw
    from engine.train.replay_runs import fit_runs

    fitted = fit_runs(path, old_weight)
    print(_text(fitted, old_weight))
    write_atomically(path / RESULT, json.dumps(_as_json(fitted), indent=1) + "\n")
    told = f"\nwritten to {path / RESULT}"
    if fitted.runs:
        draw(fitted, path / PLOT)
        told += f", drawn in {path / PLOT}"
    print(told)


def _prepare(path: Path, ratios: list[float], tokens: int, folder: Path) -> None:
    from engine.checkpoint.interchange.initial import model_of
    from engine.config.load import load_run
    from engine.train.replay_runs import prepare_runs

    files = prepare_runs(path, ratios, tokens, folder)
    parallel = load_run(path, None, model_of).parallel
    alone = parallel.pipe * parallel.tensor * parallel.sequence * (parallel.data or 1) == 1
    verb = "train" if alone else "launch"
    steps = load_run(files[0], None, model_of).stages[-1].num_steps
    print(f"{len(files)} runs of {steps:,} steps in {folder}. Train them, in any order, as you train the run itself:\n")
    for file in files:
        print(f"  palimpsest {verb} {shlex.quote(str(file))}")
    print(f"\nthen: palimpsest fit-replay {shlex.quote(str(folder))}")


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--ratios {text}", "numbers with commas between them", "--ratios 0,0.05,0.25") from error


def _text(fitted: Fitted, old_weight: float) -> str:
    found, stage = fitted.found, fitted.config.stages[-1]
    lines = [f"{name} has not come to its end: train it first" for name in fitted.unfinished]
    at = fitted.short_steps if found.law == "power" else stage.num_steps
    if found.forecasts:
        lines.append(
            f"stage {stage.name}: {len(fitted.runs)} runs of {fitted.short_steps:,} steps, forecast at step {at:,}\n"
        )
        lines += _table(found.forecasts, old_weight)
        scatter = ", ".join(f"{key} {value:.4f}" for key, value in found.rms.items())
        lines.append(f"\nscatter of the measurements around the fit, in nats: {scatter}")
    lines += found.notes
    if found.is_carried and found.ratio is not None and found.interval is not None:
        low, high = found.interval
        lines.append(
            f"recommended: replay.ratio {found.ratio:.3g} ({low:.3g} to {high:.3g}), for the smallest mean loss of old "
            f"and new domains (--old-weight {old_weight:g})"
        )
    else:
        lines += [f"no recommendation: {reason}" for reason in found.reasons]
    return "\n".join(lines)


def _table(forecasts: dict[str, list[tuple[float, float]]], old_weight: float) -> list[str]:
    """Return the forecast losses for some ratios."""
    old, new = forecasts["old"], forecasts["new"]
    step = max(1, (len(old) - 1) // (SHOWN_RATIOS - 1))
    lines = [f"  {'ratio':>7}  {'old':>8}  {'new':>8}  {'weighted':>8}"]
    for (ratio, old_loss), (_, new_loss) in list(zip(old, new, strict=True))[::step]:
        weighted = old_weight * old_loss + (1 - old_weight) * new_loss
        lines.append(f"  {ratio:>7.3f}  {old_loss:>8.4f}  {new_loss:>8.4f}  {weighted:>8.4f}")
    return lines


def _as_json(fitted: Fitted) -> dict[str, Any]:
    found = fitted.found
    return {
        "stage": fitted.config.stages[-1].name,
        "is_carried": found.is_carried,
        "ratio": found.ratio,
        "interval": found.interval,
        "reasons": found.reasons,
        "notes": found.notes,
        "law": found.law,
        "numbers": {key: asdict(law) for key, law in found.laws.items()},
        "rms": found.rms,
        "forecasts": found.forecasts,
        "unfinished": fitted.unfinished,
    }
