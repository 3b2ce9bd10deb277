"""The table of what composes says what the rules say."""

from engine.plan.composition import USES, ZERO_STAGES, composition_table, example, problems_of


def test_cells_are_the_rules_answers() -> None:
    lines = composition_table().splitlines()
    for line, (name, change) in zip(lines[2:], USES.items(), strict=False):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[0] == name
        for cell, stage in zip(cells[1:], ZERO_STAGES.values(), strict=True):
            assert (cell == "yes") == (not problems_of(stage, change))


def test_zero_0_and_bf16_are_apart_and_say_why() -> None:
    table = composition_table()
    assert "| bf16 | no (2) | yes | yes | yes |" in table
    assert "2. parallel.zero_stage = 0 with precision.dtype = bf16" in table
    assert "set parallel.zero_stage=1" in table


def test_every_zero_stage_composes_with_every_axis_in_fp32() -> None:
    for stage in ZERO_STAGES.values():
        assert not problems_of(stage, USES["pipe 2 x tensor 2 x data 2"])


def test_the_example_itself_breaks_no_rule() -> None:
    assert problems_of({}) == []
    assert example().precision.dtype == "fp32"
