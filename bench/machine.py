"""What a figure was measured on: machine, versions, commit. Written beside every result; imports no torch."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "deepspeed", "transformers", "accelerate", "triton", "numpy")
NATIVE_BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""Flags of /proc/cpuinfo (x86, x86 with tiles, Arm) that stand for bf16 products in hardware."""


def machine(threads: int) -> dict[str, Any]:
    """Processor, load, versions and commit as JSON values; what cannot be found out is None."""
    cpuinfo = _cpuinfo()
    model = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "processor": model.group(1) if model else platform.machine(),
        "cores": os.cpu_count(),
        "threads": threads,
        "native_bf16": native_bf16(cpuinfo),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
    }


def native_bf16(cpuinfo: str | None = None) -> bool:
    """Whether this processor multiplies bf16 in hardware (without it bf16 is slower than fp32)."""
    text = _cpuinfo() if cpuinfo is None else cpuinfo
    return any(
        NATIVE_BF16_FLAGS.intersection(line.split(":", 1)[1].split())
        for line in text.splitlines()
        if line.startswith(("flags", "Features"))
    )


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ""


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The checked-out commit, with `+changes` where files differ from it; None outside a git checkout."""
    folder = Path(__file__).parent
    try:
        head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=folder, capture_output=True, text=True)
        changes = subprocess.run(["git", "status", "--porcelain"], cwd=folder, capture_output=True, text=True)
    except OSError:
        return None
    if head.returncode != 0:
        return None
    return head.stdout.strip() + ("+changes" if changes.stdout.strip() else "")
