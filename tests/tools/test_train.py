"""`palimpsest train` before torch is imported: what each rank answers to mistakes, in a process of its own."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import tools.train
from engine import outcome
from engine.config.rank_environment import RankEnvironment
from engine.errors import EXIT_DONE, EXIT_FAILURE, EXIT_REQUEUE, EnvironmentProblem
from engine.outcome import Outcome
from launcher.environment import rank_environment
from tests.tools.folder_in_use import contents, held

REPOSITORY = Path(__file__).parents[2]
SMOKE = str(REPOSITORY / "configs/smoke/gpt2.yaml")
pytestmark = pytest.mark.usefixtures("bare_node")


def train(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    script = (
        "import sys\nfrom engine.cli import main\ncode = main(['train', *sys.argv[1:]])\n"
        "assert 'torch' not in sys.modules\nsys.exit(code)"
    )
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=os.environ | environment | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )


def test_a_typo() -> None:
    done = train(SMOKE, "model.num_layer=3")
    assert done.returncode == 2
    assert "did you mean num_layers?" in done.stderr


def test_rank_0_tells_the_story_and_the_others_one_line(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    world = {"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "4321"}
    for rank in "210":
        done = train(SMOKE, "folder=run", RANK=rank, LOCAL_RANK=rank, **world)
        assert done.returncode == 2
        line = "this run cannot start on 3 ranks: stages.0.global_batch_size = 8 is no multiple of"
        if rank == "0":
            assert done.stderr.startswith(f"palimpsest train: {line}")
            assert "allowed: a multiple of 3" in done.stderr
        else:
            assert done.stderr.startswith(f"palimpsest train [rank {rank}]: {line}")
            assert len(done.stderr.splitlines()) == 1
    said = outcome.read(tmp_path / "run")
    assert said is not None
    assert (said.code, said.rank) == (2, 0), "rank 0 cleared what was there before it started"


def test_under_a_supervisor_the_first_to_fail_keeps_the_outcome(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    outcome.write(tmp_path / "run", Outcome("job", 0, 1, 5, rank=1, error="first"))
    done = train(SMOKE, "folder=run", "parallel.pipe=2", PALIMPSEST_LAUNCHER="local")
    assert done.returncode == 2
    said = outcome.read(tmp_path / "run")
    assert said is not None
    assert said.error == "first"


def test_overrides_that_launch_hides_are_read() -> None:
    hidden = json.dumps(["model.num_layer=3"])
    done = train(SMOKE, PALIMPSEST_OVERRIDES=hidden, PALIMPSEST_LAUNCHER="local")
    assert done.returncode == 2
    assert "did you mean num_layers?" in done.stderr


def test_a_launcher_that_says_half() -> None:
    done = train(SMOKE, RANK="0")
    assert done.returncode == 1
    assert "WORLD_SIZE is not set" in done.stderr


@pytest.mark.parametrize("mistake", ["model.num_kv_heads=3", "model.num_layer=3", "parallel.tensor=7"])
def test_a_mistake_has_an_outcome_whether_the_folder_was_there_or_not(mistake: str, tmp_path: Path) -> None:
    """Launchers lose the 2, and what an earlier start has left, a wish to be started again, would be believed."""
    for _ in range(2):
        assert train(SMOKE, "folder=run", mistake).returncode == 2
        said = outcome.read(tmp_path / "run")
        assert said is not None
        assert (said.code, said.rank, said.step) == (2, 0, 0)
        assert mistake.split("=")[0] in said.error
        outcome.write(tmp_path / "run", Outcome("local", 0, 85, 40))


def test_in_a_folder_in_use_nothing_is_written(tmp_path: Path) -> None:
    """Whichever rank of the second start it is, and whatever else is wrong with it."""
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "4321"}
    with held("127.0.0.1:4321") as holder:
        before = contents(tmp_path / "run")
        for rank in "01":
            done = train(SMOKE, "folder=run", RANK=rank, LOCAL_RANK=rank, SLURM_JOB_ID="14", **world)
            assert done.returncode == 1
            assert f"run folder run is in use: process {holder} on " in done.stderr
            mistaken = train(SMOKE, "folder=run", "seed=x", RANK=rank, LOCAL_RANK=rank, **world)
            assert mistaken.returncode == 2
        assert contents(tmp_path / "run") == before


@pytest.mark.parametrize(("code", "ignored"), [(EXIT_DONE, False), (EXIT_REQUEUE, True)])
def test_signals_after_a_run_has_saved_do_not_change_its_exit_code(
    code: int, ignored: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tools.train, "_run", lambda *_: code)
    assert tools.train.start(tmp_path / "run.yaml", []) == code
    assert (signal.getsignal(signal.SIGTERM) is signal.SIG_IGN) == ignored


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        ({}, 2),
        ({"job": "x7", "attempt": 1}, 2),
        ({"job": "x7", "attempt": 5}, 6),
        ({"job": "x8", "attempt": 5}, 2),
    ],
    ids=["new", "older", "newer", "of another job"],
)
def test_an_attempt_under_torchrun_is_above_those_that_have_saved(
    before: dict[str, object], expected: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The agent of this rank has counted two restarts; another one, which is lost, may have counted more."""
    environment = RankEnvironment(job="x7", attempt=2)

    def agreed() -> RankEnvironment:
        return tools.train._with_agreed_attempt(tools.train._with_unused_attempt(environment, tmp_path))

    if before:
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "checkpoints" / "owner.json").write_text(json.dumps(before))
    monkeypatch.delenv("PALIMPSEST_LAUNCHER", raising=False)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    assert agreed() is environment, "the launcher's number is everyone's"
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert agreed().attempt == expected
    monkeypatch.setenv("PALIMPSEST_LAUNCHER", "torchrun")
    assert agreed() is environment, "the supervisor counts"


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("before", [None, 1, 4], ids=["new", "an earlier attempt", "of this attempt"])
def test_ranks_of_torchrun_that_do_not_meet_have_an_outcome(
    rank: int, before: int | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """torchrun loses the exit code. Attempt 3 of the job has saved, and this agent has counted none."""
    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    for name, value in (world | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 4321}).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x7")
    monkeypatch.delenv("PALIMPSEST_LAUNCHER", raising=False)
    monkeypatch.setattr(tools.train, "RANK_0_FIRST_SECONDS", 0.0)
    job = rank_environment(os.environ).job
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "owner.json").write_text(json.dumps({"job": job, "attempt": 3}))
    if before is not None:
        outcome.write(tmp_path / "run", Outcome(job, before, EXIT_REQUEUE, 5, rank=1, error="before"))

    def fail(*_: object) -> int:
        raise EnvironmentProblem("1 of 2 ranks have come after 0 s")

    monkeypatch.setattr("engine.parallel.groups.attempt_under_torchrun", fail)
    with pytest.raises(EnvironmentProblem if rank == 0 else typer.Exit):
        tools.train.start(Path(SMOKE), [f"folder={tmp_path / 'run'}"])
    said = outcome.read(tmp_path / "run")
    assert said is not None
    if before == 4:
        assert said.error == "before", "the first of a start to fail is the one that is told"
    else:
        assert (said.job, said.attempt, said.code, said.rank, said.step) == (job, 4, EXIT_FAILURE, rank, 0)
        assert "1 of 2 ranks have come" in said.error
