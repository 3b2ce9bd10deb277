"""Supervision over small stand-ins for ranks and launchers: what is shown, passed on, ended and concluded."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from engine import outcome
from engine.errors import EnvironmentProblem
from engine.outcome import Outcome
from engine.run_folder import RunFolder, Start
from launcher import decisions, processes, supervise
from launcher.attempts import attempt
from launcher.commands import Command
from launcher.ranks import LocalRanks
from launcher.signals import Signals
from launcher.variables import JOB
from launcher.verdict import Verdict

WAIT_SECONDS = 20
"""Upper bound of every wait; nothing waits that long unless the test fails."""

PROLOGUE = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
folder = Path(os.environ["FOLDER"])
rank = int(os.environ.get("RANK", -1))
def ready(name=None):
    (folder / f"ready-{rank if name is None else name}").write_text(str(os.getpid()))
def say(code, step=7, failed=None, error="", job=os.environ["PALIMPSEST_JOB"]):
    outcome = dict(job=job, attempt=0, code=code, step=step, rank=failed, error=error)
    (folder / "partial").write_text(json.dumps(outcome))
    (folder / "partial").rename(folder / "outcome.json")
def linger():
    time.sleep(60)
def on(name, then):
    signal.signal(getattr(signal, name), lambda *_: then())
"""
WAIT_FOR_OTHER = """
while not (folder / "ready-0").exists(): time.sleep(0.01)
"""


@pytest.fixture
def job(request: pytest.FixtureRequest) -> str:
    return f"{request.node.name}-{os.getpid()}"


@pytest.fixture(autouse=True)
def short_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decisions, "GRACE_SECONDS", 1.0)
    monkeypatch.setattr(decisions, "SAME_SIGNAL_SECONDS", 0.2)
    monkeypatch.setattr(decisions, "LISTENING_SECONDS", 0.0)


def stand_in(name: str, job: str, folder: Path, code: str, **environment: str) -> Command:
    return Command(
        name, (sys.executable, "-S", "-c", PROLOGUE + code), {JOB: job, "FOLDER": str(folder), **environment}
    )


def run_ranks(job: str, folder: Path, *codes: str) -> Verdict:
    commands = [stand_in(f"rank-{rank}", job, folder, code, RANK=str(rank)) for rank, code in enumerate(codes)]
    return run_commands(job, folder, commands, len(commands))


def run_commands(job: str, folder: Path, commands: list[Command], num_ranks: int) -> Verdict:
    """One attempt, as `palimpsest launch` makes it."""
    with RunFolder(folder, Start(job, 0)) as owned:
        owned.take(supervisor=True)
        owned.clear()
        with Signals() as signals:
            return attempt(LocalRanks(commands, owned, num_ranks), owned, signals)


def run_launcher(job: str, folder: Path, launcher: str, rank: str) -> Verdict:
    """One launcher that starts one rank, as deepspeed and torchrun do."""
    start = f"""
rank_process = subprocess.Popen([sys.executable, "-S", "-c", {PROLOGUE + rank!r}], env={{**os.environ, "RANK": "0"}})
while not (folder / "ready-0").exists(): time.sleep(0.01)
"""
    return run_commands(job, folder, [stand_in("launcher", job, folder, start + launcher)], 1)


def when_ready(folder: Path, *signals: signal.Signals, pause_seconds: float = 0.5) -> threading.Thread:
    """Sends signals to this process, as a cluster would, once rank 0 is ready."""

    def send() -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while not (folder / "ready-0").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        for number in signals:
            os.kill(os.getpid(), number)
            time.sleep(pause_seconds)

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    return thread


def test_done_by_outcome_with_one_log_per_rank(tmp_path: Path, job: str, capfd: pytest.CaptureFixture[str]) -> None:
    verdict = run_ranks(job, tmp_path, "print('from zero'); say(0)", "print('from one')")
    assert (verdict.code, verdict.words) == (0, "done at step 7")
    assert (tmp_path / "logs" / "rank-0.log").read_text() == "from zero\n"
    assert (tmp_path / "logs" / "rank-1.log").read_text() == "from one\n"
    shown = capfd.readouterr().out
    assert "from zero" in shown
    assert "from one" not in shown


