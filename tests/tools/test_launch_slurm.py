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
from launcher.slurm.client import Answer
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
    monkeypatch.setattr(client, "submit", lambda command, script, ask=None: function(command, script, said))
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


def test_slurm_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert launch() == 1
    assert "sbatch is not on PATH" in capfd.readouterr().err
