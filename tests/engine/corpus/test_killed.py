"""The command, killed and run on several ranks: the bytes are those of one process that was left alone."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from engine.cli import EXIT_INTERRUPTED
from engine.corpus.options import PrepareOptions
from engine.corpus.prepare import prepare
from engine.corpus.recipe import WORK
from tests.engine.data.corpus import made_up_texts, write_json_lines

NUM_SOURCES = 6


def large_source(path: Path, seed: int) -> Path:
    return write_json_lines(path, [text * 40 for text in made_up_texts(200, seed)])


@pytest.fixture(scope="module")
def options(tokenizer_folder, tmp_path_factory) -> PrepareOptions:
    folder = tmp_path_factory.mktemp("killed")
    for number in range(NUM_SOURCES):
        large_source(folder / f"source-{number}.jsonl", number)
    return PrepareOptions((str(folder / "*.jsonl"),), tokenizer_folder, folder / "alone", 0.2, shard_bytes=200_000)


def command(options: PrepareOptions, output: Path) -> list[str]:
    sources = [sys.executable, "-m", "engine.cli", "prepare", *options.sources, "--deduplicate", "near"]
    shape = ["--validation-fraction", "0.2", "--shard-megabytes", str(200_000 / 2**20)]
    return [*sources, *shape, "--tokenizer", str(options.tokenizer), "--output", str(output)]


def has_processes(session: int) -> bool:
    """Whether a process of this session is left; the test's time limit ends the wait for it."""
    try:
        os.killpg(session, 0)
    except ProcessLookupError:
        return False
    return True


def files_of(output: Path) -> dict[str, bytes]:
    return {str(path.relative_to(output)): path.read_bytes() for path in sorted(output.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def expected(options) -> dict[str, bytes]:
    prepare(replace(options, deduplicate="near"))
    return files_of(options.output)


def test_a_kill_costs_what_was_under_way_and_leaves_no_worker(options, expected, tmp_path):
    """Killed as soon as two parts are there. That they are kept is shown in test_prepare."""
    output = tmp_path / "out"
    process = subprocess.Popen([*command(options, output), "--workers", "2"], start_new_session=True)
    while len(list(output.glob(f"{WORK}/*/*.part"))) < 2:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    while has_processes(process.pid):
        time.sleep(0.05)
    done = subprocess.run([*command(options, output), "--workers", "1"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert files_of(output) == expected


def test_ctrl_c_ends_the_command_and_its_workers_in_words_and_the_same_command_goes_on(options, expected, tmp_path):
    """The signal goes to the whole group, as a terminal sends it: the workers leave the word to their parent."""
    output = tmp_path / "out"
    with (tmp_path / "said").open("w+") as said:
        process = subprocess.Popen(
            [*command(options, output), "--workers", "2"], start_new_session=True, stdout=said, stderr=said
        )
        while not list(output.glob(f"{WORK}/*/*.part")):
            assert process.poll() is None, "it ended before it could be interrupted"
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait() == EXIT_INTERRUPTED
        while has_processes(process.pid):
            time.sleep(0.05)
        said.seek(0)
        text = said.read()
    assert "Traceback" not in text
    assert "interrupted" in text
    prepare(replace(options, deduplicate="near", output=output))
    assert files_of(output) == expected


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="there is no mpirun (apt-get install openmpi-bin)")
def test_mpi_ranks_write_the_same_bytes(options, expected, tmp_path):
    pytest.importorskip("mpi4py", reason="mpi4py is not installed (pip install palimpsest[mpi])")
    launch = ["mpirun", "-n", "3", "--oversubscribe"]
    if "open mpi" in subprocess.run(["mpirun", "--version"], capture_output=True, text=True).stdout.lower():
        launch += ["--allow-run-as-root", "--bind-to", "none", "--mca", "btl", "self,vader,tcp"]
    done = subprocess.run(
        [*launch, *command(options, tmp_path / "ranks")],
        env=dict(
            os.environ
        ),  # without what an MPI library in this process has set: mpirun would take itself for a rank
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert files_of(tmp_path / "ranks") == expected
    assert done.stdout.count("wrote ") == 1
