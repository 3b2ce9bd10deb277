"""Follow-up of a start: when a job is requeued or submits its successor, and when a chain goes on or is cancelled."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from engine import outcome
from engine.errors import EnvironmentProblem
from engine.outcome import Outcome
from launcher.attempts import Ending
from launcher.signals import Signals
from launcher.slurm import client, conductor, follow_up, spec
from launcher.slurm.client import Allocated, Answer
from launcher.slurm.follow_up import conclude, submit_successor
from launcher.slurm.site import Site
from launcher.slurm.spec import JobSpec
from launcher.slurm.starts import JobStart, job_start
from launcher.verdict import Verdict
from tests.launcher.slurm.specs import RESUBMIT, TREE, example

SAVED, DONE, FAILED = Verdict(85, "saved at step 6"), Verdict(0, "done at step 9"), Verdict(1, "failed: bad shard")
# Told to stop, and then: a save that fails, a node that is lost meanwhile, a mistake that a later start has as well.
NOT_SAVED = Verdict(1, "failed at step 6: disk full", stopping=True)
LOST = Verdict(1, "failed: node n2 is lost", lost=frozenset((1,)), stopping=True)
USAGE = Verdict(2, "failed: a key is wrong", stopping=True)
RUNNING = Allocated("RUNNING", 0, "n1")
NO_WORLD = Ending(FAILED, "no world", no_world=True)


class Slurm:
    """Stands for Slurm: keeps what it is asked, and knows one state of the job."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, found: Allocated | None = RUNNING) -> None:
        self.asked: list[str] = []
        monkeypatch.setattr(client, "allocated", lambda number: found)
        for name in ("requeue", "cancel_waiting", "exclude_nodes"):
            monkeypatch.setattr(client, name, self._taken(name))
        monkeypatch.setattr(client, "submit", self._submit)

    def _taken(self, name: str) -> Any:
        def take(number: str, nodes: Sequence[str] = ()) -> str:
            self.asked.append(" ".join((name, number, *nodes)))
            return ""

        return take

    def _submit(self, command: Sequence[str], script: Path, arguments: Sequence[str] = (), ask: Any = None) -> str:
        self.asked.append(" ".join((*command, script.name, *arguments)))
        return "23"


def start_of(index: int, number: str = "17", requeues: int = 0) -> JobStart:
    return JobStart("17", index, number, requeues)


