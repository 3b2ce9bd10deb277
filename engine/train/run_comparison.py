"""Metrics of several runs side by side, and the first step at which they part.

Every run is compared with the first one, step by step, in all numbers that training computes, so in all but times.
Two runs on one layout are equal bit for bit, so the first exact difference names the step where something happened; on
other layouts sums are rounded in another order, and the first step whose loss differs by more than a tolerance does.
Runs that still go on are read as far as they are. Nothing here imports torch.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from engine.config.resume import Change, compare
from engine.config.schema.run import RunConfig
from engine.errors import ConfigError, DataError
from engine.train.plot import Curve
from engine.train.records import METRICS, Record, records_from
from engine.train.run_status import is_run_folder, read_config

PLOT = "compare.png"
TIMES = ("step_seconds", "tokens_per_second", "data_wait_seconds", "validation_seconds")
"""Metrics that differ between any two runs."""
MIN_STEPS = 2
"""Least number of steps of a run that has a curve."""
_ByKind = dict[str, Record]
"""Records of one step by their kind: step, validation, rollback."""


@dataclass(frozen=True)
class RunMetrics:
    """Metrics of one run, without the records themselves: a long run has a million of them."""

    folder: Path
    config: RunConfig | None
    """None where the configuration in the folder cannot be read."""
    training: Curve
    """Loss of each step; NaN where it was not finite."""
    validation: Curve
    tokens: int
    """Tokens trained on up to the newest step."""
    tokens_per_second: float
    """Median over all steps, so that evaluations, checkpoints and a start's first step do not count."""
    seconds: float
    """Seconds within steps."""


@dataclass(frozen=True)
class Parting:
    """First step at which two runs differ, and the metric that does; None is a number that was not finite."""

    step: int
    metric: str
    first: float | None
    other: float | None


@dataclass(frozen=True)
class Comparison:
    """Comparison of one run with the first one."""

    common_steps: int
    """Steps that both have a record of, up to the last one compared: after both partings nothing is read."""
    parted: Parting | None
    """First difference of any bit, in whatever training computes."""
    parted_beyond: Parting | None
    """First difference of a loss beyond the relative tolerance."""
    changes: list[Change] | None
    """Configuration keys that differ, without `folder` and `name`; None where one of both cannot be read."""


def open_run(folder: Path) -> RunMetrics:
    """Read the metrics of a run.

    Raises:
        ConfigError: the folder is no run folder.
        DataError: there are fewer than `MIN_STEPS` steps.
    """
    if not is_run_folder(folder):
        wrong = "is no run folder" if folder.exists() else "does not exist"
        raise ConfigError(f"{folder} {wrong}", f"run folders (with {METRICS}), or run files", "check the path")
    try:
        config = read_config(folder)
    except ConfigError:
        config = None
    training, validation, speeds, seconds, tokens = [], [], [], 0.0, 0
    for record in records_from(folder, 0):
        if (kind := _kind(record)) == "step":
            training.append((record["step"], record.get("loss", math.nan)))
            speeds.append(record.get("tokens_per_second", 0.0))
            seconds += record["step_seconds"]
            tokens = int(record.get("tokens", 0))
        elif kind == "validation":
            validation.append((record["step"], record.get("validation_loss", math.nan)))
    if len(training) < MIN_STEPS:
        found = "one step" if training else "no step"
        raise DataError(
            f"{folder} has records of {found} in {METRICS}",
            f"runs of {MIN_STEPS} steps or more",
            "compare it once it has gone on",
        )
    return RunMetrics(folder, config, training, validation, tokens, statistics.median(speeds), seconds)


def compare_runs(first: RunMetrics, other: RunMetrics, tolerance: float) -> Comparison:
    """Compare `other` with `first`; losses whose relative difference is at most `tolerance` count as equal."""
    num_common, parted, beyond = 0, None, None
    for step, left, right in _common_steps(first.folder, other.folder):
        num_common += "step" in left and "step" in right
        for kind in left.keys() & right.keys():
            # The first of each kind stays; two comparisons, since the last bits may part long before the losses do.
            parted = parted or _parting(step, left[kind], right[kind], None)
            beyond = beyond or _parting(step, left[kind], right[kind], tolerance)
        if parted and beyond:
            break
    return Comparison(num_common, parted, beyond, _changes(first.config, other.config))


