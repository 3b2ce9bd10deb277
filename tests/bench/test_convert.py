"""The measurement of `convert`, at toy size: each side converts, and figures are those of its process."""

import json

import pytest

from bench import convert


@pytest.mark.matrix  # four processes, each with all its imports
def test_sides_are_measured_and_written(tmp_path):
    convert.main(1, small=True, only=["254"], scratch=tmp_path, output=tmp_path / "out.json")
    [found] = json.loads((tmp_path / "out.json").read_text())["models"].values()
    assert found["num_bytes"] == 4 * found["num_parameters"]
    assert set(found["sides"]) == {"imports", "convert", "in memory", "back"}
    [ours], [theirs] = found["sides"]["convert"], found["sides"]["in memory"]
    assert found["convert_over_in_memory"] == [ours["cpu_seconds"] / theirs["cpu_seconds"]]
    assert all(lap[0]["peak_bytes"] > 10**8 for lap in found["sides"].values()), "torch alone takes more"
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
