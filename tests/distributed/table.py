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
    """One line per model, layout and schedule: the largest of its cases."""
    grouped: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        case = row.case
        layout = f"ZeRO-{case.zero_stage}, pipe {case.pipe} x tensor {case.tensor} x data {case.data}"
        schedule = case.schedule if case.virtual_stages == 1 else f"{case.schedule}, {case.virtual_stages} chunks"
        grouped.setdefault((case.model, layout, schedule), []).append(row)
    lines = ["| model | layout | schedule | cases | loss | norm | parameter |", "| --- " * 7 + "|"]
    for key, held in sorted(grouped.items()):
        largest = (max(getattr(row, name) for row in held) for name in ("loss", "norm", "parameter"))
        lines.append(f"| {' | '.join(key)} | {len(held)} | {' | '.join(f'{value:.1e}' for value in largest)} |")
    return "\n".join(lines) + "\n"
