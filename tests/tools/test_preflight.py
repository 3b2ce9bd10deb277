"""`palimpsest preflight` on one node, and its table for several."""

import json
import socket
from pathlib import Path

import pytest

from engine.cli import main
from launcher.node_checks import Finding
from launcher.preflight import NodeReport
from tools.preflight import Network, table

SMOKE = str(Path(__file__).parents[2] / "configs/smoke/gpt2.yaml")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_one_node_is_judged_by_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preflight", SMOKE, "--json"]) == 0
    (node,) = json.loads(capsys.readouterr().out)["nodes"]
    assert "disk" in {finding["check"] for finding in node["findings"]}
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_too_large_for_the_node_fails(capsys: pytest.CaptureFixture[str]) -> None:
    """A run of 4 T parameters, of which every node holds a thousandth, keeps 2 checkpoints of 16 TB and more."""
    large = ["model.num_layers=2000", "model.hidden_size=12800", "model.num_heads=128"]
    assert main(["preflight", SMOKE, *large]) == 1
    said = capsys.readouterr().out
    assert "failed   disk" in said
    assert "to do:" in said


def test_too_few_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preflight", "--gpus", "4096"]) == 1
    assert "the ranks of a node use 4096" in capsys.readouterr().out


def test_the_port_at_which_ranks_meet_is_taken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a world of two: rank 0 waits for nobody, since the other one cannot reach it."""
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        own = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        for name, value in (own | {"MASTER_ADDR": socket.gethostname(), "MASTER_PORT": str(port)}).items():
            monkeypatch.setenv(name, value)
        assert main(["preflight"]) == 1
    [line] = [line for line in capsys.readouterr().out.splitlines() if " port " in line]
    assert line.startswith("failed   port ")
    assert f"{port}: Address already in use" in line


def test_the_table_names_the_nodes_that_differ() -> None:
    well, ill = Finding("disk", "ok", "9 GiB free"), Finding("disk", "failed", "1 GiB free", "make room")
    reports = [NodeReport("n1", (well,)), NodeReport("n2", (ill,)), NodeReport("n3", (well,))]
    network = Network({"n1 - n2": 1e9, "n1 - n3": 4e9, "n2 - n3": 4e9}, 3e9)
    lines = table(reports, [Finding("driver", "failed", "535 on n1; 550 on n2, n3")], network).splitlines()
    assert [line.split() for line in lines] == [
        ["failed", "disk", "n2:", "1", "GiB", "free"],
        ["to", "do:", "make", "room"],
        ["ok", "disk", "2", "of", "3", "nodes"],
        ["failed", "driver", "535", "on", "n1;", "550", "on", "n2,", "n3"],
        ["all-reduce", "3.00", "GB/s", "over", "all", "ranks"],
        ["pairs", "of", "nodes", "slowest", "1.00", "(n1", "-", "n2),", "median", "4.00", "GB/s", "per", "direction"],
    ]
