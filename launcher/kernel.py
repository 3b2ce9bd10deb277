"""The kernel's own counters."""

from __future__ import annotations

from pathlib import Path

VMSTAT = Path("/proc/vmstat")


def num_killed_for_memory() -> int:
    """Number of processes that the kernel has killed for want of memory since the node is up; 0 if it is not known."""
    try:
        lines = VMSTAT.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
