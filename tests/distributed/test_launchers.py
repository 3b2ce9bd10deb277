"""One run file, three ways to start it by hand, as users of these tools type it: the same losses, code 0 each time.

The two launchers start two data ranks, the plain process is alone, so a loss is summed in another order: 8 x 16 tokens
of a loss near 6 in fp32, rounded to 6e-8 of themselves, agree within 2e-6. Ports are free ones instead of the
launchers' own 29500, so that test runs on one machine do not meet.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine import outcome
from engine.errors import EXIT_DONE, EXIT_FAILURE, EXIT_USAGE
from engine.train.metrics import read_metrics
from launcher.ports import free_port
from tests.distributed.runs import run_tree, write_corpus

REPOSITORY = Path(__file__).parents[2]
PROGRAMS = Path(sys.executable).parent
NUM_STEPS = 4
WAYS = {
    "alone": [str(PROGRAMS / "palimpsest"), "train"],
    "deepspeed": [
        str(PROGRAMS / "deepspeed"),
        "--num_gpus",
        "2",
        "--master_port",
        "PORT",
        "--module",
        "engine.cli",
        "train",
    ],
    "torchrun": [
        str(PROGRAMS / "torchrun"),
        "--nproc-per-node",
        "2",
        "--master-port",
        "PORT",
        "-m",
        "engine.cli",
        "train",
    ],
}

DEEPSPEED = pytest.param("deepspeed", marks=pytest.mark.matrix)
"""Long; tests/chaos/test_stop_signals.py has a run under this launcher, started by `palimpsest launch`."""


@pytest.fixture(scope="module")
def run_file(tmp_path_factory) -> Path:
    """A run file beside its corpus; YAML takes JSON."""
    folder = tmp_path_factory.mktemp("launchers")
    write_corpus(folder)
    changes = {
        "model": {"num_layers": 2, "hidden_size": 32},
        "stages": [run_tree(folder, folder)["stages"][0] | {"duration": {"steps": NUM_STEPS}}],
        "evaluation": {"every_steps": None, "max_samples": 8},
        "checkpoint": {"every_steps": None},
    }
    path = folder / "RUN.yaml"
    path.write_text(json.dumps(run_tree(folder, folder / "run", **changes)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def alone(run_file) -> dict[int, float]:
    return trained("alone", run_file)


@pytest.mark.parametrize("way", [DEEPSPEED, "torchrun"])
def test_a_launcher_trains_as_one_process_does(way: str, run_file: Path, alone: dict[int, float]) -> None:
    losses = trained(way, run_file)
    assert sorted(losses) == sorted(alone) == list(range(1, NUM_STEPS + 1))
    assert max(alone.values()) > min(alone.values())
    for step, loss in losses.items():
        assert loss == pytest.approx(alone[step], abs=2e-6, rel=0), step


@pytest.mark.parametrize("way", ["alone", DEEPSPEED, "torchrun"])
def test_a_mistake_ends_every_rank_with_a_message_and_no_traceback_of_ours(way: str, run_file: Path) -> None:
    done = start(way, run_file, "stages.0.global_batch_sice=8")
    assert done.returncode in ((EXIT_USAGE,) if way == "alone" else (EXIT_FAILURE, EXIT_USAGE))
    assert f"configuration {run_file}" in done.stderr, done.stderr
    assert "tools/train.py" not in done.stderr
    assert "did you mean global_batch_size?" in done.stderr


def trained(way: str, run_file: Path) -> dict[int, float]:
    """Loss by step of a run that was started one way and has to end well."""
    folder = run_file.parent / way
    done = start(way, run_file, f"folder={folder}")
    assert done.returncode == EXIT_DONE, done.stdout + done.stderr
    ended = outcome.read(folder)
    assert ended is not None
    assert (ended.code, ended.step) == (EXIT_DONE, NUM_STEPS)
    return {record["step"]: record["loss"] for record in read_metrics(folder) if "loss" in record}


def start(way: str, run_file: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Types the command in the checkout, on the CPU, with no launcher's variables around."""
    foreign = ("SLURM_", "OMPI_", "PMI_", "PALIMPSEST_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [str(free_port()) if word == "PORT" else word for word in WAYS[way]]
    return subprocess.run(
        [*command, str(run_file), *overrides],
        cwd=REPOSITORY,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
