"""`palimpsest job` over a Slurm whose answers are given: which job is meant, what is shown, what is cancelled."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from engine import cli, outcome
from engine.outcome import Outcome
from launcher.slurm import client
from launcher.slurm.client import Answer


def line(number: str, state: str, run: Path, reason: str = "None", nodes: str = "n[1-2]") -> str:
    return "\x1f".join((number, state, "gpt", "1:02", "1-00:00:00", "2", nodes, reason, f"palimpsest {run}")) + "\n"


class Slurm:
    """Answers of squeue, and none of sacct."""

    def __init__(self) -> None:
        self.jobs: dict[str, str] = {}
        self.asked: list[list[str]] = []

    def __call__(self, arguments: Sequence[str]) -> Answer:
        self.asked.append(list(arguments))
        if arguments[0] == "squeue":
            wanted = next((word[7:].split(",") for word in arguments if word.startswith("--jobs=")), list(self.jobs))
            if not wanted or not set(wanted) <= set(self.jobs):
                return Answer(1, "", "slurm_load_jobs error: Invalid job id specified")
            return Answer(0, "".join(self.jobs[number] for number in wanted), "")
        return Answer(0, "", "") if arguments[0] == "scancel" else Answer(1, "", "accounting storage is disabled")


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> Slurm:
    said = Slurm()
    for name in ("jobs", "signal_batch", "cancel", "cancel_waiting"):
        function = getattr(client, name)
        monkeypatch.setattr(client, name, lambda *a, function=function, **k: function(*a, **k, ask=said))
    return said


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose job 17 has made two attempts of two ranks on two nodes."""
    run = tmp_path / "run"
    job = run / "jobs" / "20260101-000000-1"
    (job / "logs").mkdir(parents=True)
    (job / "number").write_text("17\n")
    began = {"nodes": ["n1", "n2"], "ranks_per_node": 1, "layout": "data 2"}
    records = [
        began | {"attempt": 0, "began": 100.0},
        {"attempt": 0, "ended": 160.0, "code": 1, "words": "failed: node n2 is lost", "step": 4},
        began | {"attempt": 1, "began": 170.0, "nodes": ["n1", "n3"]},
    ]
    (job / "attempts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + '{"attempt": 1, "en')
    for rank in range(2):
        for attempt in range(2):
            (job / "logs" / f"rank-{rank}.{attempt}.log").write_text(f"first\nrank {rank} in attempt {attempt}\n")
    return run


def call(*arguments: str) -> int:
    return cli.main(["job", *arguments])


def test_status_by_number_and_by_run(slurm: Slurm, run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    slurm.jobs["17"] = line("17", "RUNNING", run)
    assert call("status", "17") == 0
    by_number = capfd.readouterr().out
    assert call("status", str(run)) == 0
    lines = capfd.readouterr().out.splitlines()
    assert by_number.splitlines()[:2] == lines[:2]
    assert lines[0] == "job 17 (gpt): RUNNING for 1:02 of 1-00:00:00, 2 nodes on n[1-2]"
    assert lines[1] == "  attempt 0: 2 ranks (data 2) on n1, n2, 60 s: failed: node n2 is lost"
    assert lines[2].startswith("  attempt 1: 2 ranks (data 2) on n1, n3, ")
    assert lines[2].endswith(": runs")


@pytest.fixture
def chain(slurm: Slurm, run: Path) -> Slurm:
    """Slurm with a chain of four: squeue names its links when it is asked for the array, or for a link's own number."""
    links = {
        "17_1": line("17_1", "COMPLETED", run),
        "17_2": line("17_2", "RUNNING", run),
        "17_[3-4%1]": line("17_[3-4%1]", "PENDING", run, reason="JobArrayTaskLimit", nodes=""),
    }
    slurm.jobs = {"17": "".join(links.values()), "19": links["17_2"]}
    return slurm


def test_links_that_slurm_lists_apart_are_shown_together(chain: Slurm, run: Path, capfd) -> None:
    """As after `scontrol update` of those that wait."""
    states = ("COMPLETED", "RUNNING", "PENDING", "PENDING", "PENDING")
    lines = [line(f"17_{number}", state, run) for number, state in enumerate(states, start=1)]
    chain.jobs["17"] = "".join([*lines, line("17_[6-8%1]", "PENDING", run)])
    assert call("status", "17") == 0
    assert "links of the chain: 1 COMPLETED, 2 RUNNING, 3-8 PENDING" in capfd.readouterr().out


@pytest.mark.parametrize("name", ["17", "17_2", "17_4", "19", "run"])
def test_status_of_a_chain(chain: Slurm, run: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert call("status", str(run) if name == "run" else name) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == "job 17_2 (gpt): RUNNING for 1:02 of 1-00:00:00, 2 nodes on n[1-2]"
    assert lines[1] == "  links of the chain: 1 COMPLETED, 2 RUNNING, 3-4 PENDING"
    assert lines[2].startswith("  attempt 0: 2 ranks")


def test_a_chain_is_cancelled_as_a_whole(chain: Slurm, capfd: pytest.CaptureFixture[str]) -> None:
    """Links that wait first, so that none starts while the one that runs saves."""
    assert call("cancel", "17") == 0
    assert [words for words in chain.asked if words[0] == "scancel"] == [
        ["scancel", "--state=PENDING", "17"],
        ["scancel", "--batch", "--signal=INT", "17_2"],
    ]
    assert capfd.readouterr().out.startswith("job 17 saves and stops")
    chain.asked.clear()
    assert call("cancel", "17_2", "--now") == 0
    assert [words for words in chain.asked if words[0] == "scancel"] == [["scancel", "17"]]


def test_a_chain_in_the_list(chain: Slurm, run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A line for the link that runs, and one for those that wait."""
    del chain.jobs["19"]
    assert call("list") == 0
    head, *rows = capfd.readouterr().out.splitlines()
    assert head.split() == ["job", "state", "time", "limit", "nodes", "run"]
    assert [row.split()[:2] for row in rows] == [["17_2", "RUNNING"], ["17_[3-4%1]", "PENDING"]]
    assert all(row.endswith(str(run)) for row in rows)


def test_a_chain_that_was_cancelled(chain: Slurm, run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """squeue shows the links that never ran under the number of the array."""
    chain.jobs["17"] = line("17", "CANCELLED", run) + line("17_2", "FAILED", run) + line("17_1", "COMPLETED", run)
    assert call("status", "17") == 0
    assert "links of the chain: 1 COMPLETED, 2 FAILED, the rest CANCELLED" in capfd.readouterr().out
    assert call("cancel", "17") == 0
    assert "there is nothing to cancel" in capfd.readouterr().out


def test_a_job_that_has_submitted_its_successor(slurm: Slurm, run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    [folder] = (run / "jobs").iterdir()
    (folder / "number").write_text("17\n23\n")
    slurm.jobs = {"17": line("17", "FAILED", run), "23": line("23", "PENDING", run, reason="Dependency", nodes="")}
    for name in ("17", "23", str(run)):
        assert call("status", name) == 0
        assert capfd.readouterr().out.startswith("job 23 (gpt): PENDING for ")


def test_a_job_that_slurm_has_forgotten_is_known_by_its_run(
    slurm: Slurm, run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert call("status", "17") == 1
    assert "name the run's folder instead" in capfd.readouterr().err
    assert call("status", str(run)) == 0
    out = capfd.readouterr().out
    assert out.startswith("job 17: Slurm does not know it any more")
    assert out.splitlines()[2].endswith(": ended without a word")


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("Priority", "behind jobs of higher priority"),
        ("(BeginTime)", "was requeued"),
        ("New", "it waits: New"),
    ],
)
def test_a_job_that_waits_says_for_what(
    reason: str, words: str, slurm: Slurm, run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    slurm.jobs["17"] = line("17", "PENDING", run, reason, "")
    assert call("status", "17") == 0
    assert words in capfd.readouterr().out.splitlines()[1]


def test_logs_by_node_with_the_first_error_on_top(slurm: Slurm, run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    slurm.jobs["17"] = line("17", "RUNNING", run)
    outcome.write(run, Outcome("17", 1, 1, 4, 1, "bad shard\n  to do: prepare it again"))
    assert call("logs", "17", "--lines", "1") == 0
    assert capfd.readouterr().out.splitlines() == [
        "== first error of attempt 1, rank 1 on n3",
        "bad shard",
        "  to do: prepare it again",
        "",
        f"== rank 0 on n1 ({run}/jobs/20260101-000000-1/logs/rank-0.1.log)",
        "rank 0 in attempt 1",
        f"== rank 1 on n3 ({run}/jobs/20260101-000000-1/logs/rank-1.1.log)",
        "rank 1 in attempt 1",
    ]
    assert call("logs", str(run), "--node", "n2", "--attempt", "0", "--lines", "1") == 0
    out = capfd.readouterr().out
    assert "rank 1 in attempt 0" in out
    assert "rank 0 in attempt 0" not in out


def test_the_first_error_without_an_outcome_is_of_the_log_that_ended_first(
    slurm: Slurm, run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for rank, seconds in ((0, 200), (1, 100)):
        path = run / "jobs" / "20260101-000000-1" / "logs" / f"rank-{rank}.0.log"
        path.write_text(f"step 4\nTraceback (most recent call last):\n  of rank {rank}\n")
        os.utime(path, (seconds, seconds))
    assert call("logs", str(run), "--attempt", "0") == 0
    top = capfd.readouterr().out.splitlines()[:3]
    assert top == ["== first error of attempt 0, rank 1 on n2", "Traceback (most recent call last):", "  of rank 1"]


def test_following_shows_every_attempt_until_the_job_is_over(
    slurm: Slurm, run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    slurm.jobs["17"] = line("17", "COMPLETED", run)
    assert call("logs", "17", "--follow") == 0
    assert capfd.readouterr().out.splitlines() == [
        "== attempt 0",
        "[rank 0 n1] first",
        "[rank 0 n1] rank 0 in attempt 0",
        "== attempt 1",
        "[rank 0 n1] first",
        "[rank 0 n1] rank 0 in attempt 1",
    ]


def test_cancel_saves_first(slurm: Slurm, run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    slurm.jobs["17"] = line("17", "RUNNING", run)
    assert call("cancel", "17") == 0
    assert "saves and stops" in capfd.readouterr().out
    assert slurm.asked[-1] == ["scancel", "--batch", "--signal=INT", "17"]
    assert call("cancel", str(run), "--now") == 0
    assert slurm.asked[-1] == ["scancel", "17"]


def test_a_job_that_waits_is_removed_and_one_that_is_over_is_left(
    slurm: Slurm, run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    slurm.jobs["17"] = line("17", "PENDING", run, "Priority", "")
    assert call("cancel", "17") == 0
    assert slurm.asked[-1] == ["scancel", "17"]
    slurm.jobs["17"] = line("17", "FAILED", run)
    assert call("cancel", "17") == 0
    assert "nothing to cancel" in capfd.readouterr().out
    assert slurm.asked[-1][0] == "sacct" or slurm.asked[-1][0] == "squeue"


def test_list_shows_jobs_of_ours_alone(slurm: Slurm, run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    slurm.jobs = {
        "15": line("15", "COMPLETED", run),
        "16": line("16", "RUNNING", run).replace("palimpsest ", "mine "),
        "17": line("17", "RUNNING", run),
    }
    assert call("list") == 0
    assert [row.split()[0] for row in capfd.readouterr().out.splitlines()] == ["job", "17"]
    assert call("list", "--all") == 0
    assert [row.split()[0] for row in capfd.readouterr().out.splitlines()] == ["job", "15", "17"]
    slurm.jobs = {}
    assert call("list") == 0
    assert "no jobs wait or run" in capfd.readouterr().out


def test_a_folder_without_jobs(slurm: Slurm, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert call("status", str(tmp_path)) == 1
    assert "palimpsest job list" in capfd.readouterr().err
