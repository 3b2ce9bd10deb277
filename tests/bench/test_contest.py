"""Workers of a benchmark end with the process that asked for them."""

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import os
import threading

from bench.contest import Worker


def stay(connection):
    connection.send(os.getpid())
    threading.Event().wait()


if __name__ == "__main__":
    print("worker", Worker("stay", "forkserver", {}, stay).receive(200), flush=True)
    threading.Event().wait()
"""


def test_a_worker_ends_with_a_benchmark_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(
        [sys.executable, tmp_path / "script.py"], stdout=subprocess.PIPE, text=True, env=environment
    ) as benchmark:
        assert benchmark.stdout is not None
        told = next(line for line in benchmark.stdout if line.startswith("worker "))  # not what libraries print
        worker = os.pidfd_open(int(told.split()[1]))
        try:
            benchmark.send_signal(signal.SIGKILL)
            ended, _, _ = select.select([worker], [], [], 100)
            assert ended, "it goes on without anybody to tell"
        finally:
            os.close(worker)