def test_a_later_start_adds_to_the_logs(tmp_path: Path, job: str) -> None:
    for word in ("first", "second"):
        run_ranks(job, tmp_path, f"print({word!r}); say(0)")
    assert (tmp_path / "logs" / "rank-0.log").read_text() == "first\nsecond\n"


def test_one_dead_rank_ends_the_others(tmp_path: Path, job: str) -> None:
    verdict = run_ranks(job, tmp_path, "ready(); linger()", WAIT_FOR_OTHER + "sys.exit(3)")
    assert verdict.code == 1
    assert verdict.words == "failed: rank-1 ended with exit code 3; no rank has said how the run ended"
    assert verdict.look_at == "rank-1"
    assert processes.marked(job) == []


def test_a_killed_rank_is_named_with_its_signal(tmp_path: Path, job: str) -> None:
    verdict = run_ranks(job, tmp_path, "ready(); linger()", WAIT_FOR_OTHER + "os.kill(os.getpid(), signal.SIGKILL)")
    assert verdict.code == 1
    assert (verdict.words, verdict.lost) == ("failed: rank 1 was killed by SIGKILL", {1})
    said = outcome.read(tmp_path)
    assert said is not None
    assert (said.code, said.rank, said.error) == (1, 1, verdict.words), "no rank could write this"


def test_a_dying_rank_leaves_the_others_time_for_their_outcome(tmp_path: Path, job: str) -> None:
    last_words = "time.sleep(0.3); say(1, failed=None, error='lost rank 1'); sys.exit(1)"
    verdict = run_ranks(job, tmp_path, last_words, "sys.exit(1)")
    assert (verdict.code, verdict.words) == (1, "failed at step 7: lost rank 1")


def test_a_rank_that_only_missed_a_killed_one_is_not_blamed(tmp_path: Path, job: str) -> None:
    """The survivor's last words are about a closed connection; who closed it could say nothing."""
    survivor = """
ready()
while not (folder / "ready-1").exists(): time.sleep(0.01)
time.sleep(0.3)
say(1, failed=0, error="connection closed")
time.sleep(0.5)
sys.exit(1)
"""
    killed = WAIT_FOR_OTHER + "ready(); os.kill(os.getpid(), signal.SIGKILL)"
    verdict = run_ranks(job, tmp_path, survivor, killed)
    assert verdict.code == 1
    assert verdict.words == "failed: rank 1 was killed by SIGKILL; rank 0 then: connection closed"
    assert (verdict.step, verdict.lost) == (7, {1})
    said = outcome.read(tmp_path)
    assert said is not None
    assert said.rank == 1, "the neighbour that could still write is not the one to blame"


def test_a_failure_that_was_said_ends_ranks_that_hang(tmp_path: Path, job: str) -> None:
    """The launcher itself is alive and no child of ours has failed, as under deepspeed and torchrun."""
    verdict = run_launcher(job, tmp_path, "linger()", "ready(); say(1, failed=0, error='bad shard'); linger()")
    assert (verdict.code, verdict.words) == (1, "failed at step 7: rank 0 first: bad shard")
    assert processes.marked(job) == []


def test_a_mistake_of_the_user_keeps_its_exit_code(tmp_path: Path, job: str) -> None:
    assert run_ranks(job, tmp_path, "sys.exit(2)", "sys.exit(2)").code == 2


UNWRITABLE = """
sys.path.insert(0, {root!r})
from engine import heartbeat
from engine.outcome import Outcome
from engine.run_folder import RunFolder, Start
(folder / "outcome.json").mkdir()  # stands for a disk that is full just now
rank_0 = RunFolder(folder, Start(os.environ["PALIMPSEST_JOB"], 0), aside=Path(os.environ[heartbeat.VARIABLE]))
rank_0.take()
rank_0.{call}(Outcome(os.environ["PALIMPSEST_JOB"], 0, {code}, 7, {rank}, {error!r}))
{after}
sys.exit({code})
"""
ROOT = str(Path(__file__).parents[2])


