"""Fixtures of the tests on a simulated Slurm cluster, which `make test-slurm` runs and `make test` does not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import Cluster, MakeCluster, missing
from tests.slurm.files import Hardware

LIMIT_SECONDS = 900
"""Seconds after which a test counts as hung: nodes that fail are noticed by real clocks, beside other tests."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # pytest calls it with the items of the whole run
    reason = ""
    for item in items:
        if item.nodeid.startswith("tests/slurm/"):
            if not item.get_closest_marker("timeout"):
                item.add_marker(pytest.mark.timeout(LIMIT_SECONDS))
            if reason := reason or missing():
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def make_cluster(tmp_path: Path) -> Iterator[MakeCluster]:
    """Clusters that end with the test; each has a folder of its own in `tmp_path`."""
    with ExitStack() as stack:
        made: list[Cluster] = []

        def make(num_nodes: int = 4, **clocks: Any) -> Cluster:
            folder = tmp_path / f"shared-{len(made)}"
            folder.mkdir()
            made.append(stack.enter_context(Cluster(folder, Hardware(num_nodes=num_nodes, **clocks))))
            return made[-1]

        yield make


@pytest.fixture
def cluster(make_cluster: MakeCluster) -> Cluster:
    """A cluster of two nodes with short clocks."""
    return make_cluster(2)


@pytest.fixture(scope="module")
def steady_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster of two nodes for the tests of a module that break nothing."""
    with Cluster(tmp_path_factory.mktemp("shared"), Hardware(num_nodes=2)) as cluster:
        yield cluster
