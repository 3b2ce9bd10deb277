"""A run folder that another process uses, and what is in it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


@contextmanager
def held(meeting: str) -> Iterator[int]:
    """Another process that holds the folder `run` of the current folder for its start of a run, and its number."""
    script = """
import sys
from pathlib import Path
from engine.run_folder import RunFolder, Start
with RunFolder(Path("run"), Start("13", 0, f"step 0, {sys.argv[1]}")) as folder:
    folder.take()
    print("held", flush=True)
    sys.stdin.read()
"""
    command, environment = [sys.executable, "-c", script, meeting], os.environ | {"PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process.pid


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
