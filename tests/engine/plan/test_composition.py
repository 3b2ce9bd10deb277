"""The table of what composes says what the rules say, and the README holds it."""

from pathlib import Path

import pytest

from engine.plan.composition import COLUMNS, MARKERS, ROWS, composition_table, example, problems_of

README = Path(__file__).parents[3] / "README.md"


def test_cells_are_the_rules_answers() -> None:
    lines = composition_table().splitlines()
    for line, (name, row) in zip(lines[2:6], ROWS.items(), strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[0] == f"**{name}**"
        for cell, column in zip(cells[1:], COLUMNS.values(), strict=True):
            assert (cell == "yes") == (not problems_of(row, column))


def test_zero_0_and_bf16_are_apart_and_say_why() -> None:
    table = composition_table()
    assert "no (1)" in table.splitlines()[2]
    assert "1. parallel.zero_stage = 0 with precision.dtype = bf16" in table
    assert "set parallel.zero_stage=1" in table


def test_every_zero_stage_composes_with_every_axis_in_fp32() -> None:
    for row in ROWS.values():
        assert not problems_of(row, COLUMNS["pipe 2 x tensor 2 x data 2"])


def test_the_example_itself_breaks_no_rule() -> None:
    assert problems_of({}) == []
    assert example().precision.dtype == "fp32"


def test_the_readme_holds_the_table() -> None:
    text = README.read_text(encoding="utf-8") if README.exists() else ""
    start, end = MARKERS
    if start not in text:
        pytest.skip("the README has no place for the table")
    assert text.partition(start)[2].partition(end)[0].strip() == composition_table()
