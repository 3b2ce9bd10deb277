"""Sequence parallelism along the tensor axis against one plain torch process; tolerances as in `parity.py`."""

from __future__ import annotations

import pytest

from tests.distributed.cases import Case
from tests.distributed.parity import check


@pytest.mark.parametrize(
    "case",
    [
        Case("t5-dropout", zero_stage=3, pipe=2, tensor=2, sequence_parallel=True),
    ],
    ids=str,
)
def test_layout_equals_plain_torch(case: Case) -> None:
    check(case)