def refuse_other_models(runs: list[RunMetrics]) -> None:
    """Raise `ConfigError` where a run trains another model than the first: losses of two models part at step 1."""
    first = runs[0]
    for other in runs[1:]:
        changed = [
            change
            for change in _changes(first.config, other.config) or []
            if change.key.startswith("model.") and change.kind == "meaning"
        ]
        if changed:
            raise ConfigError(
                f"{other.folder} trains another model than {first.folder}: " + ", ".join(map(str, changed)),
                "runs of one model",
                "leave it out, or compare nevertheless with --other-models",
            )


def _changes(before: RunConfig | None, after: RunConfig | None) -> list[Change] | None:
    if before is None or after is None:
        return None
    return [change for change in compare(before, after) if change.key not in ("folder", "name")]


def _common_steps(first: Path, other: Path) -> Iterator[tuple[int, _ByKind, _ByKind]]:
    """Yield each step that both runs have records of, with them."""
    left, right = _by_step(first), _by_step(other)
    here, there = next(left, None), next(right, None)
    while here is not None and there is not None:
        if here[0] == there[0]:
            yield here[0], here[1], there[1]
        # Merge of two ascending sequences: whichever is behind goes on, and both where they are equal.
        # Kept, since `here` may be the next step by the time of the second comparison.
        behind = here[0]
        if behind <= there[0]:
            here = next(left, None)
        if there[0] <= behind:
            there = next(right, None)


def _by_step(folder: Path) -> Iterator[tuple[int, _ByKind]]:
    for step, found in itertools.groupby(records_from(folder, 0), lambda record: record["step"]):
        yield step, {_kind(record): record for record in found}


def _kind(record: Record) -> str:
    if "step_seconds" in record:
        return "step"
    return "validation" if any(name.startswith("validation_") for name in record) else "rollback"


def _parting(step: int, left: Record, right: Record, tolerance: float | None) -> Parting | None:
    """Return the first number of two records that differs: by any bit, or a loss by more than a tolerance."""
    # names of both, without repetitions, in the order of the records: the same name is reported on each call
    for name in dict.fromkeys((*left, *right)):
        if name in TIMES or (tolerance is not None and not _is_loss(name)):
            continue
        first, other = left.get(name), right.get(name)
        # None, a number that was not finite, equals None alone.
        if first != other and not _close(first, other, tolerance or 0.0):
            return Parting(step, name, first, other)
    return None


def _is_loss(name: str) -> bool:
    """Return True for a loss: of training or validation, whole or of one objective or source."""
    return name.partition("/")[0].endswith("loss")


def _close(first: float | None, other: float | None, tolerance: float) -> bool:
    if first is None or other is None:
        return False
    # Relative and symmetric. With tolerance 0 unequal numbers are never close.
    return abs(first - other) <= tolerance * max(abs(first), abs(other))


def draw(runs: list[RunMetrics], labels: list[str], path: Path) -> None:
    """Draw the losses of all runs over each other: lines for training, dots for validation, a colour for each run."""
    from matplotlib.figure import Figure

    from engine.train.plot import MAX_POINTS, draw_curve, title

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    shown: list[tuple[str, list[str]]] = []
    for number, (run, label) in enumerate(zip(runs, labels, strict=True)):
        # ceiling of steps / MAX_POINTS, so that at most MAX_POINTS stay
        thinned = run.training[:: -(-len(run.training) // MAX_POINTS)]
        for curve, style, text in ((thinned, "-", label), (run.validation, "o--", f"{label}, validation")):
            if curve:
                draw_curve(axes, curve, style, "a run", color=f"C{number % 10}")
                shown.append(title(text))
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    for entry, (text, families) in zip(axes.legend().get_texts(), shown, strict=True):
        entry.set(text=text, parse_math=False, fontfamily=families)  # matplotlib hides a label that begins with _
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, dpi=120, format="png")
    partial.replace(path)
