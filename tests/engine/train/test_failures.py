"""What libraries say when a neighbour or memory is gone, as a user reads it."""

import subprocess
import sys
from pathlib import Path

import pytest

from engine.errors import DataError, EnvironmentProblem
from engine.train.failures import LostNeighbour, translate_error

REPOSITORY = Path(__file__).parents[3]


@pytest.mark.parametrize(
    "text",
    [
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:12345",
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection reset by peer [10.0.0.2]:1",
        "NCCL communicator was aborted on rank 3.",
        "NCCL error in: ../torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:77, remote process exited or there was a "
        "network error",
    ],
)
def test_a_lost_neighbour_is_one_sentence(text: str) -> None:
    told = translate_error(RuntimeError(text), global_rank=2, step=6)
    assert isinstance(told, LostNeighbour)
    assert told.wrong == "lost a neighbour in step 7: another rank, or the network to it, is gone"
    assert "logs/" in told.remedy


def test_memory_that_the_kernel_refuses() -> None:
    """A real refusal: the address space is limited in a process of its own."""
    script = """
import resource, sys, torch
from engine.train.failures import translate_error
resource.setrlimit(resource.RLIMIT_AS, (1 << 20, resource.RLIM_INFINITY))
try:
    torch.zeros(1 << 36, dtype=torch.uint8)
except Exception as error:
    told = translate_error(error, 1, 3)
    print(type(told).__name__, told)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert done.stdout.startswith("EnvironmentProblem rank 1 is out of memory in step 4: RuntimeError: ")
    assert "lower parallel.micro_batch_size" in done.stdout
    assert isinstance(translate_error(MemoryError(), 0, 0), EnvironmentProblem)


@pytest.mark.parametrize("error", [DataError("out of memory"), ValueError("nothing we know"), KeyError("x")])
def test_everything_else_stays_what_it_is(error: Exception) -> None:
    assert translate_error(error, 0, 0) is error