@pytest.mark.parametrize(
    ("call", "code", "rank", "error", "words"),
    [
        ("note", 0, None, "", "done at step 7"),
        ("note", 85, None, "", "saved at step 7 and wants to be started again (exit code 85)"),
        ("note_failure", 1, 0, "bad shard", "failed at step 7: rank 0 first: bad shard"),
    ],
)
@pytest.mark.parametrize("room_again", [False, True])
def test_an_outcome_that_a_rank_cannot_write_is_told_all_the_same(
    tmp_path: Path, job: str, call: str, code: int, rank: int | None, error: str, words: str, room_again: bool
) -> None:
    """The rank leaves it to the supervisor, which tries again and says where that fails, too."""
    after = "(folder / 'outcome.json').rmdir()" if room_again else ""
    script = UNWRITABLE.format(root=ROOT, call=call, code=code, rank=rank, error=error, after=after)
    verdict = run_ranks(job, tmp_path, script)
    assert verdict.code == code
    if room_again:
        assert verdict.words == words
        said = outcome.read(tmp_path)
        assert said is not None
        assert (said.code, said.step, said.error) == (code, 7, error)
    else:
        assert verdict.words == f"{words}; {tmp_path / 'outcome.json'} cannot be written: Is a directory"


def test_a_failure_that_nobody_can_write_says_so(tmp_path: Path, job: str) -> None:
    verdict = run_ranks(job, tmp_path, "(folder / 'outcome.json').mkdir(); sys.exit(3)")
    assert verdict.code == 1
    assert verdict.words == (
        "failed: rank-0 ended with exit code 3; no rank has said how the run ended; "
        f"{tmp_path / 'outcome.json'} cannot be written: Is a directory"
    )


def test_an_old_outcome_never_speaks_for_a_new_run(tmp_path: Path, job: str) -> None:
    outcome.write(tmp_path, Outcome(job, 0, 0, 100))
    verdict = run_ranks(job, tmp_path, "pass")
    assert (verdict.code, verdict.words) == (
        1,
        "failed: rank-0 ended with exit code 0; no rank has said how the run ended",
    )


def test_an_outcome_of_another_job_is_not_ours(tmp_path: Path, job: str) -> None:
    verdict = run_ranks(job, tmp_path, "say(0, job='other')")
    assert verdict.code == 1
    assert "belongs to job other: another run uses the same folder" in verdict.words


def test_an_outcome_of_another_start_ends_nobody(tmp_path: Path, job: str) -> None:
    """What somebody else writes as a failure, of an older attempt or of another job, is not the run's own."""
    code = """
ready()
for other in (dict(job="other", attempt=0), dict(job=os.environ["PALIMPSEST_JOB"], attempt=-1)):
    failure = other | dict(code=1, step=0, rank=0, error="refused")
    (folder / "outcome.json").write_text(json.dumps(failure))
    time.sleep(0.5)
(folder / "outlived").touch()
say(0)
"""
    assert run_ranks(job, tmp_path, code, WAIT_FOR_OTHER).code == 0
    assert (tmp_path / "outlived").exists()


@pytest.mark.parametrize(("sent", "got"), [("SIGTERM", "SIGTERM"), ("SIGINT", "SIGTERM"), ("SIGUSR1", "SIGUSR1")])
def test_signals_reach_every_rank_and_a_requeue_comes_back(tmp_path: Path, job: str, sent: str, got: str) -> None:
    save = "on({!r}, lambda: (ready(f'saved-{{rank}}'), {} sys.exit(85))); ready(); linger()"
    sender = when_ready(tmp_path, signal.Signals[sent])
    # rank 1 is up before rank 0 is: the signal is sent when rank 0 says that it is ready
    first = "while not (folder / 'ready-1').exists(): time.sleep(0.01)\n" + save.format(got, "say(85),")
    verdict = run_ranks(job, tmp_path, first, save.format(got, ""))
    sender.join()
    assert (verdict.code, verdict.words) == (85, "saved at step 7 and wants to be started again (exit code 85)")
    assert (tmp_path / "ready-saved-0").exists()
    assert (tmp_path / "ready-saved-1").exists()


