"""`palimpsest compare`: metrics of runs side by side, drawn over each other, and the step at which they part."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from engine.data.visible import visible
from engine.errors import ConfigError
from engine.logs import duration
from engine.redact import redact, redacted
from tools.path_labels import path_labels
from tools.status import folder_of

if TYPE_CHECKING:  # pydantic would make --help slow
    from engine.train.run_comparison import Comparison, Parting, RunMetrics


def main(
    paths: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="Run folders or run files, two or more.")],
    output: Annotated[Path, typer.Option(help="Picture of all losses to write, a PNG file.")] = Path("compare.png"),
    tolerance: Annotated[
        float, typer.Option(min=0.0, help="Largest relative difference of two losses that count as equal.")
    ] = 1e-3,
    other_models: Annotated[
        bool, typer.Option("--other-models", help="Compare runs whose models differ, too.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Compare runs with the first one: losses, tokens, speed, changed keys, and the first step at which they part.

    Runs part exactly where any number that training computes differs by a bit, and beyond the tolerance where a loss
    does. Runs that still go on are compared as far as they are.
    """
    from engine.train.run_comparison import compare_runs, draw, open_run, refuse_other_models

    # Without repeats, in the order given: the first one is what the others are compared with.
    folders = list(dict.fromkeys(map(folder_of, paths)))
    if len(folders) < 2:
        raise ConfigError(f"only {folders[0]} to compare", "two run folders or more", "name another run, too")
    _check_output(output)
    runs = [open_run(folder) for folder in folders]
    if not other_models:
        refuse_other_models(runs)
    labels = path_labels(folders)
    compared = [compare_runs(runs[0], run, tolerance) for run in runs[1:]]
    draw(runs, labels, output)
    if as_json:
        tree = {"tolerance": tolerance, "runs": [_as_json(run) for run in runs], "plot": str(output)}
        tree["compared_with_first"] = [asdict(comparison) for comparison in compared]
        print(json.dumps(redacted(tree), indent=1))
        return
    print(_table(runs, labels))
    for label, comparison in zip(labels[1:], compared, strict=True):
        print("\n".join(map(_clean, _comparison(labels[0], label, comparison, tolerance))))
    print(f"\nlosses drawn in {_clean(str(output))}")


def _check_output(path: Path) -> None:
    if path.suffix.lower() != ".png" or path.is_dir() or not path.parent.is_dir():
        raise ConfigError(f"--output {path}", "the path of a PNG file in a folder that is there", "name another file")


def _losses(run: RunMetrics) -> dict[str, tuple[int, float] | None]:
    """Return step and value of the final and the best losses; None where a run has none."""
    from engine.train.plot import best, final

    return {
        "final training loss": final(run.training),
        "best training loss": best(run.training),
        "final validation loss": final(run.validation),
        "best validation loss": best(run.validation),
    }


def _as_json(run: RunMetrics) -> dict[str, object]:
    found: dict[str, object] = {"folder": str(run.folder), "step": run.training[-1][0], "tokens": run.tokens}
    found |= {"tokens_per_second": run.tokens_per_second, "seconds_in_steps": run.seconds}
    for name, point in _losses(run).items():
        found[name.replace(" ", "_")] = None if point is None else {"step": point[0], "loss": point[1]}
    return found


def _table(runs: list[RunMetrics], labels: list[str]) -> str:
    """Return the metrics as lines of text, with a column for each run."""
    columns = [_column(run) for run in runs]
    rows = [["", *map(_clean, labels)]]
    rows += [[name, *(column[name] for column in columns)] for name in columns[0]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _column(run: RunMetrics) -> dict[str, str]:
    losses = {
        name: "-" if point is None else f"{point[1]:.4f} (step {point[0]})" for name, point in _losses(run).items()
    }
    return {
        "steps": f"{run.training[-1][0]:,}",
        "tokens": f"{run.tokens:,}",
        "tokens/s": f"{run.tokens_per_second:,.0f}",
        "time in steps": duration(run.seconds),
        **losses,
    }


def _comparison(first: str, other: str, found: Comparison, tolerance: float) -> list[str]:
    """Return the differences between a run and the first one as lines of text."""
    lines = ["", f"{other} beside {first}"]
    if not found.common_steps:
        lines.append("  they have no step in common")
    else:
        # Exactly first: one bit is enough to say that two runs are not the same run.
        lines.append(f"  exactly: {_parting(found.parted)}")
        lines.append(f"  beyond a relative difference of {tolerance:g}: {_parting(found.parted_beyond)}")
    if found.changes is None:
        return [*lines, "  configuration: cannot be read in one of both folders"]
    return [
        *lines,
        "  configuration:" if found.changes else "  configuration: equal",
        *(f"    {one}" for one in found.changes),
    ]


def _parting(found: Parting | None) -> str:
    if found is None:
        return "equal at every step that both have"
    values = ["none" if value is None else f"{value:.9g}" for value in (found.first, found.other)]
    return f"they part at step {found.step}: {found.metric} {values[0]}, {values[1]}"


def _clean(text: str) -> str:
    """Return the text on one line, without control characters and credentials; anybody may have written it."""
    return visible(redact(text)).replace("\n", " ")
