"""`palimpsest launch --launcher slurm` up to the submission: the job's folder, what sbatch is told, and credentials."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from engine import cli
from engine.provenance import code_hash
from launcher.slurm import client, spec, submit
from launcher.slurm.client import Answer, Job
from tests.readme import REPOSITORY

SMOKE = str(REPOSITORY / "configs/smoke/gpt2.yaml")
SECRET = "s3cr3t"
WITH_SECRET = f"tokenizer=s3://user:{SECRET}@bucket/tokenizer"


class Sbatch:
    """Stands for Slurm: takes scripts, and keeps the environment that sbatch would take along."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.environment: dict[str, str] = {}

    def __call__(self, arguments: Sequence[str]) -> Answer:
        self.asked.append(list(arguments))
        self.environment = dict(os.environ)
        return Answer(0, "17\n", "")


@pytest.fixture
def sbatch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Sbatch:
    said = Sbatch()
    function = client.submit
    monkeypatch.setattr(client, "submit", lambda command, script, ask=None: function(command, script, ask=said))
    monkeypatch.setenv("PALIMPSEST_OVERRIDES", "")  # undone with the test
    monkeypatch.chdir(tmp_path)
    return said


def launch(*arguments: str) -> int:
    return cli.main(["launch", SMOKE, "--launcher", "slurm", "--nodes", "2-4", "--gpus-per-node", "2", *arguments])


