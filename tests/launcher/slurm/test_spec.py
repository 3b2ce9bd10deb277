"""The specification of a job: ranges, times, what a site refuses, and its way through a file."""

from pathlib import Path
from typing import Any

import pytest

from engine.errors import ConfigError, EnvironmentProblem
from launcher.slurm import spec
from launcher.slurm.site import Site
from tests.launcher.slurm.specs import EVERYTHING, example
from tests.readme import REPOSITORY


def test_it_comes_back_from_its_file(tmp_path: Path) -> None:
    job = example("everything", EVERYTHING, exclude=("n7",), overrides=("seed=1",))
    (tmp_path / spec.FILE).write_text(spec.to_json(job))
    assert spec.read(tmp_path) == job


def test_a_folder_without_one(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match="submit the job again"):
        spec.read(tmp_path)


@pytest.mark.parametrize(("text", "nodes"), [("4", (4, 4)), ("2-4", (2, 4))])
def test_ranges_of_nodes(text: str, nodes: tuple[int, int]) -> None:
    assert spec.parse_nodes(text) == nodes
    assert example(min_nodes=nodes[0], max_nodes=nodes[1]).nodes == text


@pytest.mark.parametrize("text", ["0", "4-2", "two", "2-", ""])
def test_no_ranges(text: str) -> None:
    with pytest.raises(ConfigError, match="a range such as 2-4"):
        spec.parse_nodes(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("5:30", 330), ("24:00:00", 86400), ("1-0", 86400), ("1-2:30", 95400), ("1-00:00:01", 86401)],
)
def test_times_as_slurm_reads_them(text: str, seconds: int) -> None:
    assert spec.seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["a day", "1:2:3:4", "", "-5"])
def test_no_times(text: str) -> None:
    with pytest.raises(ConfigError, match="--time 24:00:00"):
        spec.seconds_of(text)


LIMITED = Site.model_validate({"source": "x", "limits": {"max_nodes": 3, "max_time": "12:00:00"}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "--nodes = 2-4, but site x takes 3 nodes at most"),
        ({"max_nodes": 3}, "--time = 24:00:00, but site x takes 12:00:00 at most"),
        ({"max_nodes": 3, "time": "5"}, "is not longer than the 300 s before its end"),
        ({"max_nodes": 3, "time": "1:00:00", "gpus_per_node": 16}, "nodes of site x have 8"),
        ({"max_nodes": 3, "time": None, "gpus_per_node": 4}, "each node has 4 GPUs of the job"),
    ],
)
def test_what_a_site_would_refuse(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        spec.check(example("x", LIMITED, **changes))
    assert message in str(caught.value)


def test_names_in_the_queue() -> None:
    assert spec.job_name("gpt 2 / $(rm)") == "gpt-2-rm"
    assert spec.job_name("\u00fc") == "run"


def test_excluded_nodes_of_profile_and_file(tmp_path: Path) -> None:
    path = tmp_path / "bad"
    allocation = {"exclude": ["n1"], "exclude_file": str(path)}
    profile = Site.model_validate_json(Site.model_validate({"source": "x", "allocation": allocation}).model_dump_json())
    assert spec.excluded(profile, tmp_path) == ("n1",), "the files need not be there"
    path.write_text("n3   # slow\n\n# all of rack 2\nn1\n")
    assert spec.excluded(profile, tmp_path) == ("n1", "n3")
    (tmp_path / spec.SLOW_NODES).write_text("n5  # 2.1 times slower at step 500\n")
    assert spec.excluded(profile, tmp_path) == ("n1", "n3", "n5")


def test_the_run_writes_the_list_that_is_read() -> None:
    source = (REPOSITORY / "engine/train/node_speed.py").read_text(encoding="utf-8")
    assert f'FILE = "{spec.SLOW_NODES}"' in source, "the launcher may not import what imports torch"
