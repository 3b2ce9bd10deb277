"""Slurm's short forms."""

import pytest

from engine.errors import EnvironmentProblem
from launcher.hosts import expand_counts, expand_hosts


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("node1", ["node1"]),
        ("a,b", ["a", "b"]),
        ("node[1-3]", ["node1", "node2", "node3"]),
        ("node[08-11]", ["node08", "node09", "node10", "node11"]),
        ("node[1,3-4],gpu9", ["node1", "node3", "node4", "gpu9"]),
        ("r[1-2]n[1-2]", ["r1n1", "r1n2", "r2n1", "r2n2"]),
        ("node[1-2].cluster.org", ["node1.cluster.org", "node2.cluster.org"]),
        ("login-0,c[001,010]", ["login-0", "c001", "c010"]),
    ],
)
def test_hosts(text: str, hosts: list[str]) -> None:
    assert expand_hosts(text) == hosts


@pytest.mark.parametrize("text", ["", "node[1-", "node[a-b]", "node]1[", "node[]"])
def test_what_is_no_host_list(text: str) -> None:
    with pytest.raises(EnvironmentProblem, match="cannot be read") as caught:
        expand_hosts(text)
    assert caught.value.remedy == "set MASTER_ADDR to the first host"


@pytest.mark.parametrize(("text", "counts"), [("4", [4]), ("2(x3)", [2, 2, 2]), ("2(x2),1,3(x1)", [2, 2, 1, 3])])
def test_counts(text: str, counts: list[int]) -> None:
    assert expand_counts(text) == counts


@pytest.mark.parametrize("text", ["", "x", "2(3)", "2(x3"])
def test_what_is_no_list_of_counts(text: str) -> None:
    with pytest.raises(EnvironmentProblem, match="tasks per node"):
        expand_counts(text)
