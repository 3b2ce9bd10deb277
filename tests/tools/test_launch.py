"""`palimpsest launch` from the outside, as far as no torch is needed."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine import cli, outcome
from engine.outcome import Outcome
from tests.tools.folder_in_use import contents, held

REPOSITORY = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("bare_node")
SMOKE = str(REPOSITORY / "configs/smoke/gpt2.yaml")


def call(*arguments: str) -> int:
    return cli.main(list(arguments))


def test_dry_run_prints_one_line_per_rank_and_starts_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert call("launch", SMOKE, "parallel.pipe=2", "--dry-run") == 0
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 2
    for rank, line in enumerate(lines):
        assert f" RANK={rank} WORLD_SIZE=2 " in line
        assert shlex.split(line)[-5:] == ["-m", "engine.cli", "train", SMOKE, "parallel.pipe=2"]
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_says_which_gpus_and_what_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tools.launch.num_gpus", lambda environ: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,2")
    monkeypatch.setenv("NODE_RANK", "1")
    assert call("launch", SMOKE, "--launcher", "deepspeed", "--dry-run") == 0
    line = capfd.readouterr().out
    assert line.startswith("env -u CUDA_VISIBLE_DEVICES -u NODE_RANK PALIMPSEST_JOB=")
    assert "/deepspeed --hostfile=/dev/null --include=localhost:2,3 --master_port=" in line
    assert call("launch", SMOKE, "--launcher", "torchrun", "--dry-run") == 0
    assert " CUDA_VISIBLE_DEVICES=3,2 " in capfd.readouterr().out


@pytest.mark.parametrize(
    ("launcher", "program"),
    [("deepspeed", "/deepspeed --hostfile=/dev/null --num_gpus=4"), ("torchrun", "/torchrun --nnodes=1")],
)
def test_dry_run_of_other_launchers(launcher: str, program: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert call("launch", SMOKE, "--launcher", launcher, "--processes", "4", "--dry-run") == 0
    (line,) = capfd.readouterr().out.splitlines()
    assert program in " ".join(shlex.split(line))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes", "3"], "this run cannot start on 3 ranks: stages.0.global_batch_size = 8"),
        (["optimizer.learning_rat=1"], "did you mean learning_rate?"),
        (["--launcher", "lsf"], "--launcher = 'lsf'\n  allowed: local, deepspeed, torchrun, slurm"),
        (["--nodes", "2"], "--nodes beside --launcher local"),
        (["--launcher", "slurm", "--processes", "2"], "--processes beside --launcher slurm"),
        (["--launcher", "slurm", "--nodes", "3", "--ranks-per-node", "1"], "make no world in which this run can start"),
        (["--launcher", "slurm", "--slurm", "allocation.acount=me"], "did you mean account?"),
        (["--processes", "0"], "equal to 1"),
    ],
)
def test_mistakes_start_nothing(
    arguments: list[str], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert call("launch", SMOKE, *arguments) == 2
    assert message in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_more_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("tools.launch.num_gpus", lambda environ: 2)
    assert call("launch", SMOKE, "--processes", "4") == 1
    error = capfd.readouterr().err
    assert "--processes = 4, but this node offers 2 GPUs" in error
    assert "hide the GPUs with CUDA_VISIBLE_DEVICES=" in error


@pytest.mark.parametrize(
    ("override", "gpus", "ranks"),
    [("parallel.data=4", 8, 4), ("parallel.pipe=2", 8, 8), ("parallel.pipe=2", 0, 2), ("name=x", 0, 1)],
)
def test_default_number_of_ranks(
    override: str, gpus: int, ranks: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tools.launch.num_gpus", lambda environ: gpus)
    assert call("launch", SMOKE, override, "--dry-run") == 0
    assert f"WORLD_SIZE={ranks} " in capfd.readouterr().out


@pytest.fixture
def ranks_that(monkeypatch: pytest.MonkeyPatch):
    """Makes `launch` start these scripts in place of ranks."""

    def install(*scripts: str, arguments: tuple[str, ...] = ()) -> None:
        from launcher.commands import Command, Node, Wanted, commands

        def stand_ins(wanted: Wanted, node: Node) -> list[Command]:
            return [
                Command(command.name, (sys.executable, "-S", "-c", script, *arguments), command.environment)
                for command, script in zip(commands(wanted, node), scripts, strict=True)
            ]

        monkeypatch.setattr("launcher.attempts.commands", stand_ins)

    return install


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Makes `launch` take a script for the interpreter that ranks are started with, arguments and all."""

    def install(script: str) -> Path:
        program = tmp_path / "bin" / "python"
        program.parent.mkdir()
        program.write_text(f"#!{sys.executable} -S\n{script}", encoding="utf-8")
        program.chmod(0o755)
        monkeypatch.setattr("sys.executable", str(program))
        return program

    return install


