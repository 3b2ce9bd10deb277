"""Slurm's commands: what is asked, and how answers are read. The answers are those of Slurm 22.05."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from engine.errors import EnvironmentProblem
from launcher.slurm import client
from launcher.slurm.client import Allocated, Answer, ControllerAway


class Said:
    """Commands that were run, answered by the first word."""

    def __init__(self, **answers: Answer) -> None:
        self.answers, self.asked = answers, []

    def __call__(self, arguments: Sequence[str]) -> Answer:
        self.asked.append(list(arguments))
        return self.answers.get(arguments[0], Answer(1, "", f"{arguments[0]}: error"))


def line(*fields: str) -> str:
    return "\x1f".join(fields) + "\n"


RUNNING = line("17", "RUNNING", "gpt", "1:02", "1-00:00:00", "2", "n[1-2]", "None", "palimpsest /runs/a b")
DONE = line("16", "CANCELLED by 0", "gpt", "00:10:02", "1-00:00:00", "2", "n[1-2]", "None", "palimpsest /runs/a b")


@pytest.mark.parametrize("out", ["17\n", "17;cluster\n", "sbatch: a notice of the site\n17\n"])
def test_submit(out: str) -> None:
    said = Said(sbatch=Answer(0, out, ""))
    assert client.submit(("sbatch", "--test"), Path("x.sbatch"), ("3",), said) == "17"
    assert said.asked == [["sbatch", "--test", "--parsable", "x.sbatch", "3"]]


def test_a_job_that_slurm_refuses() -> None:
    said = Said(sbatch=Answer(1, "", "sbatch: error: Batch job submission failed: Invalid account"))
    with pytest.raises(EnvironmentProblem) as caught:
        client.submit(("sbatch",), Path("x.sbatch"), ask=said)
    assert "Invalid account" in caught.value.wrong


def test_jobs_without_accounting() -> None:
    said = Said(squeue=Answer(0, RUNNING, ""), sacct=Answer(1, "", "Slurm accounting storage is disabled"))
    [job] = client.jobs(("17", "16"), ask=said)
    assert (job.id, job.state, job.nodes, job.comment) == ("17", "RUNNING", "n[1-2]", "palimpsest /runs/a b")
    assert not job.is_over


def test_accounting_knows_what_the_controller_has_forgotten() -> None:
    said = Said(squeue=Answer(0, RUNNING, ""), sacct=Answer(0, DONE + RUNNING, ""))
    jobs = client.jobs(("17", "16"), ask=said)
    assert [(job.id, job.is_over) for job in jobs] == [("17", False), ("16", True)]


def test_one_unknown_number_hides_no_other() -> None:
    """squeue fails as a whole where it does not know one of the numbers."""

    def ask(arguments: Sequence[str]) -> Answer:
        if arguments[0] == "squeue" and "--jobs=17" in arguments:
            return Answer(0, RUNNING, "")
        return Answer(1, "", "slurm_load_jobs error: Invalid job id specified")

    assert [job.id for job in client.jobs(("17", "1"), ask=ask)] == ["17"]


def test_a_jobs_own_question() -> None:
    out = "JobId=17 JobName=gpt Restarts=2 JobState=RUNNING Reason=None BatchHost=n1 Comment=palimpsest /r/JobState=x\n"
    assert client.allocated("17", Said(scontrol=Answer(0, out, ""))) == Allocated("RUNNING", 2, "n1")
    forgotten = Said(scontrol=Answer(1, "", "slurm_load_jobs error: Invalid job id specified"))
    assert client.allocated("17", forgotten) is None


def test_a_controller_that_is_away_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client.time, "sleep", lambda seconds: None)
    answers = iter([ControllerAway("away"), ControllerAway("away"), Allocated("RUNNING", 0, "n1")])
    told = []

    def question() -> Allocated | None:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert client.patiently(question, 60.0, told.append) == Allocated("RUNNING", 0, "n1")
    assert told == ["away; asking again for 60 s"], "said once"


def test_a_requeue_leaves_bad_nodes_out() -> None:
    said = Said(scontrol=Answer(0, "", ""))
    assert client.requeue("17", ["n2"], said) == ""
    assert said.asked == [["scontrol", "requeue", "17"], ["scontrol", "update", "JobId=17", "ExcNodeList=n2"]]
    refused = Said(scontrol=Answer(1, "", "Requested operation is presently disabled"))
    assert client.requeue("17", ["n2"], refused) == "Requested operation is presently disabled"
    assert len(refused.asked) == 1


def test_cancel_and_signal() -> None:
    said = Said(scancel=Answer(0, "", ""))
    assert client.cancel("17", said) == client.signal_batch("17", "INT", said) == ""
    assert said.asked == [["scancel", "17"], ["scancel", "--batch", "--signal=INT", "17"]]
