"""The parity table: how far each model was from plain torch in each layout and schedule, over a whole test run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tests.distributed.cases import Case, Result


@dataclass(frozen=True)
class Row:
    """Largest differences of one case; `norm` relative to the norm, `parameter` without key biases."""

    case: Case
    loss: float
    norm: float
    parameter: float


ROWS: list[Row] = []
"""Of this process; `tests.conftest` writes them when the tests are over."""


def record(case: Case, found: Result, expected: Result, parameter: float) -> None:
    """Adds the row of a case."""
    loss = np.abs(np.subtract(found.losses, expected.losses)).max()
    norm = np.abs(np.divide(found.norms, expected.norms) - 1).max()
    ROWS.append(Row(case, float(loss), float(norm), parameter))


def markdown(rows: list[Row]) -> str:
    """The largest of the cases of each model and schedule, then of each model, layout and schedule."""
    short = [((row.case.model, schedule(row.case)), row) for row in rows]
    long = [((row.case.model, layout(row.case), schedule(row.case)), row) for row in rows]
    return table(("model", "schedule"), short) + "\n" + table(("model", "layout", "schedule"), long)


def schedule(case: Case) -> str:
    """The schedule, and the precision and optimizer where they are not fp32 and AdamW."""
    chunks = f", {case.chunks_per_stage} chunks" if case.chunks_per_stage > 1 else ""
    others = [name for name in (case.dtype, case.optimizer) if name not in ("fp32", "adamw")]
    return ", ".join([case.schedule + chunks, *others])


def layout(case: Case) -> str:
    """ZeRO and the axes."""
    sequence = f" x sequence {case.sequence}" if case.sequence > 1 else ""
    parallel = ", sequence parallel" if case.sequence_parallel else ""
    return f"ZeRO-{case.zero_stage}, pipe {case.pipe} x tensor {case.tensor}{sequence} x data {case.data}{parallel}"


def table(names: tuple[str, ...], rows: list[tuple[tuple[str, ...], Row]]) -> str:
    """One line per key, with the number of its cases and the largest of each difference."""
    grouped: dict[tuple[str, ...], list[Row]] = {}
    for key, row in rows:
        grouped.setdefault(key, []).append(row)
    columns = ("loss", "norm", "parameter")
    lines = [f"| {' | '.join((*names, 'cases', *columns))} |", "| --- " * (len(names) + 4) + "|"]
    for key, held in sorted(grouped.items()):
        largest = (max(getattr(row, name) for row in held) for name in columns)
        lines.append(f"| {' | '.join(key)} | {len(held)} | {' | '.join(f'{value:.1e}' for value in largest)} |")
    return "\n".join(lines) + "\n"
