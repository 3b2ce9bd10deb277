"""Each check of a node judges by its figures, names the remedy, and nodes that differ are told apart."""

import resource
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher import node_checks as checks
from launcher.node_checks import GIB, Finding, Gpu, Needs
from launcher.preflight import NodeReport, check_node, compare_nodes

NEEDS = Needs(
    folder=Path("run"), disk_bytes=10 * GIB, ranks=8, gpus=8, host_bytes=100 * GIB, shared_bytes=GIB, num_nodes=2
)


def one(found: Finding | Iterator[Finding]) -> Finding | None:
    return found if isinstance(found, Finding) else next(iter(found), None)


@pytest.fixture
def net(tmp_path: Path) -> Path:
    for name, state in (("lo", "unknown"), ("eth0", "up"), ("ib0", "down")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "operstate").write_text(state + "\n")
    return tmp_path


CASES = [
    ("ok", lambda net: checks.disk(10 * GIB, 10**6, NEEDS)),
    ("failed", lambda net: checks.disk(10 * GIB - 1, 10**6, NEEDS)),
    ("ok", lambda net: checks.memory(100 * GIB, NEEDS)),
    ("failed", lambda net: checks.memory(100 * GIB - 1, NEEDS)),
    ("ok", lambda net: checks.shared_memory(2 * GIB, NEEDS)),
    ("failed", lambda net: checks.shared_memory(GIB, NEEDS)),
    ("warning", lambda net: checks.shared_memory(64 * 2**20, Needs(ranks=8))),
    ("ok", lambda net: checks.gpu_count(8, 8)),
    ("failed", lambda net: checks.gpu_count(7, 8)),
    ("ok", lambda net: checks.gpu_count(0, None)),
    (None, lambda net: checks.gpu_use([Gpu("H100", "1", 0)] * 8)),
    ("warning", lambda net: checks.gpu_use([Gpu("H100", "1", 0), Gpu("H100", "1", 2 * GIB)])),
    ("ok", lambda net: checks.open_files(resource.RLIM_INFINITY)),
    ("warning", lambda net: checks.open_files(1024)),
    (None, lambda net: checks.locked_memory(65536, net / "none")),
    ("warning", lambda net: checks.locked_memory(65536, net)),
    (None, lambda net: checks.locked_memory(resource.RLIM_INFINITY, net)),
    ("ok", lambda net: checks.host_name("10.0.0.7", 2, {})),
    ("failed", lambda net: checks.host_name("127.0.1.1", 2, {})),
    ("failed", lambda net: checks.host_name("", 2, {})),
    ("ok", lambda net: checks.host_name("127.0.1.1", 1, {})),
    ("ok", lambda net: checks.host_name("127.0.1.1", 2, {"GLOO_SOCKET_IFNAME": "eth0"})),
    (None, lambda net: checks.interfaces({}, net)),
    ("ok", lambda net: checks.interfaces({"GLOO_SOCKET_IFNAME": "eth0"}, net)),
    ("failed", lambda net: checks.interfaces({"GLOO_SOCKET_IFNAME": "eth1"}, net)),
    ("failed", lambda net: checks.interfaces({"NCCL_SOCKET_IFNAME": "ib"}, net)),
    ("ok", lambda net: checks.interfaces({"NCCL_SOCKET_IFNAME": "ib,eth"}, net)),
    (None, lambda net: checks.interfaces({"NCCL_SOCKET_IFNAME": "^docker"}, net)),
    ("ok", lambda net: checks.trace(1000, "0", True)),
    ("ok", lambda net: checks.trace(0, "1", True)),
    ("warning", lambda net: checks.trace(1000, "1", True)),
    ("warning", lambda net: checks.trace(0, "0", False)),
    ("ok", lambda net: checks.leftovers({})),
    ("warning", lambda net: checks.leftovers({"run-1": [17, 18]})),
    ("failed", lambda net: checks.build_locks([Path("extensions/op/lock")])),
    ("warning", lambda net: checks.requeue("FirstJobId = 1\nJobRequeue              = 0\n")),
    (None, lambda net: checks.requeue("JobRequeue              = 1\n")),
    (None, lambda net: checks.slingshot({}, net)),
]


@pytest.mark.parametrize(("level", "check"), CASES)
def test_a_check_judges_by_its_figures(level: str | None, check, net: Path) -> None:
    found = one(check(net))
    assert (found.level if found else None) == level
    if found is not None:
        assert bool(found.remedy) == (level != "ok"), "what is wrong has a remedy, what is well needs none"


def test_too_few_inodes_are_told_beside_the_bytes() -> None:
    found = list(checks.disk(10 * GIB, 50, NEEDS))
    assert [finding.level for finding in found] == ["ok", "failed"]


def test_slingshot_needs_a_monitor(net: Path) -> None:
    (net / "hsn0").mkdir()
    assert [found.level for found in checks.slingshot({}, net)] == ["warning"]
    assert not list(checks.slingshot({"FI_MR_CACHE_MONITOR": "userfaultfd"}, net))


def test_a_port_in_use_is_told() -> None:
    with socket.socket() as held:
        held.bind(("", 0))
        held.listen()
        number = held.getsockname()[1]
        assert [found.level for found in checks.port(number)] == ["failed"]
    assert not list(checks.port(number))


def test_this_node_is_checked_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run folder need not exist yet; a folder that cannot be written is a failure and no traceback."""
    report = check_node(Needs(folder=tmp_path / "not" / "yet"), {})
    assert report.level in ("ok", "warning")
    assert report.facts["Python"]
    assert list(tmp_path.iterdir()) == []
    blocked = tmp_path / "file"
    blocked.touch()
    report = check_node(Needs(folder=blocked / "run"), {})
    assert report.level == "failed"
    assert report == NodeReport.from_json(report.as_json() | {"findings": [vars(f) for f in report.findings]})


def test_nodes_that_differ_are_told_apart() -> None:
    facts = {"torch": "2.8.0", "driver": "550"}
    reports = [
        NodeReport("n1", (), facts),
        NodeReport("n2", (), facts),
        NodeReport("n3", (), facts | {"driver": "535"}),
    ]
    now = time.time()
    found = compare_nodes(reports, {"n1": now, "n2": now + 1, "n3": now + 60})
    assert [(finding.check, finding.level) for finding in found] == [("driver", "failed"), ("clocks", "warning")]
    assert found[0].text == "535 on n3; 550 on n1, n2"
    assert found[1].text == "n3 is 60 s ahead of n1"
    assert not compare_nodes(reports[:2], {"n1": now, "n2": now + 1})