def test_a_job_is_submitted_from_its_folder(sbatch: Sbatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ("--slurm", "allocation.account=me", "--time", "1:00:00", "--requeues", "3", "--restarts", "2")
    assert launch("seed=3", *options) == 0
    [folder] = submit.job_folders(tmp_path / "runs" / "smoke-gpt2")
    assert sbatch.asked == [["sbatch", "--parsable", str(folder / "train.sbatch")]]
    job = spec.read(folder)
    assert (job.overrides, job.nodes, job.ranks_per_node, job.requeues, job.restarts) == (("seed=3",), "2-4", 2, 3, 2)
    assert "#SBATCH --account=me\n" in (folder / "train.sbatch").read_text()
    assert job.model is not None, "for a conductor whose run file leaves it to the source of init_from"
    assert job.model["hidden_size"] > 0
    assert job.code is not None
    assert job.code == folder.parent / "code" / code_hash()
    assert f"export PYTHONPATH={job.code}" in (folder / "train.sbatch").read_text()
    assert (job.code / "launcher" / "slurm" / "conductor.py").is_file()
    assert "palimpsest job logs 17 --follow" in capfd.readouterr().out


def test_a_dry_run_shows_everything_and_writes_nothing(
    sbatch: Sbatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert launch("--dry-run") == 0
    out = capfd.readouterr().out
    assert "#SBATCH --gpus-per-node=2\n" in out
    assert "valid numbers of nodes: 2, 4; the conductor starts on 4:" in out
    assert "ranks 6 to 7 on NODE4: " in out
    assert list(tmp_path.iterdir()) == []
    assert not sbatch.asked


def test_credentials_reach_the_job_by_its_environment_alone(
    sbatch: Sbatch, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setattr("engine.config.load.expand_keys", lambda tree: None)  # the location is not looked at
    assert launch(WITH_SECRET, "--dry-run") == 0
    assert launch(WITH_SECRET) == 0
    said = capfd.readouterr()
    assert SECRET not in said.out + said.err
    assert SECRET not in json.dumps(sbatch.asked)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]
    assert json.loads(sbatch.environment["PALIMPSEST_OVERRIDES"]) == [WITH_SECRET]
    assert sbatch.environment["WANDB_API_KEY"] == SECRET
    [folder] = submit.job_folders(tmp_path / "runs" / "smoke-gpt2")
    assert spec.read(folder).hides_overrides


def test_a_chain_is_one_array(sbatch: Sbatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch("--chain", "3", "--time", "1:00:00", "launch.requeues=7") == 0
    [folder] = submit.job_folders(tmp_path / "runs" / "smoke-gpt2")
    assert sbatch.asked == [["sbatch", "--parsable", str(folder / "chain.sbatch")]]
    script = (folder / "chain.sbatch").read_text()
    assert "#SBATCH --array=1-3%1\n#SBATCH --no-requeue\n" in script
    assert (spec.read(folder).chain, spec.read(folder).requeues) == (3, 0), "a link is not requeued"
    assert "job 17 (a chain of 3 links, 2-4 nodes of generic) is submitted" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--chain", "0", "--time", "1:00:00"), ("--chain = 0", "1 to 100 links", "limits.max_chain of site generic")),
        (("--chain", "101", "--time", "1:00:00"), ("--chain = 101", "1 to 100 links")),
        (("--chain", "two", "--time", "1:00:00"), ("--chain",)),
        (
            ("--chain", "3", "--time", "1:00:00", "--requeues", "2"),
            ("--requeues = 2 beside --chain = 3", "one of both", "leave out --requeues"),
        ),
        (("--chain", "3"), ("--chain = 3 without --time", "for example --time 24:00:00")),
        (("--chain", "3", "--time", "4"), ("--time = 4 is not longer than the 300 s", "ask for more time")),
        (("--slurm", "requeue=sometimes"), ("requeue = 'sometimes'", "'slurm', 'resubmit' or 'none'")),
        (("--slurm", "limits.max_chain=0"), ("limits.max_chain = 0",)),
    ],
)
def test_mistakes_about_starting_again(
    options: tuple[str, ...], message: tuple[str, ...], sbatch: Sbatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert launch(*options) == 2
    error = capfd.readouterr().err
    assert [words for words in message if words not in error] == []
    assert not sbatch.asked


def test_a_chain_is_slurm_s(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["launch", SMOKE, "--chain", "2"]) == 2
    error = capfd.readouterr().err
    assert "--chain beside --launcher local" in error
    assert "add --launcher slurm, or leave it out" in error


def test_a_run_is_submitted_once(
    sbatch: Sbatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The second job would wait for its nodes, perhaps for days, and then find the run folder in use."""
    states, stamps = iter(["PENDING", "COMPLETED"]), iter("abc")
    monkeypatch.setattr(submit, "stamp", lambda: next(stamps))  # two launches of one process share its number

    def jobs(numbers: Sequence[str]) -> list[Job]:
        assert list(numbers) == ["17"]
        return [Job("17_[1-3%1]", next(states), "gpt", "0:00", "1:00:00", "2", "", "Priority", "palimpsest /r")]

    monkeypatch.setattr(submit.refuse_second, "__defaults__", (jobs,))
    chain = ("--chain", "3", "--time", "1:00:00")
    assert launch(*chain) == 0
    assert launch(*chain) == 1
    error = capfd.readouterr().err
    assert "has a job in the queue already: 17_[1-3%1], PENDING" in error
    assert "palimpsest job cancel 17" in error
    assert len(sbatch.asked) == 1
    assert launch(*chain) == 0, "the first is over"


@pytest.mark.parametrize("command", ["launch", "preflight"])
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ('stages.0.freeze=["layers.99.*"]', "stages.0.freeze: the pattern 'layers.99.*' matches no parameter"),
        ("stages.0.sequence_length=4096", "stages.0.sequence_length = 4096"),
    ],
)
def test_a_run_that_starts_nowhere_does_not_wait_in_the_queue(
    command: str, override: str, message: str, sbatch: Sbatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The reason is the run's own, so the number of nodes is not blamed."""
    assert cli.main([command, SMOKE, override, "--launcher", "slurm", "--nodes", "2", "--gpus-per-node", "2"]) == 2
    error = capfd.readouterr().err
    assert f"this run cannot start on any number of nodes: {message}" in error
    assert "--nodes" not in error
    assert not sbatch.asked


@pytest.mark.parametrize("command", ["launch", "preflight"])
def test_a_folder_that_cannot_be_written(
    command: str, sbatch: Sbatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    options = ("--launcher", "slurm", "--nodes", "2", "--gpus-per-node", "2", f"folder={tmp_path}/file/run")
    assert cli.main([command, SMOKE, *options]) == 1
    error = capfd.readouterr().err
    assert f"{tmp_path}/file/run" in error
    assert "Not a directory" in error
    assert not sbatch.asked


def test_a_preflight_is_a_job(sbatch: Sbatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ("--launcher", "slurm", "--nodes", "2", "--gpus-per-node", "2", "--slurm", "allocation.partition=gpu")
    assert cli.main(["preflight", SMOKE, "seed=3", *options, "--dry-run"]) == 0
    shown = capfd.readouterr().out
    assert "#SBATCH --partition=gpu\n" in shown
    assert f"preflight --gpus 2 {SMOKE} seed=3\n" in shown
    assert not list(tmp_path.iterdir())
    assert cli.main(["preflight", SMOKE, "seed=3", *options]) == 0
    [script] = tmp_path.glob("runs/smoke-gpt2/preflight/*/preflight.sbatch")
    assert sbatch.asked == [["sbatch", "--parsable", str(script)]]
    assert f"cat {script.parent}/preflight-17.log" in capfd.readouterr().out
    assert not submit.job_folders(tmp_path / "runs" / "smoke-gpt2"), "no job of the run"
    assert cli.main(["preflight", *options, "--gpus", "0", "--json"]) == 0
    [script] = tmp_path.glob("preflight/*/preflight.sbatch")
    assert script.read_text().endswith("-m engine.cli preflight --gpus 0 --json\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--nodes", "2"), "--nodes beside a check of this node"),
        (("--dry-run",), "--dry-run beside a check of this node"),
        (("--launcher", "torchrun"), "--launcher = 'torchrun'"),
        (("--launcher", "slurm", "--nodes", "0"), "--nodes = '0'"),
        (("--launcher", "slurm", "--nodes", "3", SMOKE), "--nodes = 3 with 1 ranks each make no world"),
        (("--launcher", "slurm", SMOKE, WITH_SECRET), "an override of this preflight holds a credential"),
        (("--launcher", "slurm", "--slurm", "limits.max_time=0:05:00"), "--time = 0:10:00, but site generic takes"),
    ],
)
def test_mistakes_about_preflight(
    options: tuple[str, ...],
    message: str,
    sbatch: Sbatch,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("engine.config.load.expand_keys", lambda tree: None)  # the location is not looked at
    assert cli.main(["preflight", *options]) == 2
    assert message in capfd.readouterr().err
    assert not sbatch.asked


def test_slurm_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert launch() == 1
    assert "sbatch is not on PATH" in capfd.readouterr().err