def test_nohup_keeps_its_meaning(tmp_path: Path, job: str) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        sender = when_ready(tmp_path, signal.SIGHUP)
        rank = "on('SIGTERM', lambda: (say(85), sys.exit(85))); ready(); time.sleep(1); say(0)"
        verdict = run_ranks(job, tmp_path, rank)
        sender.join()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (verdict.code, verdict.stopping) == (0, False)


def test_signals_go_to_ranks_and_not_to_their_launcher(tmp_path: Path, job: str) -> None:
    sender = when_ready(tmp_path, signal.SIGTERM)
    launcher = "on('SIGTERM', lambda: ready('launcher-was-hit'))\nsys.exit(rank_process.wait() and 1)"
    rank = "on('SIGTERM', lambda: (say(85), sys.exit(85))); ready(); linger()"
    verdict = run_launcher(job, tmp_path, launcher, rank)
    sender.join()
    assert verdict.code == 85, "torchrun's and deepspeed's exit code 1 must not hide 85"
    assert "after that launcher ended with exit code 1" in verdict.words
    assert not (tmp_path / "ready-launcher-was-hit").exists()


def test_a_second_signal_ends_ranks_that_do_not_listen(tmp_path: Path, job: str) -> None:
    sender = when_ready(tmp_path, signal.SIGTERM, signal.SIGTERM)
    verdict = run_ranks(job, tmp_path, "on('SIGTERM', lambda: None); ready()\nwhile True: linger()")
    sender.join()
    assert verdict.code == 1
    assert "rank-0 was killed by SIGKILL" in verdict.words


def test_signals_at_once_count_as_one(tmp_path: Path, job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decisions, "SAME_SIGNAL_SECONDS", WAIT_SECONDS)
    sender = when_ready(tmp_path, signal.SIGTERM, signal.SIGINT, pause_seconds=0.1)
    rank = "on('SIGTERM', lambda: (time.sleep(0.5), say(85), sys.exit(85))); ready(); linger()"
    assert run_ranks(job, tmp_path, rank).code == 85
    sender.join()


def test_a_launcher_that_vanishes_takes_its_ranks_along(tmp_path: Path, job: str) -> None:
    verdict = run_launcher(job, tmp_path, "os.kill(os.getpid(), signal.SIGKILL)", "ready(); linger()")
    assert verdict.code == 1
    assert verdict.words == (
        "failed: launcher was killed by SIGKILL; its ranks were ended; no rank has said how the run ended"
    )
    assert processes.marked(job) == []


def test_a_launcher_that_ends_well_is_not_believed(tmp_path: Path, job: str) -> None:
    """deepspeed's runner exits 0 when its launch process dies of a signal."""
    verdict = run_launcher(job, tmp_path, "rank_process.kill(); rank_process.wait()", "ready(); linger()")
    assert (verdict.code, verdict.words) == (
        1,
        "failed: launcher ended with exit code 0; no rank has said how the run ended",
    )


def test_a_program_that_is_not_there(tmp_path: Path, job: str) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(EnvironmentProblem) as caught:
        run_commands(job, tmp_path, [Command("launcher", ("/no/such/deepspeed",), {JOB: job})], 1)
    assert caught.value.wrong == "/no/such/deepspeed cannot be started: No such file or directory"
    assert "use --launcher local" in caught.value.remedy
    assert signal.getsignal(signal.SIGTERM) is handler


def test_last_lines(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank-1.log").write_bytes(b"\xff\n" + b"\n".join(b"%d" % i for i in range(100)))
    assert supervise.last_lines(tmp_path, "rank-1", count=2) == "98\n99"


def test_a_rank_is_the_topmost_process_that_has_a_rank() -> None:
    tree = [
        processes.Process(10, 1, None),
        processes.Process(12, 10, 1),
        processes.Process(11, 10, 0),
        processes.Process(13, 11, 0),  # a data loader's worker inherits RANK
    ]
    assert [process.pid for process in processes.ranks(tree)] == [11, 12]
