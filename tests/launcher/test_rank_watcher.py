"""Watchers of two ranks of this machine that nobody supervises; tests/slurm has the launchers and the nodes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from engine import outcome
from engine.config.rank_environment import RankEnvironment
from engine.heartbeat import Beat
from launcher.diagnosis import Frame, Seen, from_json, to_json
from launcher.ports import free_port
from launcher.rank_watcher import heartbeat_folder
from launcher.variables import LAUNCHER

REPOSITORY = Path(__file__).parents[2]
STEP = 60


def world(folder: Path, fault: dict[str, Any] | None, steps: int) -> list[tuple[int, str]]:
    """Run two stand-ins to their end; return the exit code and the standard error of each."""
    spec = folder / "spec.json"
    limits = {"step_limit_seconds": 4.0, "step_limit_factor": 1.0, "start_limit_seconds": 25.0}
    spec.write_text(json.dumps({"folder": str(folder / "run"), "steps": steps, "launch": limits, "fault": fault}))
    foreign = ("SLURM_", "OMPI_", "PMI", "PALIMPSEST_", "TORCHELASTIC_", "PET_", "OMP_")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    meeting = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.slurm.stand_in", spec],
            env=clean | meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=REPOSITORY,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    # Standard error ends when the watcher has ended, too: it has the other end of the pipe.
    said = [rank.communicate(timeout=200)[1] for rank in ranks]
    return [(rank.returncode, text) for rank, text in zip(ranks, said, strict=True)]


def test_a_stopped_rank_is_named_and_ended_and_so_is_the_one_that_waits(tmp_path: Path) -> None:
    (waiting, _), (stopped, _) = world(tmp_path, {"what": "freeze", "rank": 1, "step": STEP}, 10**6)
    assert (waiting, stopped) == (-9, -9)
    found = outcome.read(tmp_path / "run")
    assert found is not None
    assert (found.code, found.rank, found.step) == (1, 1, STEP)
    assert found.error.startswith("rank 1 hangs: silent for ")
    assert "its process is stopped (SIGSTOP), in strike (tests/slurm/stand_in.py:" in found.error
    assert "rank 0 waits in all_reduce" in found.error


def test_ranks_that_end_by_themselves_are_not_reported(tmp_path: Path) -> None:
    assert [code for code, _ in world(tmp_path, None, 5)] == [0, 0]
    found = outcome.read(tmp_path / "run")
    assert found is not None
    assert (found.code, found.error) == (0, "")


def test_whoever_is_supervised_or_alone_has_no_folder_of_its_own(tmp_path: Path) -> None:
    assert LAUNCHER not in os.environ
    with heartbeat_folder(RankEnvironment(), None) as folder:
        assert folder is None
    with heartbeat_folder(RankEnvironment(world_size=2), tmp_path) as folder:
        assert folder == tmp_path
    assert tmp_path.is_dir(), "the supervisor's"
    with heartbeat_folder(RankEnvironment(world_size=2), None) as folder:
        assert folder is not None
        assert folder.is_dir()
    assert not folder.exists()


def test_a_report_is_read_as_it_was_written() -> None:
    seen = Seen(3, "T", Beat(7, 5, "loss", 1.5), 12.5, (Frame("all_reduce", "engine/x.py", 7),), "")
    assert from_json(to_json(seen)) == seen
    assert from_json(to_json(Seen(3, "S", None, 1.0))) == Seen(3, "S", None, 1.0)