def said(capfd: pytest.CaptureFixture[str]) -> list[str]:
    return capfd.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("ending", "restarts", "cancelled", "found", "requeued", "last"),
    [
        (Ending(DONE, ""), 0, False, RUNNING, False, "done at step 9"),
        (Ending(FAILED, "not restarted"), 0, False, RUNNING, False, "not restarted"),
        (Ending(SAVED, ""), 0, False, RUNNING, True, "requeue 1 of 2"),
        (Ending(SAVED, ""), 2, False, RUNNING, False, "all 2 requeues are used up"),
        (Ending(SAVED, ""), 0, True, RUNNING, False, "cancelled with `palimpsest job cancel`"),
        (Ending(SAVED, ""), 0, False, Allocated("CANCELLED", 0, "n1"), False, "the job is CANCELLED"),
        (Ending(NOT_SAVED, "asked to stop"), 0, False, RUNNING, True, "requeue 1 of 2"),
        (Ending(LOST, "asked to stop"), 0, False, RUNNING, True, "requeue 1 of 2"),
        (Ending(USAGE, "asked to stop"), 0, False, RUNNING, False, "asked to stop"),
        (Ending(NOT_SAVED, "asked to stop"), 0, True, RUNNING, False, "cancelled with `palimpsest job cancel`"),
        (Ending(NOT_SAVED, ""), 0, False, Allocated("CANCELLED", 0, "n1"), False, "the job is CANCELLED"),
        (Ending(NOT_SAVED, ""), 2, False, RUNNING, False, "all 2 requeues are used up"),
        (NO_WORLD, 0, False, RUNNING, True, "requeue 1 of 2, without n2"),
        (NO_WORLD, 2, False, RUNNING, False, "all 2 requeues are used up"),
    ],
)
@pytest.mark.parametrize("way", ["slurm", "resubmit"])
def test_a_job_starts_again_only_where_that_is_due(
    ending: Ending,
    restarts: int,
    cancelled: bool,
    found: Allocated,
    requeued: bool,
    last: str,
    way: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The same limits hold where Slurm requeues the job, and where it submits its successor itself."""
    slurm = Slurm(monkeypatch, found)
    missing = ["n2"] if ending.no_world else []
    start = start_of(restarts, requeues=restarts if way == "slurm" else 0)
    job = example(requeues=2, run_folder=tmp_path, folder=tmp_path, site=Site(source="x", requeue=way))  # type: ignore[arg-type]
    assert conclude(job, start, ending, missing, cancelled, ()) == ending.verdict.code
    without = "".join(f" --exclude={node}" for node in missing)
    asked = (
        " ".join(("requeue", "17", *missing))
        if way == "slurm"
        else (f"sbatch --dependency=afterany:17{without} train.sbatch 17 {restarts + 1}")
    )
    assert slurm.asked == ([asked] if requeued else [])
    lines = said(capfd)
    if requeued and way == "resubmit":
        assert lines.pop() == "palimpsest launch: job 23 goes on"
    assert last in lines[-1]


@pytest.mark.parametrize(
    ("before", "goes_on"), [([NOT_SAVED], False), ([SAVED], True), ([NOT_SAVED, SAVED], True), ([], True)]
)
@pytest.mark.parametrize("links", [None, 5])
def test_a_job_that_fails_to_stop_twice_in_a_row_does_not_start_again(
    before: list[Verdict],
    goes_on: bool,
    links: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    records = [
        {"job": "17", "attempt": number * 1000, "ended": 1.0, "failed_stop": follow_up.failed_stop(verdict)}
        for number, verdict in enumerate([*before, NOT_SAVED])
    ]
    (tmp_path / spec.ATTEMPTS_FILE).write_text("".join(json.dumps(record) + "\n" for record in records))
    slurm = Slurm(monkeypatch, Allocated("RUNNING", len(before), "n1"))
    job = example(requeues=9, chain=links, run_folder=tmp_path, folder=tmp_path)
    conclude(job, start_of(len(before), requeues=len(before)), Ending(NOT_SAVED, ""), [], False, ())
    # The next link of a chain is in the queue already; a job alone is put there.
    asked = {(True, None): ["requeue 17"], (False, None): [], (True, 5): [], (False, 5): ["cancel_waiting 17"]}
    assert slurm.asked == asked[goes_on, links]
    assert ("two starts in a row" in said(capfd)[-1]) == (not goes_on)


def test_a_job_that_slurm_has_requeued_by_itself(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """As after a preemption: nobody requeues it once more."""
    slurm = Slurm(monkeypatch, Allocated("PENDING", 1, ""))
    conclude(example(requeues=2, run_folder=tmp_path), start_of(0), Ending(SAVED, ""), [], False, ())
    assert not slurm.asked
    assert "Slurm has requeued the job by itself" in said(capfd)[-1]


def test_a_site_without_requeues(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    slurm = Slurm(monkeypatch)
    conclude(example(requeues=2, site=Site(source="x", requeue="none")), start_of(0), Ending(SAVED, ""), [], False, ())
    assert not slurm.asked
    assert said(capfd)[-1].endswith("this site requeues no jobs (--chain does without); submit it again to go on")


def test_a_successor_is_the_same_job_s_next_start(tmp_path: Path) -> None:
    """Its script's arguments name the first job, and count on; nothing of this job's own variables reaches it."""
    seen: list[Any] = []
    job = example(site=RESUBMIT, folder=tmp_path, exclude=("n9",))

    def ask(arguments: Sequence[str]) -> Answer:
        seen.append(arguments)
        return Answer(0, "23\n", "")

    assert submit_successor(job, start_of(0), ["n2"], {}, ask) == "23"
    assert submit_successor(job, start_of(0), [], {}, ask) == "", "an agent and the conductor may both ask"
    assert seen == [["sbatch", "--dependency=afterany:17", "--exclude=n9,n2", "--parsable", str(job.script), "17", "1"]]
    second = job_start(job, {"SLURM_JOB_ID": "23"}, ("17", "1"))
    assert second == JobStart("17", 1, "23", 0)
    assert second.first_attempt == 1000
    assert submit_successor(job, second, [], {}, ask) == "23"
    assert seen[-1][-2:] == ["17", "2"]


def test_a_successor_inherits_the_user_s_environment_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passed: dict[str, str] = {}

    def run(arguments: Sequence[str], environment: dict[str, str]) -> Answer:
        passed.update(environment)
        return Answer(0, "23\n", "")

    monkeypatch.setattr(client, "run", run)
    users = {"HF_TOKEN": "x", "SLURM_CONF": "/etc/slurm.conf", "PALIMPSEST_OVERRIDES": "[]"}
    own = {"SLURM_JOB_ID": "17", "SLURM_CPU_BIND": "none", "PALIMPSEST_TOKEN": "t", "RANK": "0"}
    submit_successor(example(site=RESUBMIT, folder=tmp_path), start_of(0), [], users | own)
    assert passed == users


def test_a_successor_that_slurm_refuses_may_be_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    Slurm(monkeypatch)

    def refuse(*arguments: Any, **options: Any) -> str:
        raise EnvironmentProblem("Slurm refuses the job: no submission from compute nodes")

    monkeypatch.setattr(client, "submit", refuse)
    job = example(site=RESUBMIT, requeues=2, run_folder=tmp_path, folder=tmp_path)
    conclude(job, start_of(0), Ending(SAVED, ""), [], False, ())
    assert said(capfd)[-1].endswith("no submission from compute nodes; submit it again to go on")
    assert not list(tmp_path.glob("successor-*"))


@pytest.fixture
def chain(tmp_path: Path) -> JobSpec:
    """A chain of three links over a run of nine steps."""
    (tmp_path / "run.yaml").write_text(json.dumps(TREE))
    return example(chain=3, requeues=0, run_folder=tmp_path, folder=tmp_path, config=tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("ending", "index", "cancelled", "asked", "last"),
    [
        (Ending(SAVED, ""), 0, False, [], "link 1 of 3 is over, the next one goes on"),
        (Ending(SAVED, ""), 2, False, [], "all 3 links of the chain are used up; submit it again to go on"),
        (NO_WORLD, 0, False, ["exclude_nodes 17_[2-3] n2"], "link 1 of 3 is over, the next one goes on, without n2"),
        (Ending(DONE, ""), 0, False, ["cancel_waiting 17"], "the chain ends at link 1 of 3: the run is done"),
        (Ending(DONE, ""), 2, False, [], "the chain ends at link 3 of 3: the run is done"),
        (Ending(FAILED, ""), 1, False, ["cancel_waiting 17"], "the chain ends at link 2 of 3: the run cannot go on"),
        (Ending(NOT_SAVED, ""), 1, False, [], "link 2 of 3 is over, the next one goes on"),
        (Ending(SAVED, ""), 0, True, ["cancel_waiting 17"], "it was cancelled with `palimpsest job cancel`"),
    ],
)
def test_a_chain_goes_on_only_where_the_run_can(
    ending: Ending,
    index: int,
    cancelled: bool,
    asked: list[str],
    last: str,
    chain: JobSpec,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    slurm = Slurm(monkeypatch)
    outcome.write(chain.run_folder, Outcome("17", index * 1000, ending.verdict.code, 9))
    start = start_of(index, f"17_{index + 1}")
    missing = ["n2"] if ending.no_world else []
    assert conclude(chain, start, ending, missing, cancelled, ()) == ending.verdict.code
    assert slurm.asked == asked
    assert last in said(capfd)[-1]


def test_a_stop_file_ends_a_chain(
    chain: JobSpec, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    slurm = Slurm(monkeypatch)
    (chain.run_folder / "stop").touch()
    conclude(chain, start_of(0), Ending(SAVED, ""), [], False, ())
    assert slurm.asked == ["cancel_waiting 17"]
    assert said(capfd)[-1].endswith("/stop is there; remove it and submit the job again")


def test_a_run_stage_that_was_appended_meanwhile_keeps_the_chain_going(
    chain: JobSpec, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The outcome says done, of nine steps: the file has fifteen by now."""
    slurm = Slurm(monkeypatch)
    outcome.write(chain.run_folder, Outcome("17", 0, 0, 9))
    again = {"data": {"train": "/new", "validation": "/validation"}, "duration": {"steps": 6}}
    chain.config.write_text(json.dumps(TREE | {"stages": [*TREE["stages"], TREE["stages"][-1] | again]}))
    conclude(chain, start_of(0), Ending(DONE, ""), [], False, ())
    assert not slurm.asked
    assert said(capfd)[-1].endswith("a run stage was appended; link 1 of 3 is over, the next one goes on")
    # Nor does the next link take the outcome of the stage before for the run's.
    assert not follow_up.nothing_to_do(chain, start_of(1), follow_up.read_run(chain, ()))
    outcome.write(chain.run_folder, Outcome("17", 1000, 0, 15))
    assert follow_up.nothing_to_do(chain, start_of(1), follow_up.read_run(chain, ())) == "the run is done"


@pytest.mark.parametrize(
    ("code", "step", "index", "ended", "why"),
    [
        (0, 9, 1, "", "the run is done"),
        (0, 9, 0, "", ""),  # the first link was asked for: it says itself that there is nothing to do
        (85, 6, 1, "", ""),
        (1, 6, 1, "", ""),  # killed with its node, before anybody could decide
        (1, 6, 1, "the run cannot go on", "the run cannot go on"),
        (None, 0, 1, "", ""),
    ],
)
def test_a_link_that_starts_all_the_same_looks_at_what_was_decided(
    code: int | None, step: int, index: int, ended: str, why: str, chain: JobSpec
) -> None:
    if code is not None:
        outcome.write(chain.run_folder, Outcome("16", 0, code, step))
    if ended:
        (chain.folder / follow_up.ENDED).write_text(f"{ended}\n")
    assert follow_up.nothing_to_do(chain, start_of(index), follow_up.read_run(chain, ())) == why


def test_links_are_starts_of_one_job(chain: JobSpec) -> None:
    """The last link has the number of the array itself."""
    environ = {"SLURM_JOB_ID": "17", "SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "3"}
    third = job_start(chain, environ)
    assert third == JobStart("17", 2, "17_3", 0)
    assert third.first_attempt == 2000
    alone = example()
    assert job_start(alone, {"SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": "2"}) == JobStart("17", 2, "17", 2)
    assert job_start(alone, {"SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": ""}).index == 0


def link(chain: JobSpec, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run the conductor of the first link."""
    (chain.folder / spec.FILE).write_text(spec.to_json(chain))
    for name, value in (("JOB_ID", "18"), ("ARRAY_JOB_ID", "17"), ("ARRAY_TASK_ID", "1"), ("JOB_NUM_NODES", "2")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    return conductor.main([str(chain.folder)])


def test_a_link_that_cannot_start_the_run_ends_the_chain(
    chain: JobSpec, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    slurm = Slurm(monkeypatch)
    chain.config.write_text(json.dumps(TREE | {"seeed": 1}))
    assert link(chain, monkeypatch) == 2
    assert slurm.asked == ["cancel_waiting 17"]
    assert "the chain ends at link 1 of 3: " in capfd.readouterr().out


@pytest.mark.parametrize("error", [conductor.NotOurs("not ours"), client.ControllerAway("away")])
def test_slurm_s_own_trouble_leaves_the_chain_alone(
    error: EnvironmentProblem, chain: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm = Slurm(monkeypatch)

    def conduct(job: JobSpec, this: JobStart, signals: Signals) -> int:
        raise error

    monkeypatch.setattr(conductor, "conduct", conduct)
    assert link(chain, monkeypatch) == 1
    assert not slurm.asked


def test_the_model_of_a_run_that_leaves_it_to_its_source(tmp_path: Path) -> None:
    """The conductor has no torch to open the source of `init_from`: the submission has found the model."""
    tree = {key: value for key, value in TREE.items() if key != "model"} | {"init_from": "/a/folder"}
    (tmp_path / "run.yaml").write_text(json.dumps(tree))
    job = example(config=tmp_path / "run.yaml", model=TREE["model"])
    assert follow_up.read_run(job, ("seed=3",)).model.hidden_size == 16
