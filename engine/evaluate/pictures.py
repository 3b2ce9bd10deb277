"""Pictures of an evaluation's report, as SVG text for a page.

Words stay text, so that the reader's own fonts draw them, Chinese ones too; nothing in a picture refers to a file.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

from engine.evaluate.tables import Report

_COLOR = "#3b6ea5"
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "palimpsest",
    "font.family": "sans-serif",
    "font.size": 9,
}


class Picture(NamedTuple):
    """A title and the text of an SVG."""

    title: str
    svg: str


def pictures(report: Report) -> list[Picture]:
    """Return the pictures of the parts that a report has."""
    found = [*_of_domains(report), *_of_sets(report)]
    for name, one in report.get("calibration", {}).items():
        found += [Picture(f"Reliability on {name}", _drawn(lambda axes, one=one: _reliability(axes, one), 8))]
    for one in report.get("robustness", []):
        falls = {row["operator"]: row["fall"] or 0.0 for row in one["operators"]}
        title = f"{_words(one['measure'])} lost by faults on {one['set']}"
        found += [Picture(title, _drawn(lambda axes, falls=falls: _bars(axes, falls, "{:+.3f}"), len(falls)))]
    for one in report.get("bias", []):
        found += [Picture(f"Templates ({one['language']})", _drawn(lambda axes, one=one: _dots(axes, one), 9))]
    return found


def _of_domains(report: Report) -> list[Picture]:
    rows = report.get("domains", [])
    key = next((name for row in rows for name in row if name.endswith("bits_per_byte")), "")
    known = {row["domain"]: row[key] for row in rows if row[key] is not None}
    return [Picture(_words(key), _drawn(lambda axes: _bars(axes, known), len(known)))] if known else []


def _of_sets(report: Report) -> list[Picture]:
    rows, found = report.get("sets", []), []
    if len(rows) > 1:
        name = report["main_measure"]
        values = {row["set"]: row["measures"][name] or 0.0 for row in rows}
        found.append(Picture(f"{_words(name)} by set", _drawn(lambda axes: _bars(axes, values), len(values))))
    for row in rows:
        if "confusion" in row["measures"]:
            found += [Picture(f"Confusion on {row['set']}", _drawn(lambda axes, row=row: _confusion(axes, row), 8))]
    return found


def _words(name: str) -> str:
    return name.replace("_", " ").capitalize()


def _drawn(draw: Callable[[Any], None], rows: int) -> str:
    """Return the SVG of one drawing, `rows` lines of text high."""
    import matplotlib
    from matplotlib.figure import Figure  # no pyplot: its figures are kept

    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that its own font lacks; the reader's draws them
        figure = Figure(figsize=(6, min(1.0 + 0.36 * rows, 12)), layout="constrained")
        draw(figure.add_subplot())
        content = io.StringIO()
        figure.savefig(content, format="svg", metadata={"Date": None})
    # the prolog and the metadata of a file are nothing in a page
    text = content.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    return text.replace("<svg ", '<svg role="img" ', 1)


def _bars(axes: Any, values: dict[str, float], form: str = "{:.3f}") -> None:
    names = list(values)
    bars = axes.barh(range(len(names)), list(values.values()), color=_COLOR, height=0.6)
    axes.bar_label(bars, [form.format(value) for value in values.values()], padding=3)
    axes.set_yticks(range(len(names)), [_plain(name) for name in names])
    axes.invert_yaxis()
    axes.margins(x=0.18)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def _confusion(axes: Any, row: dict[str, Any]) -> None:
    """Draw the numbers of examples by expected (rows) and predicted label, coloured by their share of the row."""
    counts = row["measures"]["confusion"]
    labels = [_plain(label) for label in row["measures"]["f1"]]
    shares = [[count / max(1, sum(line)) for count in line] for line in counts]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    if len(labels) <= 20:
        for y, line in enumerate(counts):
            for x, count in enumerate(line):
                axes.text(
                    x, y, f"{count:,}", ha="center", va="center", color="white" if shares[y][x] > 0.5 else "black"
                )
    axes.set_xticks(range(len(labels)), labels)
    axes.set_yticks(range(len(labels)), labels)
    axes.set(xlabel="predicted", ylabel="expected")


def _reliability(axes: Any, one: dict[str, Any]) -> None:
    """Draw the accuracy of each bin of confidence beside the diagonal, where both are equal (DeGroot and Fienberg 1983;
    Niculescu-Mizil and Caruana 2005)."""
    for each in one["bins"]:
        width = each["to"] - each["from"]
        axes.bar(each["from"] + width / 2, each["accuracy"], width=0.95 * width, color=_COLOR, alpha=0.85)
        axes.plot([each["confidence"]] * 2, [each["accuracy"], each["confidence"]], color="#b5482f", linewidth=2)
        axes.annotate(f"{each['count']:,}", (each["from"] + width / 2, 0.01), ha="center", color="white", fontsize=6)
    axes.plot([0, 1], [0, 1], color="gray", linestyle="--", linewidth=1)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy")
    axes.set_title(f"ECE {one['ece']:.4f}", fontsize=9)


def _dots(axes: Any, one: dict[str, Any]) -> None:
    """Draw a dot for each template of each pair of words."""
    pairs = one["pairs"]
    for place, pair in enumerate(pairs):
        values = list(pair["templates"].values())
        axes.plot(values, [place] * len(values), "o", color=_COLOR, alpha=0.6, markersize=5)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(pairs)), [_plain(" / ".join(pair["words"])) for pair in pairs])
    axes.invert_yaxis()
    axes.set_xlabel(one["measure"].replace(", ", ",\n"), fontsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def _plain(name: str) -> str:
    """Return a name that matplotlib takes for no formula."""
    return name.replace("$", r"\$")
