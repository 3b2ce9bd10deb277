"""Several models in one table: each figure of their reports in a row, a column for each model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from engine.evaluate.tables import Report, Table, number, words

Name = tuple[str, str]
"""What a figure is measured on, and its measure."""


def comparison(report: Report) -> Table:
    """Return the figures of a report of several models."""
    models = report["models"]
    found = [dict(_figures(one)) for one in models]
    names = dict.fromkeys(name for one in found for name in one)
    rows = [[*name, *(number(one.get(name)) for one in found)] for name in names]
    note = (
        "Same text, examples and faults for all; a dash where a model has no such figure. A difference of few examples "
        "may be chance: an accuracy p over n examples has a standard error of sqrt(p (1 - p) / n)."
    )
    return Table("Models side by side", [["on", "measure", *(one["label"] for one in models)], *rows], note)


def _figures(report: Report) -> Iterator[tuple[Name, float | None]]:
    """Yield the figures of one model that compare with another model's: no perplexity, which depends on the tokens."""
    for row in report.get("domains", []):
        key = next(name for name in row if name.endswith("bits_per_byte"))
        yield (row["domain"], words(key)), row[key]
    for one in report.get("harness", []):
        yield from (((one["task"], name), value) for name, value in one["measures"].items() if "_stderr" not in name)
    for row in report.get("sets", []):
        for name, value in row["measures"].items():
            if name != "examples" and _is_number(value):
                yield (row["set"], words(name)), value
    for name, one in report.get("calibration", {}).items():
        yield (name, "ECE"), one["ece"]
    for one in report.get("robustness", []):
        for row in one["operators"]:
            yield (one["set"], f"{words(one['measure'])}, {row['operator']}"), row[one["measure"]]
    for one in report.get("bias", []):
        for pair in one["pairs"]:
            pair_words, difference = " / ".join(pair["words"]), pair["mean_difference"]
            if "label" in pair:  # that of the label which differs most, another one for each model
                yield (pair_words, "largest difference"), abs(difference)
            else:
                yield (pair_words, "mean difference"), difference


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, int | float)
