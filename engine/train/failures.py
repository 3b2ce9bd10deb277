"""Translation of library errors into ours: a neighbour that is gone, and memory that is exhausted."""

from __future__ import annotations

import re

import torch

from engine.errors import EnvironmentProblem, PalimpsestError

# Matched by text: gloo, NCCL and torch's store raise a plain RuntimeError for all of these.
_LOST = re.compile(
    r"Connection (closed|reset) by peer|Broken pipe|gloo/transport|Socket Timeout|NCCL communicator was aborted"
    r"|NCCL error|remote process exited|Timed out waiting|failed to recv|Connection refused"
)
_MEMORY = re.compile(r"can't allocate memory|out of memory|Cannot allocate memory|std::bad_alloc")


class LostNeighbour(EnvironmentProblem):
    """Another rank is gone; the launcher and that rank's log say which one and why."""


def translate_error(error: Exception, global_rank: int, step: int) -> Exception:
    """Return the error as a user should read it: itself, or one of ours for what it stands for."""
    if isinstance(error, PalimpsestError):
        return error
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or _MEMORY.search(text):
        return EnvironmentProblem(
            f"rank {global_rank} is out of memory in step {step + 1}: {text.splitlines()[0][:300]}",
            "what `palimpsest plan` says that a rank needs",
            "lower parallel.micro_batch_size, raise parallel.zero_stage, or use more ranks",
        )
    if _LOST.search(text):
        return LostNeighbour(
            f"lost a neighbour in step {step + 1}: another rank, or the network to it, is gone",
            remedy="look at what the other ranks said (logs/, or the launcher's last words), then start the run again",
        )
    return error
