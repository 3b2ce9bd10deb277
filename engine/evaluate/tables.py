"""Tables of an evaluation's report, the same ones for the terminal and for the page.

The report is the tree that is written as JSON (`tools.evaluate` says which keys it has); every table is a function of
it alone, so that a page can be made again from the file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Report = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """Rows of text, the first of them the heading, and a sentence on how to read them."""

    title: str
    rows: list[list[str]]
    note: str = ""


def tables(report: Report) -> list[Table]:
    """Return the tables of the parts that a report has."""
    found = [_domains(report), _harness(report), *_sets(report), _calibration(report)]
    found += [_robustness(one) for one in report.get("robustness", [])]
    found += [_bias(one) for one in report.get("bias", [])]
    return [table for table in found if table is not None]


def number(value: Any) -> str:
    """Return a number as people read it; `-` stands for None."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 1000 else f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def words(name: str) -> str:
    """Return the name of a measure as people read it."""
    return name.replace("_", " ").replace("pseudo ", "pseudo-")


def _domains(report: Report) -> Table | None:
    rows = report.get("domains", [])
    if not rows:
        return None
    pseudo = "pseudo_perplexity" in rows[0]
    prefix = "pseudo_" if pseudo else ""
    names = [f"{prefix}bits_per_byte", f"{prefix}perplexity", "documents", "tokens", "bytes"]
    if any(row["unspelt_bytes"] for row in rows):
        names.append("unspelt_bytes")
    headings = list(map(words, names))
    note = (
        "Each token hidden in turn, all others in sight: no likelihood of the text, and no perplexity to compare with "
        "that of a causal model."
        if pseudo
        else "Exact likelihood of each document. Bits per byte compare over tokenizers, perplexity within one."
    )
    if "unspelt_bytes" in names:
        note += " Bytes that no token spells cost nothing here: the numbers are too low by what they would cost."
    body = [[row["domain"], *(number(row[name]) for name in names)] for row in rows]
    return Table("Text by domain", [["domain", *headings], *body], note)


def _harness(report: Report) -> Table | None:
    rows = [
        [one["task"], name, number(value), number(one["measures"].get(f"{name}_stderr")), number(one["examples"])]
        for one in report.get("harness", [])
        for name, value in one["measures"].items()
        if "_stderr" not in name
    ]
    return (
        Table("lm-evaluation-harness", [["task", "measure", "value", "std. error", "examples"], *rows])
        if rows
        else None
    )


def _sets(report: Report) -> list[Table]:
    """Return a table of all sets with the measures that are one number, and one of each label's F1."""
    rows = report.get("sets", [])
    if not rows:
        return []
    names = [name for name, value in rows[0]["measures"].items() if isinstance(value, int | float) or value is None]
    body = [[row["set"], *(number(row["measures"].get(name)) for name in names)] for row in rows]
    note = "" if len(rows) == 1 else "The same model and task on several sets: differences are those of the domains."
    found = [Table(f"Labelled sets ({rows[0]['task']})", [["set", *map(words, names)], *body], note)]
    labels = list(rows[0]["measures"].get("f1") or []) if isinstance(rows[0]["measures"].get("f1"), dict) else []
    if labels:
        each = [[row["set"], *(number(row["measures"]["f1"].get(label)) for label in labels)] for row in rows]
        found.append(Table("F1 of each label", [["set", *labels], *each]))
    return found


def _calibration(report: Report) -> Table | None:
    rows = [
        [
            name,
            *(number(one[key]) for key in ("ece", "max_error", "accuracy", "confidence", "brier", "nats")),
            *(number(one.get("temperature", {}).get(key)) for key in ("value", "ece_before", "ece_after")),
        ]
        for name, one in report.get("calibration", {}).items()
    ]
    heading = ["set", "ECE", "max. error", "accuracy", "mean confidence", "Brier", "nats"]
    heading += ["temperature", "ECE before", "ECE after"]
    note = (
        "ECE: mean distance of confidence from accuracy, over 15 bins (Guo et al. 2017); 0 is perfect. The temperature "
        "is fitted on every other example, and judged on the rest."
    )
    return Table("Calibration", [heading, *rows], note) if rows else None


def _robustness(one: dict[str, Any]) -> Table:
    name = one["measure"]
    body = [
        [row["operator"], number(row[name]), number(row["fall"]), f"{row['changed']:.1%}"] for row in one["operators"]
    ]
    heading = ["fault", name.replace("_", " "), "worse by", "predictions changed"]
    rows = [heading, ["none", number(one["before"]), "-", "-"], *body]
    note = f"Faults in a tenth of the words, or in case and punctuation, drawn from seed {one['seed']}."
    return Table(f"Robustness on {one['set']}", rows, note)


def _bias(one: dict[str, Any]) -> Table:
    is_class = "label" in one["pairs"][0]
    heading = ["group", "words", *(["label"] if is_class else []), "mean difference", "spread", "least", "most"]
    rows = [
        [
            pair["group"],
            " / ".join(pair["words"]),
            *([pair["label"]] if is_class else []),
            f"{pair['mean_difference']:+.3f}",
            number(pair["spread"]),
            *(f"{template} {value:+.2f}" for template, value in _ends(pair["templates"])),
        ]
        for pair in one["pairs"]
    ]
    note = (
        f"Difference: {one['measure']}. Few words and templates, written by hand: a difference is no proof of harm, "
        "and none is no proof of its absence."
    )
    return Table(f"Bias probes ({one['language']})", [heading, *rows], note)


def _ends(templates: dict[str, float]) -> list[tuple[str, float]]:
    """Return the templates at both ends, the one that prefers the second word most, and the first word."""
    ordered = list(templates.items())
    return [ordered[0], ordered[-1]]
