"""Who holds up the others, in words, from made-up stacks; and real stacks of real processes, one of them stopped."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from engine.heartbeat import Beat
from engine.run_folder import Start
from launcher import diagnosis
from launcher.diagnosis import Frame, Seen, as_text, in_words, suspect, take_stack

C10D = "torch/distributed/distributed_c10d.py"
REDUCING = (Frame("all_reduce", C10D, 3000), Frame("of_losses", "engine/train/step_totals.py", 46))
COMPUTING = (Frame("linear", "torch/nn/functional.py", 5), Frame("forward", "engine/models/gpt.py", 10))


def seen(rank: int, stack=REDUCING, state="S", step=7, seconds=30.0, refused="") -> Seen:
    return Seen(rank, state, Beat(9, step, "loss", 0.0), seconds, stack, refused)


def test_the_one_outside_of_a_collective_holds_up_those_inside() -> None:
    ranks = [seen(0), seen(1, COMPUTING, seconds=29.9), seen(2)]
    assert suspect(ranks).global_rank == 1
    assert in_words(ranks) == (
        "rank 1 hangs: silent for 30 s in step 8 (loss), in linear (torch/nn/functional.py:5); "
        "ranks 0, 2 wait in all_reduce"
    )


def test_a_stopped_process_is_to_blame_wherever_it_was_stopped() -> None:
    ranks = [seen(0, COMPUTING), seen(1, state="T"), seen(2)]
    assert suspect(ranks).global_rank == 1
    assert (
        "rank 1 hangs: silent for 30 s in step 8 (loss), its process is stopped (SIGSTOP), in all_reduce"
        in in_words(ranks)
    )


def test_where_all_wait_the_one_that_came_least_far() -> None:
    ranks = [seen(0), seen(1, step=6), seen(2)]
    assert suspect(ranks).global_rank == 1
    assert suspect([seen(0, seconds=10), seen(1, seconds=11)]).global_rank == 1


def test_without_stacks_it_says_why_and_goes_by_the_rest() -> None:
    ranks = [seen(0, (), refused="py-spy may not trace it"), seen(1, (), state="D", step=6, refused="no")]
    assert in_words(ranks) == (
        "rank 1 hangs: silent for 30 s in step 7 (loss), its process waits for a device or a file system (no); "
        "rank 0 is in step 8 (loss)"
    )


def test_the_report_of_an_earlier_job_is_kept(tmp_path: Path) -> None:
    starts = [Start("17", 0), Start("17", 1), Start("18", 0), Start("run/a b", 0)]
    files = [diagnosis.stacks_file(tmp_path, start) for start in starts]
    names = ["hang-17.0.txt", "hang-17.1.txt", "hang-18.0.txt", "hang-run_a_b.0.txt"]
    assert files == [tmp_path / "logs" / name for name in names]


def test_the_report_has_every_stack() -> None:
    text = as_text([seen(0), seen(1, (), refused="gone")])
    assert text == (
        "rank 0: silent for 30.0 s in step 8 (loss), process state S\n"
        f"    all_reduce ({C10D}:3000)\n"
        "    of_losses (engine/train/step_totals.py:46)\n\n"
        "rank 1: silent for 30.0 s in step 8 (loss), process state S\n"
        "    no stack: gone\n"
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="tracing another process may need root")
@pytest.mark.parametrize("stopped", [False, True])
def test_the_stack_of_a_process_that_does_not_help(stopped: bool, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\n"
        "def stuck():\n    print('in', flush=True)\n    input()\nstuck()\n"
    )
    command = [sys.executable, "-S", str(script)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "in\n"
            if stopped:
                process.send_signal(signal.SIGSTOP)
                os.waitpid(process.pid, os.WUNTRACED)
            stack, refused = take_stack(process.pid)
        finally:
            process.kill()
    assert refused == ""
    assert [(frame.function, frame.file) for frame in stack] == [("stuck", "script.py"), ("<module>", "script.py")]


def test_a_process_that_is_gone_has_no_stack() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    stack, refused = take_stack(process.pid)
    assert stack == ()
    assert refused.startswith("py-spy found no stack")


def test_where_tracing_is_refused_the_right_that_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_, **__):
        return subprocess.CompletedProcess(
            [], 1, "", "Error: Permission Denied: Try running again with elevated rights"
        )

    monkeypatch.setattr(diagnosis.subprocess, "run", refuse)
    assert "CAP_SYS_PTRACE" in take_stack(1)[1]
