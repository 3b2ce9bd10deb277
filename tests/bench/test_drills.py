"""The table of faults in docs/cluster.md is that of the newest result, which says what it was measured on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.drills.faults import DRILLS
from bench.drills.page import PAGE, bars, newest, replaced, table


def drill(name: str, noticed: list[float], first: list[float], bar: float | None = None) -> dict[str, Any]:
    figures = {"noticed_seconds": noticed, "first_step_seconds": first, "load": [1.0] * len(noticed)}
    return {"name": name, "fault": f"{name}.", "follows": "restart", "bar_seconds": bar} | figures


RESULT = {
    "machine": {"cores": 2, "processor": "some", "versions": {"torch": "2.13"}},
    "slurm": "22.05.8",
    "rounds": 3,
    "drills": [
        drill("power loss", [9.6, 8.0, 8.4], [29.0, 31.0, 29.9], 30.0),
        drill("frozen rank", [10.0], [30.0], 30.0),
        drill("scancel", [4.4], []),
    ],
}


def test_the_table_has_medians_and_ranges() -> None:
    assert table(RESULT).splitlines()[2:] == [
        "| power loss. | restart | 8 (8 to 10) | 30 (29 to 31) |",
        "| frozen rank. | restart | 10 | 30 |",
        "| scancel. | restart | 4 |  |",
    ]


def test_bars_are_for_what_is_below_them() -> None:
    assert bars(RESULT) == [
        "met     power loss: 29.9 s to the first step (bar: below 30 s)",
        "NOT met frozen rank: 30.0 s to the first step (bar: below 30 s)",
    ]


def test_a_result_replaces_the_one_before_it() -> None:
    page = PAGE.read_text(encoding="utf-8")
    once = replaced(page, RESULT, "cpu-drills-DATE.json")
    assert table(RESULT) in once
    assert "Slurm 22.05.8, torch 2.13, 3 rounds, load 1 to 1 ([cpu-drills-DATE.json](" in once
    assert replaced(once, RESULT, "cpu-drills-DATE.json") == once
    assert replaced(once, *newest()) == page, "the rest of the page stays"


def test_the_page_shows_the_newest_result() -> None:
    found, name = newest()
    page = PAGE.read_text(encoding="utf-8")
    assert replaced(page, found, name) == page
    assert [one["name"] for one in found["drills"]] == [one.name for one in DRILLS], "all of them, in order"
    if name:
        assert {"processor", "cores", "load_average", "versions", "commit"} <= found["machine"].keys()


def test_before_the_first_result_the_table_has_no_seconds(tmp_path: Path) -> None:
    found, name = newest(tmp_path)
    assert name == ""
    assert "| named; restart inside of the job |  |  |" in table(found)
    assert "none are there yet" in replaced(PAGE.read_text(encoding="utf-8"), found, name)
