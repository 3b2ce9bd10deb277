"""`loss.png` in the run folder: training and validation loss over steps, drawn by a thread while the run goes on.

The picture is made from `metrics.jsonl`, so that it shows what earlier starts of the run have recorded. Reading keeps a
bounded number of points however long the run is, and a drawing waits until it is cheap beside the time since the last
one. Text that no installed font can draw is romanised: a title is never a row of boxes.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from engine.atomic import replacing
from engine.logs import logger

PLOT = "loss.png"
EVERY_SECONDS = 30.0
"""Seconds from the end of a drawing to the next, at the least."""
IDLE_FACTOR = 50.0
"""Pause after a drawing, as a multiple of the seconds that it took: drawing takes at most 2 % of the time."""
MAX_POINTS = 4096
"""Points of the training loss that are drawn; of a longer run every second, fourth, ... record is."""
MAX_TITLE = 80

_log = logger(__name__)

Curve = list[tuple[int, float]]
"""Loss by step; NaN where a record has none, so that no line is drawn across it."""


class Plot:
    """A sink of `engine.train.metrics` that draws the records written so far, now and then and at the end."""

    def __init__(
        self,
        folder: Path,
        source: str,
        name: str,
        borders: Mapping[int, str] = MappingProxyType({}),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._draw = lambda: draw(folder, source, name, borders)
        self._clock, self._due = clock, -math.inf
        self._thread: threading.Thread | None = None
        self._failed = False

    def write(self, record: dict[str, Any]) -> None:
        """Start a drawing if none is under way and the last one is long enough ago."""
        if self._thread is not None and not self._thread.is_alive():
            self._thread = None
        if self._thread is None and self._clock() >= self._due and not self._failed:
            self._thread = threading.Thread(target=self._attempt, name="loss.png", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Draw everything; return when it is done."""
        if self._thread is not None:
            self._thread.join()
        if not self._failed:
            self._attempt()

    def _attempt(self) -> None:
        begin = self._clock()
        try:
            self._draw()
        except Exception as error:  # a picture, whatever its trouble, must not cost the run
            self._failed = True
            _log.warning("%s cannot be drawn and is left out: %s", PLOT, error)
        end = self._clock()
        self._due = end + max(EVERY_SECONDS, IDLE_FACTOR * (end - begin))


def draw(folder: Path, source: str, name: str, borders: Mapping[int, str] = MappingProxyType({})) -> None:
    """Draw the records in the file `source` of a run folder, titled by the run's name.

    `borders` are the names of run stages by the number of steps before them; those that have begun get a faint line.
    """
    from matplotlib.figure import Figure  # no pyplot: its figures are shared between threads

    with (folder / source).open("rb") as lines:
        training, validation = read_curves(lines)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for curve, label, style in ((training, "training", "-"), (validation, "validation", "o--")):
        draw_curve(axes, curve, style, label)
    last = max((step for step, _ in training), default=0)
    for border, run_stage in borders.items():
        if border <= last:
            axes.axvline(border, color="gray", linewidth=0.8, alpha=0.4, linestyle="--")
            axes.annotate(
                title(run_stage)[0], (border, 0.98), xycoords=("data", "axes fraction"), xytext=(3, 0), fontsize=7,
                textcoords="offset points", va="top", alpha=0.6, parse_math=False,
            )  # fmt: skip
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    text, families = title(name)
    axes.set_title(text, parse_math=False, fontfamily=families)
    axes.grid(alpha=0.3)
    if training or validation:
        axes.legend()
    with replacing(folder / PLOT) as file:  # who looks at it meanwhile sees a whole picture
        figure.savefig(file, dpi=120, format="png", metadata={"Title": name})


def draw_curve(axes: Any, curve: Curve, style: str, label: str, color: str | None = None) -> None:
    """Draw one curve; a point that no line reaches is drawn as a dot."""
    if not curve:
        return
    (line,) = axes.plot(*zip(*curve, strict=True), style, label=label, markersize=4, linewidth=1.2, color=color)
    if alone := isolated(curve):
        axes.plot(*zip(*alone, strict=True), "o", markersize=4, color=line.get_color())


def read_curves(lines: Iterable[bytes]) -> tuple[Curve, Curve]:
    """Return training and validation loss in lines of JSON, the former thinned to `MAX_POINTS` evenly spaced records.

    Lines that are no record (a kill cuts the last one off) are left out; those that are thinned out are not parsed.
    """
    training: Curve = []
    validation: Curve = []
    stride, seen = 1, 0
    for line in lines:
        # Looked for as bytes: parsing JSON is what takes the time, and of a long run most lines are skipped here.
        evaluates = b'"validation_' in line
        if not evaluates and b'"learning_rate"' in line:
            seen += 1
            if (seen - 1) % stride:
                continue
        try:
            record = json.loads(line)
            step = int(record["step"])
        except (ValueError, TypeError, KeyError):
            continue
        if evaluates:
            validation.append((step, record.get("validation_loss", math.nan)))
        elif "learning_rate" in record:
            training.append((step, record.get("loss", math.nan)))
            if len(training) > MAX_POINTS:
                # With at most 4 points, of records 0 to 4 the records 0, 2, 4 stay, and the next one taken is 6.
                del training[1::2]
                stride *= 2
    return training, validation


def best(curve: Curve) -> tuple[int, float] | None:
    """Return step and value of the smallest loss; None where there is none."""
    return min((point for point in curve if math.isfinite(point[1])), key=lambda point: point[1], default=None)


def final(curve: Curve) -> tuple[int, float] | None:
    """Return step and value of the newest loss that is finite; None where there is none."""
    return next((point for point in reversed(curve) if math.isfinite(point[1])), None)


def isolated(curve: Curve) -> Curve:
    """Return the points of a curve that no line reaches, since both neighbours are missing or NaN."""
    # padded by one on each side: values[i] and values[i + 2] are the neighbours of curve[i]
    values = [math.nan, *(value for _, value in curve), math.nan]
    return [
        point
        for point, before, after in zip(curve, values, values[2:], strict=False)
        if math.isfinite(point[1]) and not math.isfinite(before) and not math.isfinite(after)
    ]


def title(name: str) -> tuple[str, list[str]]:
    """Return the name as it can be drawn, and the font families to draw it with.

    Characters that the default font lacks are looked for in the other installed fonts; those that none has are
    romanised.
    """
    from anyascii import anyascii

    text = "".join(letter if letter.isprintable() else " " for letter in name)
    text = text if len(text) <= MAX_TITLE else text[: MAX_TITLE - 3] + "..."
    families, missing = _families(text)
    return "".join(anyascii(letter) if letter in missing else letter for letter in text), families


def _families(text: str) -> tuple[list[str], set[str]]:
    """Return font families that draw the text together, the default first, and the characters that none has."""
    from matplotlib import font_manager, ft2font

    found, missing = [], set(text) - {" "}
    default = font_manager.FontProperties()
    paths = [font_manager.findfont(default), *(entry.fname for entry in font_manager.fontManager.ttflist)]
    # dict.fromkeys: without repetitions, in order, the default font first
    for path in dict.fromkeys(paths):
        if found and not missing:
            break
        try:
            font = ft2font.FT2Font(path)
        except (OSError, RuntimeError):  # removed or damaged since matplotlib listed it
            continue
        drawn = {letter for letter in missing if font.get_char_index(ord(letter))}
        if (not found or drawn) and not font.family_name.startswith("Last Resort"):  # its glyphs are boxes
            found.append(font.family_name)
            missing -= drawn
    return found, missing