def test_credentials_in_overrides_reach_the_ranks_and_nobody_else(
    interpreter, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Every user of a node sees the command lines of its processes; only the owner sees their variables."""
    interpreter(
        "import json, os, sys\n"
        "given = json.loads(os.environ['PALIMPSEST_OVERRIDES'])\n"
        "assert given[0] == 'folder=run' and 'hunter2' in given[1], given\n"
        "print(open('/proc/self/cmdline').read().split(chr(0)))\n"
        "said = dict(job=os.environ['PALIMPSEST_JOB'], attempt=0, code=0, step=4, rank=None, error='')\n"
        "json.dump(said, open('run/outcome.json', 'w'))\n"
    )
    secret = "stages.0.data.train=https://user:hunter2@127.0.0.1/tokens?token=hunter2"
    overrides = ("folder=run", secret, "stages.0.data.cache={folder: cache, bytes: 1_000_000_000}")
    for launcher in ("local", "torchrun", "deepspeed"):
        assert call("launch", SMOKE, *overrides, "--launcher", launcher, "--dry-run") == 0
    assert call("launch", SMOKE, *overrides) == 0
    captured = capfd.readouterr()
    assert "'-m', 'engine.cli', 'train'" in captured.out, "the command line is in the log"
    assert "hunter2" not in captured.out + captured.err
    for path, text in contents(tmp_path / "run").items():
        assert b"hunter2" not in text, path


@pytest.mark.parametrize("both", [False, True], ids=["tee", "tee of both"])
def test_ctrl_c_in_a_pipeline_saves_and_ends_with_85(interpreter, tmp_path: Path, both: bool) -> None:
    """A terminal sends SIGINT to `launch` and to the `tee` behind it, which dies: what is said then has no reader."""
    program = interpreter(
        "import json, os, signal, sys, time\n"
        f"sys.path.insert(0, {str(REPOSITORY)!r})\n"
        "from engine.heartbeat import Heartbeat, given_folder\n"
        "def save(*_):\n"
        "    for _ in range(4000):\n"
        "        print('saving ' + 64 * '.', flush=True)  # more than a pipe holds\n"
        "    said = dict(job=os.environ['PALIMPSEST_JOB'], attempt=0, code=85, step=4, rank=None, error='')\n"
        "    json.dump(said, open('run/outcome.json', 'w'))\n"
        "    sys.exit(85)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "Heartbeat(given_folder(os.environ), 0).beat(4, 'data')\n"
        "print('ready', flush=True)\n"
        "while True: time.sleep(60)\n"
    )
    python = os.path.realpath("/proc/self/exe")
    driver = f"import sys; sys.executable = {str(program)!r}; from engine.cli import main; sys.exit(main(sys.argv[1:]))"
    with (tmp_path / "errors").open("wb") as errors:
        launch = subprocess.Popen(
            [python, "-c", driver, "launch", SMOKE, "folder=run"],
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), *sys.path])},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if both else errors,
            process_group=0,
        )
    try:
        # the group is the one that a shell gives to a pipeline in the foreground
        said = tmp_path / "said"
        tee = subprocess.Popen(
            ["tee", str(said)], stdin=launch.stdout, stdout=subprocess.DEVNULL, process_group=launch.pid
        )
        assert launch.stdout is not None
        launch.stdout.close()
        deadline = time.monotonic() + 100
        while not (said.exists() and b"ready" in said.read_bytes()):
            assert time.monotonic() < deadline
            assert launch.poll() is None
            time.sleep(0.05)
        os.killpg(launch.pid, signal.SIGINT)
        assert tee.wait(timeout=100) == -signal.SIGINT
        assert launch.wait(timeout=100) == 85
    finally:
        launch.kill()
    ended = outcome.read(tmp_path / "run")
    assert ended is not None
    assert (ended.code, ended.step) == (85, 4)
    log = (tmp_path / "run" / "logs" / "rank-0.log").read_text()
    assert log.count("saving") == 4000, "the log has all of it"
    if not both:
        last = (tmp_path / "errors").read_text().splitlines()[-1]
        assert last == "palimpsest launch: saved at step 4 and wants to be started again (exit code 85)"


def test_the_outcome_is_the_exit_code(ranks_that, capfd: pytest.CaptureFixture[str]) -> None:
    said = "dict(job=os.environ['PALIMPSEST_JOB'], attempt=0, code=85, step=4, rank=None, error='')"
    ranks_that(f"import json, os; json.dump({said}, open('run/outcome.json', 'w'))")
    assert call("launch", SMOKE, "folder=run") == 85
    assert "saved at step 4 and wants to be started again" in capfd.readouterr().err


def test_a_failing_ranks_last_words_are_shown(ranks_that, capfd: pytest.CaptureFixture[str]) -> None:
    ranks_that("import time; time.sleep(0.5)", "print('out of paper'); raise SystemExit(3)")
    assert call("launch", SMOKE, "folder=run", "--processes", "2") == 1
    error = capfd.readouterr().err
    assert "out of paper" in error
    assert "failed: rank-1 ended with exit code 3" in error
    assert "to do: read run/logs/rank-1.log" in error


def test_the_same_failure_twice_is_not_tried_a_third_time(
    ranks_that, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    said = "dict(job=os.environ['PALIMPSEST_JOB'], attempt=int(os.environ['PALIMPSEST_ATTEMPT']), code=1, step=4, "
    said += "rank=0, error='rank 0: bad shard')"
    ranks_that(f"import json, os, sys; json.dump({said}, open('run/outcome.json', 'w')); sys.exit(1)")
    assert call("launch", SMOKE, "folder=run", "--restarts", "8") == 1
    assert capfd.readouterr().err.splitlines()[-4:] == [
        "palimpsest launch: failed at step 4: rank 0: bad shard",
        "palimpsest launch: restart 1 of 8 on 1 ranks",
        "palimpsest launch: failed at step 4: rank 0: bad shard",
        "  not restarted: step 4 has failed twice in the same way, and would again",
    ]
    ended = outcome.read(tmp_path / "run")
    assert ended is not None
    assert (ended.code, ended.attempt, ended.rank) == (1, 1, 0)


def test_a_run_folder_is_used_by_one_launch_at_a_time(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Also by what a killed supervisor has left: orphans are found by their mark."""
    environment = os.environ | {"PALIMPSEST_RUN_FOLDER": str(tmp_path / "run")}
    left = subprocess.Popen([sys.executable, "-S", "-c", "input()"], env=environment, stdin=subprocess.PIPE)
    try:
        assert call("launch", SMOKE, "folder=run") == 1
    finally:
        left.kill()
        left.wait()
    error = capfd.readouterr().err
    assert f"run folder run is in use: processes {left.pid} of an earlier launch are still running" in error
    assert f"let it save and stop: kill {left.pid} (kill -9 only" in error


def test_a_launch_in_a_folder_that_another_start_uses_writes_nothing_there(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The other start may be on another node, without the mark of a launch, and building extensions just now."""
    lock = tmp_path / "run" / "extensions" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    with held("node1:15013") as holder:
        before = contents(tmp_path / "run")
        assert call("launch", SMOKE, "folder=run") == 1
        assert contents(tmp_path / "run") == before
    error = capfd.readouterr().err
    assert f"run folder run is in use: process {holder} on " in error
    assert ", job 13" in error


def test_a_start_that_is_refused_leaves_the_live_launch_alone(
    ranks_that, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The rank that is watched over starts `palimpsest train` in its own folder as a user would, then ends well."""
    rank = f"""
import json, os, subprocess, sys
own = ("PALIMPSEST_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_")
environment = {{name: value for name, value in os.environ.items() if not name.startswith(own)}}
refused = subprocess.run(
    [sys.executable, "-c", "import sys; from engine.cli import main; sys.exit(main(sys.argv[1:]))", *sys.argv[1:]],
    env=environment | {{"PYTHONPATH": {str(REPOSITORY)!r}}}, capture_output=True, text=True,
)
assert refused.returncode == 1 and "run folder run is in use: process" in refused.stderr, refused
assert not os.path.exists("run/outcome.json")
said = dict(job=os.environ["PALIMPSEST_JOB"], attempt=0, code=0, step=4, rank=None, error="")
json.dump(said, open("run/outcome.json", "w"))
"""
    ranks_that(rank, arguments=("train", SMOKE, "folder=run"))
    assert call("launch", SMOKE, "folder=run") == 0, capfd.readouterr().err
    assert "done at step 4" in capfd.readouterr().out
    assert (tmp_path / "run" / "running.json").read_text() == ""


def test_a_stale_build_lock_is_found_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    lock = tmp_path / "run" / "extensions" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert call("launch", SMOKE, "folder=run") == 1
    error = capfd.readouterr().err
    assert f"the build lock {lock} was left by a build that was killed" in error
    assert f"rm -r {lock.parent}" in error
    said = outcome.read(tmp_path / "run")
    assert said is not None
    assert (said.code, said.rank) == (1, None)
    assert "the build lock" in said.error


def test_signals_are_the_ones_that_clusters_send() -> None:
    from launcher.signals import FORWARDED

    assert {signal.SIGTERM, signal.SIGUSR1} <= FORWARDED.keys()


@pytest.mark.parametrize("command", ["launch", "train"])
def test_a_run_folder_that_is_a_file_is_named(command: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken").touch()
    assert call(command, SMOKE, "folder=taken/sub") == 1
    assert "run folder taken/sub cannot be used: Not a directory" in capfd.readouterr().err


@pytest.mark.parametrize("command", ["launch", "train"])
def test_a_run_that_was_stopped_by_a_file_is_not_started(
    command: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its last outcome, a wish to be started again, does not stay for a queue to read."""
    (tmp_path / "run").mkdir()
    outcome.write(tmp_path / "run", Outcome("local", 0, 85, 40))
    (tmp_path / "run" / "stop").touch()
    assert call(command, SMOKE, "folder=run") == 2
    assert "run/stop is there" in capfd.readouterr().err
    said = outcome.read(tmp_path / "run")
    assert said is not None
    assert said.code == 2
    assert (tmp_path / "run" / "stop").exists()
