"""Search for slow nodes while a run trains: every rank times the same small computation now and then.

In a synchronous run all ranks wait for the slowest, so their step times are equal and tell nothing. A computation that
each rank does alone shows a GPU that is throttled, or a processor that something else uses.
"""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from engine.atomic import write_atomically
from engine.logs import logger
from engine.parallel.collectives import gather_objects
from engine.train.hooks import Hook, Run

FILE = "slow-nodes.txt"
"""File in the run folder: a host per line with a comment, as `--exclude` files of site profiles have it."""
SLOW_FACTOR = 1.5
"""Multiple of the median time of all ranks from which on a rank is slow."""
TIMES = 2
"""Measurements in a row in which a host has to be slow: a single one may be chance."""
REPETITIONS = 5
"""Repetitions of the computation, of which the fastest counts."""

_log = logger(__name__)


class NodeSpeed(Hook):
    """Hook that measures every `every_steps` steps, tells of slow hosts and writes them to the run folder."""

    def __init__(self, every_steps: int | None, measure: Callable[[torch.device], float] | None = None) -> None:
        self._every_steps, self._measure = every_steps, measure or probe_seconds
        self._slow: dict[str, int] = {}
        """Measurements in a row in which a host was slow, by host."""

    def between_steps(self, run: Run) -> bool:
        if self._every_steps is None or run.groups.world.size == 1 or run.state.step % self._every_steps:
            return False
        seconds = self._measure(run.pipeline.engine.device)
        everyones = gather_objects((socket.gethostname(), seconds), run.groups.world)
        found = slow_hosts(everyones)
        self._slow = {host: self._slow.get(host, 0) + 1 for host in found}
        lasting = {host: factor for host, factor in found.items() if self._slow[host] == TIMES}
        if lasting and run.is_main_rank:
            for host, factor in lasting.items():
                _log.warning("node %s computes %.1f times slower than the median of all ranks", host, factor)
            _note(run.config.folder / FILE, lasting, run.state.step)
        return False


def slow_hosts(seconds: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Return the hosts that have a slow rank, and how many times slower than the median of all ranks it is.

    `seconds` are host and time of each rank.
    """
    # The lower one of two: with two ranks the slow one must not be compared with itself.
    median = statistics.median_low(time_ for _, time_ in seconds)
    factors: dict[str, float] = {}
    for host, time_ in seconds:
        factors[host] = max(factors.get(host, 0.0), time_ / median)
    return {host: factor for host, factor in factors.items() if factor >= SLOW_FACTOR}


def probe_seconds(device: torch.device) -> float:
    """Return the seconds of a fixed product of matrices on a device, at its best of a few; milliseconds in all."""
    on_gpu = device.type == "cuda"
    size, dtype = (4096, torch.bfloat16) if on_gpu else (384, torch.float32)
    left_NN, best = torch.ones(size, size, dtype=dtype, device=device), float("inf")
    for _ in range(REPETITIONS):
        if on_gpu:
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        torch.mm(left_NN, left_NN)
        if on_gpu:
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return best


def _note(path: Path, found: dict[str, float], step: int) -> None:
    """Add hosts to the file, each once; on one rank. A file that cannot be written is a warning."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        known = {line.partition("#")[0].strip() for line in lines}
        now = datetime.now(UTC).isoformat(timespec="seconds")
        new = {host: factor for host, factor in found.items() if host not in known}
        lines += [f"{host}  # {factor:.1f} times slower at step {step}, {now}" for host, factor in new.items()]
        write_atomically(path, "\n".join([*lines, ""]))
    except OSError as error:
        _log.warning("%s cannot be written: %s", path, error.strerror or error)
