"""A report as one HTML page that stands alone: tables, pictures and explanations, no script and no address in it."""

from __future__ import annotations

from html import escape
from typing import Any

from engine.data.visible import visible
from engine.evaluate.comparison import comparison
from engine.evaluate.pictures import pictures
from engine.evaluate.tables import Report, Table, number, tables

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Noto Sans", "Noto Sans CJK SC", sans-serif; color: #1d2733;
  background: #f6f7f9; max-width: 1000px; margin: 0 auto; padding: 24px; }
h1 { font-size: 26px; margin: 0 0 4px; overflow-wrap: anywhere; } section + h1 { margin-top: 40px; }
h2 { font-size: 18px; margin: 0 0 8px; }
section { background: white; border: 1px solid #dde2e8; border-radius: 8px; padding: 16px 20px; margin: 16px 0; }
.facts, .note { color: #5a6675; } .note { font-size: 13px; margin: 8px 0 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 14px 4px 0; text-align: left; border-bottom: 1px solid #eceff3; vertical-align: top; }
th { color: #5a6675; font-weight: 600; white-space: nowrap; } .number { text-align: right; }
.pictures { display: flex; flex-wrap: wrap; gap: 16px; } .pictures figure { margin: 0; flex: 1 1 420px; min-width: 0; }
figcaption { font-weight: 600; font-size: 14px; } svg { width: 100%; height: auto; max-width: 620px; }
.text { font-size: 17px; line-height: 2; margin: 4px 0 12px; overflow-wrap: anywhere; }
.text span { border-radius: 3px; padding: 2px 0; } .special { color: #98a2ae; font-size: 12px; }
"""


def page(report: Report) -> str:
    """Return the page of a report, of one model or of several."""
    models = report.get("models", [report])
    title = visible(f"Evaluation of {', '.join(str(one.get('label', one['model'])) for one in models)}")
    body = [f"<h1>{escape(title)}</h1>"]
    if len(models) == 1:
        body += _model(report)
    else:
        body.append(_section(comparison(report)))
        for one in models:
            body += [f"<h1>{escape(visible(one['label']))}</h1>", *_model(one)]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>\n'
        f"<body>{''.join(body)}</body></html>\n"
    )


def _model(report: Report) -> list[str]:
    """Return the parts of one model."""
    parts = [f'<p class="facts">{escape(visible(_facts(report)))}</p>', *map(_section, tables(report))]
    if drawn := pictures(report):
        figures = "".join(
            f"<figure><figcaption>{escape(visible(one.title))}</figcaption>{one.svg}</figure>" for one in drawn
        )
        parts.append(f'<section><h2>Pictures</h2><div class="pictures">{figures}</div></section>')
    if report.get("explanations"):
        parts.append(_explanations(report["explanations"]))
    return parts


def _facts(report: Report) -> str:
    limit = "all examples" if report["limit"] is None else f"at most {report['limit']:,} documents or examples of each"
    return (
        f"{report['origin']} · {report['class']}, {report['parameters']:,} parameters · {limit} · "
        f"palimpsest {report['palimpsest']}"
    )


def _section(table: Table) -> str:
    # numbers to the right, words to the left
    is_number = [all(map(_is_number, column[1:])) for column in zip(*table.rows, strict=True)]
    heading, *rows = table.rows
    head = "".join(_cell("th", cell, right) for cell, right in zip(heading, is_number, strict=True))
    body = "".join(
        f"<tr>{''.join(_cell('td', cell, right) for cell, right in zip(row, is_number, strict=True))}</tr>"
        for row in rows
    )
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    return (
        f'<section><h2>{escape(visible(table.title))}</h2><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>{note}</section>"
    )


def _is_number(text: str) -> bool:
    return text == "-" or text.lstrip("+-").replace(",", "").replace(".", "").removesuffix("%").isdecimal()


def _cell(tag: str, text: str, right: bool) -> str:
    return f"<{tag}{' class=number' if right else ''}>{escape(visible(text))}</{tag}>"


def _explanations(rows: list[dict[str, Any]]) -> str:
    shown = "".join(map(_explanation, rows))
    note = (
        "Integrated gradients (Sundararajan et al. 2017): blue parts of the text speak for the label, red ones against "
        "it. All parts together, special tokens included, sum to the difference of the label's logit from that of a "
        "text of padding; a sum beyond the tolerance is marked."
    )
    return f'<section><h2>Explanations</h2>{shown}<p class="note">{note}</p></section>'


def _explanation(row: dict[str, Any]) -> str:
    largest = max((abs(value) for _, value in row["pieces"]), default=0.0) or 1.0
    place = f" of <b>{escape(visible(row['place']))}</b>" if row["place"] else ""
    share = "" if row["probability"] is None else f" ({row['probability']:.1%})"
    whole = "" if row["complete"] else " (not complete)"
    told = (
        f"{escape(visible(row['label']))}{share}{place} · sum {number(row['sum'])}, difference "
        f"{number(row['difference'])}{whole}"
    )
    spans = "".join(_piece(piece, value / largest, value) for piece, value in row["pieces"])
    return f'<p class="facts">{told}</p><p class="text">{spans}</p>'


def _piece(piece: str, share: float, value: float) -> str:
    color = "59,110,165" if share >= 0 else "181,72,47"
    special = ' class="special"' if piece.startswith("[") and piece.endswith("]") and len(piece) > 2 else ""
    return (
        f'<span{special} style="background:rgba({color},{0.75 * abs(share):.2f})" title="{value:+.4f}">'
        f"{escape(visible(piece))}</span>"
    )
